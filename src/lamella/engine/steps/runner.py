"""One step on the device: from the scheduler's shares to sampled tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lamella.config import Placement
from lamella.engine.images.embeddings import ImageRows
from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.graphs import DecodeGraphs, bucket_sizes
from lamella.engine.steps.sampler import (
    Choice,
    SamplingRow,
    TokenLogprobs,
    choose,
    is_edited,
    prompt_logprobs,
    scored,
)
from lamella.engine.steps.step_inputs import StepInputs, StepTensors
from lamella.layers.compiled.model import MIN_TOKENS, CompiledModel
from lamella.layers.context import forward_batch, leave_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.kernel_attention import use_attention_kernels
from lamella.layers.supernet.batches import CutPlacements, MixerUnion, unite
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.backend import has_triton, use_triton
from lamella.ops.sampling import draw, pending_tokens
from lamella.state.manager import DUMMY, Holding, StateManager

_KEPT_GRAPHS = 8  # unions of placements whose graphs are kept
_LOGITS_ROWS = 256  # rows of the vocabulary's width at a time, where a prompt's logprobs are wanted


@dataclass(slots=True)
class StepResult:
    """What a step gave one request."""

    request: Request
    token_id: int | None = None  # None while the prompt is not through
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of the prompt tokens after this share's, in order


@dataclass(frozen=True)
class Flight:
    """A step that the device has been given.

    Attributes:
        shares: what it computes, in the order of its rows.
        sampled: the requests that get a token, in the order of `choice`.
        choice: their tokens; None where there are none.
        prompt_logprobs: those of the prompts that want them.
    """

    shares: Sequence[Scheduled]
    sampled: Sequence[Request] = ()
    choice: Choice | None = None
    prompt_logprobs: Mapping[Request, list[TokenLogprobs]] = field(default_factory=dict)


class ModelRunner:
    """Runs a model's steps over the state that its requests hold.

    Attributes:
        num_replays: steps that were replays of a graph.
        runs_ahead: whether a step is to be launched before the one ahead of it has been collected, so that the device
            never waits for the host.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: StateManager,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        images: ImageRows,
        compiled: CompiledModel | None = None,
    ) -> None:
        """`images` gives steps the rows of their images; with `compiled`, that is what computes the steps."""
        self.images = images
        self.model, self.state, self.device, self.max_model_len = model, state, device, max_model_len
        self.compiled = compiled
        self.runs_ahead = device.type == "cuda"
        self.num_replays = 0
        kernels = device.type == "cuda" and has_triton()
        self.attention = AttentionSpace(max_num_seqs, max_model_len, device) if kernels else None
        if kernels:
            use_attention_kernels(model)
        self.inputs = StepInputs(state, max_model_len, device, self.attention)
        # Of the latest step, what each of its rows has chosen.
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows: dict[Request, int] = {}
        # On a GPU a step that only decodes has one of these numbers of rows, in a graph or not: the kernels of a
        # library, and with them the order of sums, may differ from number to number.
        self._sizes = bucket_sizes(max_num_seqs) if device.type == "cuda" else []
        # By the state whose memory a graph has captured, and the mixers in it; the latest last.
        self._graphs: OrderedDict[tuple[StateManager, MixerUnion], DecodeGraphs] = OrderedDict()
        self._captures = False
        self._inputs = {state: self.inputs}
        self._active = model.placement

    def move(self, state: StateManager, graphs: bool) -> None:
        """Run the steps of another state's requests, under the model's placement; with `graphs`, decode steps are
        captured where they have not been yet. Nothing may be in flight.
        """
        self.state, self._active, self._rows = state, self.model.placement, {}
        if state not in self._inputs:
            self._inputs[state] = StepInputs(state, self.max_model_len, self.device, self.attention)
        self.inputs = self._inputs[state]
        if (state, unite(frozenset([self._active]))[0]) not in self._graphs:
            self.warm_up(graphs)

    def forget(self, state: StateManager) -> None:
        """Let go of what was captured over a state's memory, which is gone."""
        for key in [key for key in self._graphs if key[0] is state]:
            self._graphs.pop(key).release()
        self._inputs.pop(state, None)

    def warm_up(self, graphs: bool) -> None:
        """Compile the model, where steps are computed so. On a GPU, compile what a step of prompts needs and, with
        `graphs`, capture the decode steps.

        Only the dummy page and the dummy slot are written to.
        """
        if self.compiled is not None:
            self.compiled.warm_up()
        if self.device.type != "cuda":
            return
        pads = [
            Request(f"padding {index}", [0] * (2 - index), SamplingParams())
            for index in range(min(2, len(self._tokens)))
        ]
        for pad in pads:
            self.state.holdings[pad] = Holding(DUMMY, [[DUMMY] for _ in self.state.groups])
        # Kernels that are not in a cache on disk yet are compiled now: seconds, and minutes for a library's.
        with tqdm(total=1, desc="compiling kernels", unit="step", dynamic_ncols=True) as bar:
            self.launch([Scheduled(pad, 0, len(pad.prompt_token_ids), samples=True) for pad in pads])
            bar.update()
        for pad in pads:
            del self.state.holdings[pad]
        self._rows = {}
        if graphs and self.attention is not None:
            self._captures = True
            self._graphs_of(unite(frozenset([self._active]))[0]).capture()

    def _graphs_of(self, union: MixerUnion) -> DecodeGraphs:
        """The graphs of some mixers; new ones where there are none, of which nothing is captured yet."""
        key = self.state, union
        if key not in self._graphs:
            # Of graphs that live: a pool ends with the last of its own.
            pool = next((graphs.pool for graphs in self._graphs.values()), None) or torch.cuda.graph_pool_handle()
            self._graphs[key] = DecodeGraphs(self.model, self.inputs, self._tokens, self._sizes, union, pool)
            while len(self._graphs) > _KEPT_GRAPHS:
                self._graphs.popitem(last=False)[1].release()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def drop_graphs(self) -> None:
        """Let go of what the captured steps hold. The runner goes on without them."""
        self._captures = False
        while self._graphs:
            self._graphs.popitem()[1].release()

    @torch.inference_mode()
    def launch(self, step: Sequence[Scheduled]) -> Flight:
        """Give the device a step, without waiting for it where it is a GPU."""
        shares = sorted(step, key=lambda share: share.count != 1)  # decodes first, see RaggedBatch
        if self.attention is not None:
            self.attention.begin_step()
        pads, own = 0, self._placements(shares)
        if self._sizes and shares[-1].count == 1:
            rows = min(size for size in self._sizes if size >= len(shares))
            if self._captures and all(share.samples for share in shares):
                union, tables = unite(frozenset(own or [self._active]))
                mixers = [tables[placement] for placement in own]
                hidden, tensors = self._graphs_of(union).replay(rows, shares, self._rows, mixers)
                self.num_replays += 1
                return self._flight(shares, self._choose(shares, hidden, tensors, chosen=True), {})
            pads = 0 if own else rows - len(shares)
        if self.compiled is not None and sum(share.count for share in shares) < MIN_TOKENS:
            pads = MIN_TOKENS - len(shares)
        placements = CutPlacements(own) if own else None
        tensors = self.inputs.build(shares, self._rows, pads, placements, self.images.of(shares))
        with forward_batch(tensors.batch):
            forward = self.model if self.compiled is None else self.compiled
            hidden = forward(self._resolve(tensors.input_ids, shares))
            prompts = self._prompt_logprobs(shares, hidden)
            return self._flight(shares, self._choose(shares, hidden, tensors), prompts)

    def reset(self) -> None:
        """Forget the steps in flight, whose results nobody will collect; the next step starts from tokens of the host.

        Waits for the device, which may still read what the host has written for these steps.
        """
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # an error of the device was reported by the step already
                torch.cuda.synchronize(self.device)
        leave_batch()
        self._rows = {}
        self.model.activate(self._active)  # an exception may have interrupted a change of it

    def _placements(self, shares: Sequence[Scheduled]) -> tuple[Placement, ...]:
        """Of each request of a step, where they have several; where they have one, it becomes the model's."""
        own = [share.request.placement for share in shares if share.request.placement]
        if not own:
            return ()
        if any(placement is not own[0] and placement != own[0] for placement in own):
            return tuple(share.request.placement or self._active for share in shares)
        if own[0] is not self._active and own[0] != self._active:
            self.model.activate(own[0])
        self._active = own[0]
        return ()

    def collect(self, flight: Flight) -> list[StepResult]:
        """The results of a step, in the order of its rows; waits for them."""
        tokens: dict[Request, tuple[int, TokenLogprobs | None]] = {}
        if flight.choice is not None:
            chosen = flight.choice.read()
            tokens = dict(zip(flight.sampled, zip(chosen.token_ids, chosen.logprobs, strict=True), strict=True))
        results = []
        for share in flight.shares:
            token_id, logprobs = tokens.get(share.request, (None, None))
            prompt = flight.prompt_logprobs.get(share.request, ())
            results.append(StepResult(share.request, token_id, logprobs, prompt))
        return results

    def _flight(
        self, shares: Sequence[Scheduled], choice: Choice | None, prompts: Mapping[Request, list[TokenLogprobs]]
    ) -> Flight:
        sampled = [share.request for share in shares if share.samples] if choice is not None else []
        if choice is not None:
            if choice.tokens.data_ptr() != self._tokens.data_ptr():  # a graph leaves them there by itself
                self._tokens[: len(sampled)] = choice.tokens
            self._rows = {request: row for row, request in enumerate(sampled)}
        return Flight(shares, sampled, choice, prompts)

    def _resolve(self, input_ids: Tensor, shares: Sequence[Scheduled]) -> Tensor:
        """Token ids with those of the step before, which the host may not know, in their places."""
        if not any(share.request.num_pending for share in shares):
            return input_ids
        return pending_tokens(input_ids, self._tokens)

    def _choose(
        self, shares: Sequence[Scheduled], hidden: Tensor, tensors: StepTensors, chosen: bool = False
    ) -> Choice | None:
        """The next token of each request whose share ends with its last token.

        With `chosen`, a graph has chosen for every row already, with nothing done to the logits before.
        """
        indices = [index for index, share in enumerate(shares) if share.samples]
        if not indices:
            return None
        if chosen and all(share.request.plain for share in shares):
            return Choice(self._tokens[: len(shares)])
        rows = [sampling_row(shares[index].request) for index in indices]
        sampling = tensors.sampling
        if len(indices) < len(shares) or not chosen:
            wanted = torch.tensor(indices).to(self.device, non_blocking=True)
            hidden = hidden[tensors.batch.ragged.query_start_loc[1:].long()[wanted] - 1]
            sampling = {name: values[wanted] for name, values in sampling.items()}
        logits = self.model.compute_logits(hidden)
        if chosen and not any(map(is_edited, rows)):
            return scored(logits, self._tokens[: len(rows)], rows)
        return choose(logits, rows, partial(draw, sampling=sampling) if use_triton(logits) else None)

    def _prompt_logprobs(self, shares: Sequence[Scheduled], hidden: Tensor) -> dict[Request, list[TokenLogprobs]]:
        found: dict[Request, list[TokenLogprobs]] = {}
        start = 0
        for share in shares:
            request, first = share.request, start
            start += share.count
            wanted = request.params.prompt_logprobs
            targets = request.prompt_token_ids[share.start + 1 : share.start + share.count + 1]
            if wanted is None or not targets:
                continue
            ids = torch.tensor(targets).to(self.device)
            rows = hidden[first : first + len(targets)]
            found[request] = [
                entry
                for part, some in zip(rows.split(_LOGITS_ROWS), ids.split(_LOGITS_ROWS), strict=True)
                for entry in prompt_logprobs(self.model.compute_logits(part), some, wanted)
            ]
        return found


def sampling_row(request: Request) -> SamplingRow:
    """What the sampler must know of a request."""
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        step=request.num_sampled,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        eos_token_ids=request.eos_token_ids,
    )
