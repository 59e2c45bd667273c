"""Teacher forcing in the real engine: its scheduler, state and forwards, with given tokens in place of sampling."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamella.config import PlacementLike
from lamella.engine.loading import build_engine
from lamella.engine.options import EngineOptions
from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import StepFeatures
from lamella.engine.steps.runner import Forward, InFlightStep, ModelRunner
from lamella.engine.steps.sampler import Choice, TokenLogprobs
from lamella.engine.steps.step_inputs import StepTensors
from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import SlotStateModule
from lamella.layers.supernet.placing import find_active_state_modules
from lamella.parity.scores import Scores
from lamella.parity.sequences import TokenSequence
from lamella.state.manager import DUMMY, Allocation, StateManager

_LOGITS_ROWS = 256  # rows of logits computed at a time, to bound memory


_in_flight: ContextVar[Sequence[tuple[Sequence[int], int, int]]] = ContextVar("in_flight", default=())


def in_flight() -> Sequence[tuple[Sequence[int], int, int]]:
    """Return the requests of the step being computed: (all tokens so far, first computed token, number of tokens).

    Further rows of the batch are padding.
    """
    return _in_flight.get()


@contextmanager
def computing(requests: Sequence[tuple[Sequence[int], int, int]]) -> Iterator[None]:
    """Set the requests that `in_flight` returns inside a `with` block."""
    token = _in_flight.set(requests)
    try:
        yield
    finally:
        _in_flight.reset(token)


@dataclass
class Record:
    """One request to run, and its results.

    Attributes:
        prompt: prompt tokens.
        forced: tokens to generate whatever the logits are; None to generate greedily.
        count: number of tokens to generate.
        parts: scores by prediction. If a preempted request computed a prediction twice, the second result.
        state: state after the last prediction, by path of the state module: (positions, ...) rows of blocks, or a slot.
        steps: number of tokens of the request in each step that computed it.
        preemptions: number of preemptions.
        cached: tokens that came from the prefix cache; their predictions are not in `parts`.
        placement: placement of the request in a supernet; None for the engine's.
        token_ids: generated tokens.
    """

    prompt: tuple[int, ...]
    forced: tuple[int, ...] | None
    count: int
    parts: dict[int, Scores] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    preemptions: int = 0
    cached: int = 0
    placement: PlacementLike | None = None
    token_ids: tuple[int, ...] = ()

    @property
    def num_predictions(self) -> int:
        """Number of predictions: one less than the number of tokens."""
        return len(self.prompt) + self.count - 1

    @property
    def scores(self) -> Scores:
        """Scores of all predictions, starting with the first one that was computed."""
        rows = [self.parts[index] for index in range(min(self.parts), self.num_predictions)]
        ids = [row.ids for row in rows if row.ids is not None]
        return Scores(
            torch.cat([row.target for row in rows]),
            torch.cat([row.logprobs for row in rows]),
            torch.cat(ids) if ids else None,
        )


def record_from_sequence(sequence: TokenSequence) -> Record:
    """Return a record that forces the continuation of a sequence."""
    return Record(sequence.prompt, sequence.continuation, len(sequence.continuation))


class ForcedEngine:
    """Engine over a loaded model, with forced tokens.

    The pools are filled with NaN first, so that a read of memory that was never written shows in the results.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: Mapping[str, Any],
        device: torch.device,
        top: int | None = None,
        padding_rows: int = 0,
    ) -> None:
        """Build the engine.

        Args:
            model: loaded model.
            options: options as of `LLM`; the prefix cache is off unless enabled here.
            device: device of the model.
            top: number of likeliest tokens to record per position; None for the whole vocabulary.
            padding_rows: padding rows to add to every step that only decodes.
        """
        settings = EngineOptions(model="", **{"enable_prefix_caching": False, **options})
        self.engine = build_engine(
            model, settings, device, make_runner=partial(_ForcedRunner, top=top, padding_rows=padding_rows)
        )
        assert isinstance(self.engine.runner, _ForcedRunner)
        self._runner = self.engine.runner
        self.engine.memory.poison()
        self._ids = itertools.count()

    def score(self, sequences: Sequence[TokenSequence], budgets: Iterable[int] = ()) -> list[Record]:
        """Run the sequences as requests of one batch; see `run`."""
        return self.run([record_from_sequence(sequence) for sequence in sequences], budgets)

    def run(
        self, records: Sequence[Record], budgets: Iterable[int] = (), preempt_after: int | None = None
    ) -> list[Record]:
        """Run the requests to their end.

        Args:
            records: requests; their results are filled in.
            budgets: maximum tokens of the first steps; later steps use the engine's `max_num_batched_tokens`.
            preempt_after: number of steps after which all running requests are preempted once; None for never.

        Returns:
            The records.
        """
        for record in records:
            params = SamplingParams(
                temperature=0,
                max_tokens=record.count,
                ignore_eos=True,
                detokenize=False,
                placement=record.placement,
            )
            job = self.engine.make_job(str(next(self._ids)), {"prompt_token_ids": list(record.prompt)}, params)
            request = job.completions[0].request
            assert request.max_tokens == record.count, "max_model_len cuts the sequence"
            self._runner.records[request] = record
            self.engine.add(job)
        usual = self.engine.scheduler.max_num_batched_tokens
        for index, budget in enumerate(itertools.chain(budgets, itertools.repeat(usual))):
            if not self.engine.has_work:
                break
            if index == preempt_after:
                self.engine.scheduler.preempt_all()
            self.engine.scheduler.max_num_batched_tokens = budget
            self.engine.step()
            self.engine.state.check_integrity()
        self.engine.scheduler.max_num_batched_tokens = usual
        for request, record in self._runner.records.items():
            record.token_ids, record.preemptions = tuple(request.output_token_ids), request.num_preemptions
            record.cached = request.num_cached_tokens
        self._runner.records.clear()
        return list(records)


