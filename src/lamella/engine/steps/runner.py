"""One step on the device: from scheduled chunks of requests to sampled tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import NO_FEATURES, Forms, StepFeatures
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
from lamella.layers.context import forward_batch, leave_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.kernel_attention import use_attention_kernels
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.backend import has_triton, use_triton
from lamella.ops.sampling import draw, placeholder_tokens
from lamella.state.manager import DUMMY, Allocation, StateManager

_KEPT_GRAPHS = 8  # forms of steps whose graphs are kept
_LOGITS_ROWS = 256  # rows of the vocabulary's width at a time, where a prompt's logprobs are wanted


class Forward(Protocol):
    """Computes the hidden states of a step in place of the model.

    Attributes:
        min_tokens: the smallest step that it can compute.
    """

    min_tokens: int

    def warm_up(self) -> None:
        """Prepare for every step to come."""
        ...

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return hidden states (T, hidden_size) of ids (T,) of the current batch."""
        ...


@dataclass(slots=True)
class StepResult:
    """Result of a step for one request."""

    request: Request
    token_id: int | None = None  # None if the step did not reach the prompt's end
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()  # of the prompt tokens after the chunk's, in order


@dataclass(frozen=True)
class InFlightStep:
    """A step that the device was given.

    Attributes:
        chunks: what it computes, in the order of its rows.
        sampled: the requests that get a token, in the order of `choice`.
        choice: their tokens; None if there are none.
        prompt_logprobs: of the prompts that want them.
    """

    chunks: Sequence[Scheduled]
    sampled: Sequence[Request] = ()
    choice: Choice | None = None
    prompt_logprobs: Mapping[Request, list[TokenLogprobs]] = field(default_factory=dict)


