"""Execution of a step on the device: from scheduled chunks to sampled tokens."""

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
    with_logprobs,
)
from lamella.engine.steps.step_inputs import StepInputs, StepTensors
from lamella.layers.context import forward_batch, leave_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.kernel_attention import use_attention_kernels
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.backend import has_triton, use_triton
from lamella.ops.sampling import draw, placeholder_tokens
from lamella.state.manager import DUMMY, Allocation, StateManager

_KEPT_GRAPHS = 8  # most sets of graphs, each for other forms of the features
_LOGITS_ROWS = 256  # rows of prompt logits (rows, vocab_size) in memory at a time


class Forward(Protocol):
    """Computes the hidden states of a step in place of the model.

    Attributes:
        min_tokens: number of tokens of the smallest step that it can compute.
    """

    min_tokens: int

    def warm_up(self) -> None:
        """Prepare for all later steps, for example by compiling."""
        ...

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return hidden states (num_tokens, hidden_size) of the current batch's `input_ids` (num_tokens,)."""
        ...


@dataclass(slots=True)
class StepResult:
    """Result of a step for one request.

    Attributes:
        request: the request.
        token_id: the sampled token; None if the chunk does not end with the request's last token.
        logprobs: log-probabilities at the sampled token; None if not requested.
        prompt_logprobs: of the prompt tokens that the chunk's tokens predict, in order; empty if not requested.
    """

    request: Request
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: Sequence[TokenLogprobs] = ()


@dataclass(frozen=True)
class InFlightStep:
    """A launched step whose results the host has not collected yet.

    Attributes:
        chunks: of the step, in the order of its rows.
        sampled: requests that a token is sampled for, in the order of `choice`.
        choice: sampled tokens; None if there are none.
        prompt_logprobs: prompt log-probabilities of the requests that need them.
    """

    chunks: Sequence[Scheduled]
    sampled: Sequence[Request] = ()
    choice: Choice | None = None
    prompt_logprobs: Mapping[Request, list[TokenLogprobs]] = field(default_factory=dict)