class _ForcedRunner(ModelRunner):
    """Model runner that records the distribution at every position and returns forced tokens instead of sampling."""

    def __init__(
        self,
        model: LanguageModel,
        state: StateManager,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        features: StepFeatures,
        forward: Forward | None,
        top: int | None,
        padding_rows: int,
    ) -> None:
        super().__init__(model, state, device, max_model_len, max_num_seqs + padding_rows, features, forward)
        self.async_scheduling = False
        self.records: dict[Request, Record] = {}
        self._top = top
        self._padding = [Request(f"padding {index}", [0], SamplingParams()) for index in range(padding_rows)]

    def launch(self, step: Sequence[Scheduled]) -> InFlightStep:
        """Pad steps that only decode, like a CUDA graph of fixed size, with rows on the dummy block and dummy slot."""
        padding = self._padding if all(chunk.count == 1 for chunk in step) else []
        for row in padding:
            self.state.allocations[row] = Allocation(DUMMY, [[DUMMY] for _ in self.state.groups])
        known = [(chunk.request.token_ids(0, chunk.start + chunk.count), chunk.start, chunk.count) for chunk in step]
        with computing(known):
            launched = super().launch([*step, *(Scheduled(row, 0, 1, False) for row in padding)])
        for row in padding:
            del self.state.allocations[row]
        return replace(launched, chunks=[chunk for chunk in launched.chunks if chunk.request not in padding])

    def _prompt_logprobs(self, chunks: Sequence[Scheduled], hidden: Tensor) -> dict[Request, list[TokenLogprobs]]:
        return {}

    def _sample(
        self, chunks: Sequence[Scheduled], hidden: Tensor, tensors: StepTensors, is_sampled: bool = False
    ) -> Choice | None:
        tokens: list[int] = []
        counts = [chunk.count for chunk in chunks]  # the engine's own padding rows follow
        every = torch.cat([self.model.compute_logits(part) for part in hidden[: sum(counts)].split(_LOGITS_ROWS)])
        for chunk, logits in zip(chunks, every.split(counts), strict=True):
            request = chunk.request
            if (record := self.records.get(request)) is None:
                continue  # padding
            record.steps.append(chunk.count)
            known = request.token_ids(chunk.start + 1, chunk.start + chunk.count + 1)
            if chunk.samples:
                step = len(request.output_token_ids)
                token = int(logits[-1].argmax()) if record.forced is None else record.forced[step]
                tokens.append(token)
                known = [*known, token]
            scores = Scores.from_logits(logits, known, self._top)
            for row in range(chunk.count):
                ids = None if scores.ids is None else scores.ids[row : row + 1]
                part = Scores(scores.target[row : row + 1], scores.logprobs[row : row + 1], ids)
                record.parts[chunk.start + row] = part
            if chunk.start + chunk.count == record.num_predictions:
                record.state = self._snapshot(request, record.num_predictions)
        return Choice(torch.tensor(tokens)) if tokens else None

    def _snapshot(self, request: Request, length: int) -> dict[str, Tensor]:
        """Copy a request's state from its blocks and slots, with paged rows in the order of positions."""
        allocation, found = self.state.allocations[request], {}
        for state_module in find_active_state_modules(self.model, request.variant.placement or None):
            if isinstance(state_module, SlotStateModule):
                for index, rows in enumerate(state_module.rows):
                    found[f"{state_module.prefix}.{index}" if index else state_module.prefix] = (
                        rows[allocation.slot].clone().cpu()
                    )
                continue
            spec = state_module.spec
            blocks = allocation.blocks[self.state.groups.index(spec)]
            positions = torch.arange(spec.first_visible(length - 1), length)
            block = torch.tensor(blocks)[positions // self.state.block_size]
            assert (block != DUMMY).all()
            for name, cache in (("keys", state_module.k_cache), ("values", state_module.v_cache)):
                rows = cache[block.to(cache.device), (positions % self.state.block_size).to(cache.device)]
                found[f"{state_module.prefix}.{name}"] = rows.cpu()
        return found