class ModelRunner:
    """Runs a model's steps over the state of its requests.

    Attributes:
        num_replays: steps that were replays of a graph.
        runs_ahead: True if a step should be launched before the step before it has been collected, so that the device
            never waits for the host.
    """

    def __init__(
        self,
        model: LanguageModel,
        state: StateManager,
        device: torch.device,
        max_model_len: int,
        max_num_seqs: int,
        features: StepFeatures = NO_FEATURES,
        forward: Forward | None = None,
    ) -> None:
        """`features` add arrays to steps; `forward` computes them in place of the model."""
        self.model, self.state, self.device, self.max_model_len = model, state, device, max_model_len
        self.features, self._forward = features, forward
        self._compute: Callable[[Tensor], Tensor] = model if forward is None else forward
        self._min_tokens = 1 if forward is None else forward.min_tokens
        self.runs_ahead = device.type == "cuda"
        self.num_replays = 0
        kernels = device.type == "cuda" and has_triton()
        self.attention = AttentionSpace(max_num_seqs, max_model_len, device) if kernels else None
        if kernels:
            use_attention_kernels(model)
        # The token that each row of the latest step chose.
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows: dict[Request, int] = {}
        # On a GPU a step that only decodes has one of these numbers of rows, in a graph or not: the kernels of a
        # library, and with them the order of sums, may differ from number to number.
        self._sizes = bucket_sizes(max_num_seqs) if device.type == "cuda" else []
        # By the state whose memory a graph has captured, and the forms of its steps; the latest last.
        self._graphs: OrderedDict[tuple[StateManager, Forms], DecodeGraphs] = OrderedDict()
        self._captures = False
        self._inputs: dict[StateManager, StepInputs] = {}
        self.inputs = self._inputs_of(state)

    def bind(self, state: StateManager, graphs: bool) -> None:
        """Run the steps of another state's requests; nothing may be in flight.

        With `graphs`, decode steps are captured unless they have been before.
        """
        self.state, self._rows = state, {}
        self.inputs = self._inputs_of(state)
        if (state, self.features.forms((), replay=True)) not in self._graphs:
            self.warm_up(graphs)

    def _inputs_of(self, state: StateManager) -> StepInputs:
        if state not in self._inputs:
            inputs = StepInputs(state, self.max_model_len, self.device, self.attention, self.features)
            self._inputs[state] = inputs
        return self._inputs[state]

    def forget(self, state: StateManager) -> None:
        """Release what was captured over a state's memory, which is gone."""
        for key in [key for key in self._graphs if key[0] is state]:
            self._graphs.pop(key).release()
        self._inputs.pop(state, None)

    def warm_up(self, graphs: bool) -> None:
        """Prepare for the steps to come: kernels, and with `graphs` the captured decode steps on a GPU.

        Only the dummy block and the dummy slot are written to.
        """
        if self._forward is not None:
            self._forward.warm_up()
        if self.device.type != "cuda":
            return
        pads = [
            Request(f"padding {index}", [0] * (2 - index), SamplingParams())
            for index in range(min(2, len(self._tokens)))
        ]
        for pad in pads:
            self.state.allocations[pad] = Allocation(DUMMY, [[DUMMY] for _ in self.state.groups])
        # Kernels that are not in a cache on disk yet are compiled now: seconds, and minutes for a library's.
        with tqdm(total=1, desc="compiling kernels", unit="step", dynamic_ncols=True) as bar:
            self.launch([Scheduled(pad, 0, len(pad.prompt_token_ids), samples=True) for pad in pads])
            bar.update()
        for pad in pads:
            del self.state.allocations[pad]
        self._rows = {}
        if graphs and self.attention is not None:
            self._captures = True
            self._graphs_of(self.features.forms((), replay=True)).capture()

    def _graphs_of(self, forms: Forms) -> DecodeGraphs:
        """Return the graphs of steps of these forms; new ones, not captured yet, if there are none."""
        key = self.state, forms
        if key not in self._graphs:
            # A memory pool ends with the last of its graphs, so it is taken from a graph that is still there.
            pool = next((graphs.pool for graphs in self._graphs.values()), None) or torch.cuda.graph_pool_handle()
            self._graphs[key] = DecodeGraphs(self.model, self.inputs, self._tokens, self._sizes, forms, pool)
            while len(self._graphs) > _KEPT_GRAPHS:
                self._graphs.popitem(last=False)[1].release()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def drop_graphs(self) -> None:
        """Release all captured steps. The runner goes on without them."""
        self._captures = False
        while self._graphs:
            self._graphs.popitem()[1].release()

    @torch.inference_mode()
    def launch(self, step: Sequence[Scheduled]) -> InFlightStep:
        """Give the device a step; on a GPU, without waiting for it."""
        chunks = sorted(step, key=lambda chunk: chunk.count != 1)  # decodes first, see RaggedBatch
        if self.attention is not None:
            self.attention.begin_step()
        decodes = bool(self._sizes) and chunks[-1].count == 1
        rows = min(size for size in self._sizes if size >= len(chunks)) if decodes else 0
        replays = decodes and self._captures and all(chunk.samples for chunk in chunks)
        replays = replays and self.features.can_replay(chunks)
        forms = self.features.forms(chunks, replays)
        if replays:
            hidden, tensors = self._graphs_of(forms).replay(rows, chunks, self._rows)
            self.num_replays += 1
            return self._launched(chunks, self._choose(chunks, hidden, tensors, chosen=True), {})
        pads = rows - len(chunks) if decodes and self.features.can_pad(forms) else 0
        if sum(chunk.count for chunk in chunks) < self._min_tokens:
            pads = self._min_tokens - len(chunks)
        tensors = self.inputs.build(chunks, self._rows, pads, forms)
        with forward_batch(tensors.batch):
            hidden = self._compute(self._resolve(tensors.input_ids, chunks))
            prompts = self._prompt_logprobs(chunks, hidden)
            return self._launched(chunks, self._choose(chunks, hidden, tensors), prompts)

    def reset(self) -> None:
        """Forget the steps in flight, whose results nobody will collect; the next step starts from the host's tokens.

        Waits for the device, which may still read what the host has written for these steps.
        """
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # an error of the device was reported by the step already
                torch.cuda.synchronize(self.device)
        leave_batch()
        self._rows = {}
        self.features.reset()

    def collect(self, step: InFlightStep) -> list[StepResult]:
        """Wait for a step, and return its results in the order of its rows."""
        tokens: dict[Request, tuple[int, TokenLogprobs | None]] = {}
        if step.choice is not None:
            chosen = step.choice.read()
            tokens = dict(zip(step.sampled, zip(chosen.token_ids, chosen.logprobs, strict=True), strict=True))
        results = []
        for chunk in step.chunks:
            token_id, logprobs = tokens.get(chunk.request, (None, None))
            prompt = step.prompt_logprobs.get(chunk.request, ())
            results.append(StepResult(chunk.request, token_id, logprobs, prompt))
        return results

    def _launched(
        self, chunks: Sequence[Scheduled], choice: Choice | None, prompts: Mapping[Request, list[TokenLogprobs]]
    ) -> InFlightStep:
        sampled = [chunk.request for chunk in chunks if chunk.samples] if choice is not None else []
        if choice is not None:
            if choice.tokens.data_ptr() != self._tokens.data_ptr():  # a graph leaves them there by itself
                self._tokens[: len(sampled)] = choice.tokens
            self._rows = {request: row for row, request in enumerate(sampled)}
        return InFlightStep(chunks, sampled, choice, prompts)

    def _resolve(self, input_ids: Tensor, chunks: Sequence[Scheduled]) -> Tensor:
        """Return token ids, with those that the step before chose and the host may not know yet."""
        if not any(chunk.request.num_in_flight for chunk in chunks):
            return input_ids
        return placeholder_tokens(input_ids, self._tokens)

    def _choose(
        self, chunks: Sequence[Scheduled], hidden: Tensor, tensors: StepTensors, chosen: bool = False
    ) -> Choice | None:
        """Return the next token of each request whose chunk ends with its last token.

        With `chosen`, a graph has chosen for every row already, with nothing done to the logits before.
        """
        indices = [index for index, chunk in enumerate(chunks) if chunk.samples]
        if not indices:
            return None
        if chosen and all(chunk.request.plain for chunk in chunks):
            return Choice(self._tokens[: len(chunks)])
        rows = [sampling_row(chunks[index].request) for index in indices]
        sampling = tensors.sampling
        if len(indices) < len(chunks) or not chosen:
            wanted = torch.tensor(indices).to(self.device, non_blocking=True)
            hidden = hidden[tensors.batch.ragged.query_start_loc[1:].long()[wanted] - 1]
            sampling = {name: values[wanted] for name, values in sampling.items()}
        logits = self.model.compute_logits(hidden)
        if chosen and not any(map(is_edited, rows)):
            return scored(logits, self._tokens[: len(rows)], rows)
        return choose(logits, rows, partial(draw, sampling=sampling) if use_triton(logits) else None)

    def _prompt_logprobs(self, chunks: Sequence[Scheduled], hidden: Tensor) -> dict[Request, list[TokenLogprobs]]:
        found: dict[Request, list[TokenLogprobs]] = {}
        start = 0
        for chunk in chunks:
            request, first = chunk.request, start
            start += chunk.count
            wanted = request.params.prompt_logprobs
            targets = request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.count + 1]
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
    """Return the sampler's view of a request."""
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        step=request.num_sampled,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        eos_token_ids=request.eos_token_ids,
    )