class ModelRunner:
    """Executes the steps of a model: builds inputs, runs the forward (or a CUDA graph of it), and samples.

    Attributes:
        num_replays: number of steps that were replays of a graph.
        async_scheduling: True if the engine launches a step before it collects the previous one, so that the device
            does not wait for the host.
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
        """Make a runner; `warm_up` prepares it for steps.

        Args:
            model: this rank's model.
            state: pools of the requests.
            device: of the model.
            max_model_len: in tokens.
            max_num_seqs: most requests in a step.
            features: add arrays to steps.
            forward: computes the hidden states in place of the model, for example a compiled model.
        """
        self.model, self.state, self.device, self.max_model_len = model, state, device, max_model_len
        self.features, self._forward = features, forward
        self._compute: Callable[[Tensor], Tensor] = model if forward is None else forward
        self._min_tokens = 1 if forward is None else forward.min_tokens
        self.async_scheduling = device.type == "cuda"
        self.num_replays = 0
        kernels = device.type == "cuda" and has_triton()
        self.attention = AttentionSpace(max_num_seqs, max_model_len, device) if kernels else None
        if kernels:
            use_attention_kernels(model)
        # Tokens sampled by the latest step, and the row of each request in it.
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._rows: dict[Request, int] = {}
        # On a GPU every decode step is padded to one of these sizes, with or without a graph: libraries choose kernels,
        # and so the order of sums, by the number of rows.
        self._sizes = bucket_sizes(max_num_seqs) if device.type == "cuda" else []
        # By the state whose memory the graphs use, and the forms of the features. In LRU order, the latest last.
        self._graphs: OrderedDict[tuple[StateManager, Forms], DecodeGraphs] = OrderedDict()
        self._captures = False
        self._inputs: dict[StateManager, StepInputs] = {}
        self.inputs = self._get_inputs(state)

    def bind(self, state: StateManager, graphs: bool) -> None:
        """Switch to other state pools. No step may be in flight.

        Args:
            state: the pools.
            graphs: True to capture decode steps, unless there are graphs for these pools.
        """
        self.state, self._rows = state, {}
        self.inputs = self._get_inputs(state)
        if (state, self.features.forms((), replay=True)) not in self._graphs:
            self.warm_up(graphs)

    def _get_inputs(self, state: StateManager) -> StepInputs:
        if state not in self._inputs:
            inputs = StepInputs(state, self.max_model_len, self.device, self.attention, self.features)
            self._inputs[state] = inputs
        return self._inputs[state]

    def release_state(self, state: StateManager) -> None:
        """Release the graphs and inputs of state pools whose memory is no longer valid."""
        for key in [key for key in self._graphs if key[0] is state]:
            self._graphs.pop(key).release()
        self._inputs.pop(state, None)

    def warm_up(self, graphs: bool) -> None:
        """Compile kernels, and capture decode steps. Only the dummy block and the dummy slot are written.

        Args:
            graphs: True to capture decode steps in CUDA graphs.
        """
        if self._forward is not None:
            self._forward.warm_up()
        if self.device.type != "cuda":
            return
        dummies = [
            Request(f"padding {index}", [0] * (2 - index), SamplingParams())
            for index in range(min(2, len(self._tokens)))
        ]
        for dummy in dummies:
            self.state.allocations[dummy] = Allocation(DUMMY, [[DUMMY] for _ in self.state.groups])
        # Compiles kernels that are not in a disk cache: seconds for Triton kernels, minutes for some libraries.
        with tqdm(total=1, desc="compiling kernels", unit="step", dynamic_ncols=True) as bar:
            self.launch([Scheduled(dummy, 0, len(dummy.prompt_token_ids), samples=True) for dummy in dummies])
            bar.update()
        for dummy in dummies:
            del self.state.allocations[dummy]
        self._rows = {}
        if graphs and self.attention is not None:
            self._captures = True
            self._get_graphs(self.features.forms((), replay=True)).capture()

    def _get_graphs(self, forms: Forms) -> DecodeGraphs:
        """Return the graphs of steps with these forms; new ones, not captured yet, if there are none."""
        key = self.state, forms
        if key not in self._graphs:
            # A memory pool is freed with the last of its graphs, so it is reused only from graphs that still exist.
            pool = next((graphs.pool for graphs in self._graphs.values()), None) or torch.cuda.graph_pool_handle()
            self._graphs[key] = DecodeGraphs(self.model, self.inputs, self._tokens, self._sizes, forms, pool)
            while len(self._graphs) > _KEPT_GRAPHS:
                self._graphs.popitem(last=False)[1].release()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def drop_graphs(self) -> None:
        """Release all graphs. Later steps run without graphs."""
        self._captures = False
        while self._graphs:
            self._graphs.popitem()[1].release()

    @torch.inference_mode()
    def launch(self, step: Sequence[Scheduled]) -> InFlightStep:
        """Launch a step. On a GPU this does not wait for the results.

        Args:
            step: chunks, at least one. Their blocks and slots are allocated.

        Returns:
            The in-flight step, to be passed to `collect`.
        """
        chunks = sorted(step, key=lambda chunk: chunk.count != 1)  # decodes first, see RaggedBatch
        if self.attention is not None:
            self.attention.begin_step()
        decodes = bool(self._sizes) and chunks[-1].count == 1
        rows = min(size for size in self._sizes if size >= len(chunks)) if decodes else 0
        replays = decodes and self._captures and all(chunk.samples for chunk in chunks)
        replays = replays and self.features.can_replay(chunks)
        forms = self.features.forms(chunks, replays)
        if replays:
            hidden, tensors = self._get_graphs(forms).replay(rows, chunks, self._rows)
            self.num_replays += 1
            return self._make_in_flight(chunks, self._sample(chunks, hidden, tensors, is_sampled=True), {})
        num_padding = rows - len(chunks) if decodes and self.features.can_pad(forms) else 0
        if sum(chunk.count for chunk in chunks) < self._min_tokens:
            num_padding = self._min_tokens - len(chunks)
        tensors = self.inputs.build(chunks, self._rows, num_padding, forms)
        with forward_batch(tensors.batch):
            hidden = self._compute(self._fill_placeholders(tensors.input_ids, chunks))
            prompts = self._prompt_logprobs(chunks, hidden)
            return self._make_in_flight(chunks, self._sample(chunks, hidden, tensors), prompts)

    def reset(self) -> None:
        """Discard in-flight steps after an exception. The next step starts from tokens that the host has.

        Waits for the device, which may still read host buffers of these steps.
        """
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # the step has already reported an error of the device
                torch.cuda.synchronize(self.device)
        leave_batch()
        self._rows = {}
        self.features.reset()

    def collect(self, step: InFlightStep) -> list[StepResult]:
        """Wait for a step, and return the result of each chunk in order."""
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

    def _make_in_flight(
        self, chunks: Sequence[Scheduled], choice: Choice | None, prompts: Mapping[Request, list[TokenLogprobs]]
    ) -> InFlightStep:
        sampled = [chunk.request for chunk in chunks if chunk.samples] if choice is not None else []
        if choice is not None:
            if choice.tokens.data_ptr() != self._tokens.data_ptr():  # a graph has written them there itself
                self._tokens[: len(sampled)] = choice.tokens
            self._rows = {request: row for row, request in enumerate(sampled)}
        return InFlightStep(chunks, sampled, choice, prompts)

    def _fill_placeholders(self, input_ids: Tensor, chunks: Sequence[Scheduled]) -> Tensor:
        """Replace placeholders by the tokens that the previous step sampled, on the device."""
        if not any(chunk.request.num_in_flight for chunk in chunks):
            return input_ids
        return placeholder_tokens(input_ids, self._tokens)

    def _sample(
        self, chunks: Sequence[Scheduled], hidden: Tensor, tensors: StepTensors, is_sampled: bool = False
    ) -> Choice | None:
        """Sample the next token of each request whose chunk ends with its last token.

        Args:
            chunks: of the step.
            hidden: (num_tokens, hidden_size) hidden states.
            tensors: inputs of the step.
            is_sampled: True if a graph has already sampled a token for every row, from unedited logits.

        Returns:
            The tokens; None if no chunk ends with its request's last token.
        """
        indices = [index for index, chunk in enumerate(chunks) if chunk.samples]
        if not indices:
            return None
        if is_sampled and all(chunk.request.is_plain for chunk in chunks):
            return Choice(self._tokens[: len(chunks)])
        rows = [sampling_row(chunks[index].request) for index in indices]
        sampling = tensors.sampling
        if len(indices) < len(chunks) or not is_sampled:
            wanted = torch.tensor(indices).to(self.device, non_blocking=True)
            hidden = hidden[tensors.batch.ragged.query_start_loc[1:].long()[wanted] - 1]
            sampling = {name: values[wanted] for name, values in sampling.items()}
        logits = self.model.compute_logits(hidden)
        if is_sampled and not any(map(is_edited, rows)):
            return with_logprobs(logits, self._tokens[: len(rows)], rows)
        return choose(logits, rows, partial(draw, sampling=sampling) if use_triton(logits) else None)

    def _prompt_logprobs(self, chunks: Sequence[Scheduled], hidden: Tensor) -> dict[Request, list[TokenLogprobs]]:
        """Return the log-probabilities of the prompt tokens that the step's tokens predict, where requested."""
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
                for some_rows, some_ids in zip(rows.split(_LOGITS_ROWS), ids.split(_LOGITS_ROWS), strict=True)
                for entry in prompt_logprobs(self.model.compute_logits(some_rows), some_ids, wanted)
            ]
        return found


def sampling_row(request: Request) -> SamplingRow:
    """Return the sampler's inputs of a request."""
    return SamplingRow(
        params=request.params,
        seed=request.seed,
        step=request.num_sampled,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=request.output_token_ids,
        eos_token_ids=request.eos_token_ids,
    )
