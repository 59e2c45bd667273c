"""lamella's engine as a scorer: batches, with prompts by prefill and continuations by decode steps."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.parity.forcing import ForcedEngine, Record
from lamella.parity.scores import Generation, Scores, Settings
from lamella.parity.sequences import TokenSequence
from lamella.parity.tested_model import ModelUnderTest


def open_scorer(tested: ModelUnderTest, settings: Settings) -> LamellaScorer:
    """Open a scorer with lamella's engine."""
    return LamellaScorer(tested, settings)


class LamellaScorer:
    """`Scorer` that keeps one loaded model and builds an engine for each call."""

    name = "lamella"

    def __init__(self, tested: ModelUnderTest, settings: Settings) -> None:
        self._model = settings.candidate or tested.load(settings.dtype, settings.device)
        self._device = settings.device
        # The logits of all tokens of a step are in memory at once, so steps must be short.
        self._options = {"max_num_seqs": settings.batch_size, "max_num_batched_tokens": 512, **settings.options}
        if tested.max_model_len is not None:
            self._options.setdefault("max_model_len", tested.max_model_len)

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        """Score all sequences in batches; see `Scorer.score`."""
        return [record.scores for record in self._engine(top).score(sequences)]

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        """Generate greedily in batches; see `Scorer.generate`."""
        records = self._engine(top).run([Record(prompt, None, count) for prompt in prompts])
        return [Generation(record.token_ids, _last(record.scores, count)) for record in records]

    def close(self) -> None:
        """Release the model."""
        del self._model

    def _engine(self, top: int | None) -> ForcedEngine:
        return ForcedEngine(self._model, self._options, self._device, top)


def _last(scores: Scores, count: int) -> Scores:
    ids = None if scores.ids is None else scores.ids[-count:]
    return Scores(scores.target[-count:], scores.logprobs[-count:], ids)
