"""Our own engine: prompts by prefill, continuations by its decode path, in batches."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.parity.forcing import ForcedEngine, Record
from lamella.parity.scores import Generation, Scores, Settings
from lamella.parity.sequences import TokenSequence
from lamella.parity.tested_model import TestedModel


def open_scorer(tested: TestedModel, settings: Settings) -> LamellaScorer:
    return LamellaScorer(tested, settings)


class LamellaScorer:
    """See `Scorer`. One model for its life, and an engine for each call."""

    name = "lamella"

    def __init__(self, tested: TestedModel, settings: Settings) -> None:
        self._model = settings.candidate or tested.load(settings.dtype, settings.device)
        self._device = settings.device
        # A step's logits are kept whole, so that a step must not be long.
        self._options = {"max_num_seqs": settings.batch_size, "max_num_batched_tokens": 512, **settings.options}
        if tested.max_model_len is not None:
            self._options.setdefault("max_model_len", tested.max_model_len)

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        return [record.scores for record in self._engine(top).score(sequences)]

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        records = self._engine(top).run([Record(prompt, None, count) for prompt in prompts])
        return [Generation(record.token_ids, _last(record.scores, count)) for record in records]

    def close(self) -> None:
        del self._model

    def _engine(self, top: int | None) -> ForcedEngine:
        return ForcedEngine(self._model, self._options, self._device, top)


def _last(scores: Scores, count: int) -> Scores:
    ids = None if scores.ids is None else scores.ids[-count:]
    return Scores(scores.target[-count:], scores.logprobs[-count:], ids)
