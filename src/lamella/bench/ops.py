"""Benchmark of single operations: check against the reference, time over all layers, and roofline floor."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lamella.layers.canon import Canon
from lamella.layers.context import BlockView, ForwardBatch, forward_batch
from lamella.layers.linear import Head, Linear
from lamella.layers.norm import RMSNorm
from lamella.layers.recurrent import RecurrentMixer
from lamella.layers.state_modules import PagedAttention
from lamella.layers.supernet.placing import idle_mixers
from lamella.ops.attention import reference as attention_reference
from lamella.ops.backend import portable_only
from lamella.ops.linear import reference as linear_reference
from lamella.ops.operands import ConvState, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import reference as norm_reference
from lamella.ops.short_conv import reference as conv_reference
from lamella.serve.llm import LLM
from lamella.state.spec import PagedState

_SECONDS = 0.2  # approximate measuring time per operation
_PASSES = 16  # minimum number of passes in a CUDA graph, so that its launch time is negligible
# Largest allowed error, relative to the reference value or to the root mean square of all values, whichever is larger:
# both results are rounded, so small values can have large relative errors.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class OpTiming:
    """Measurement of one operation.

    Attributes:
        op: name.
        microseconds: time of one call, the mean over all layers.
        floor: microseconds that its memory traffic takes at the measured bandwidth.
        error: largest error, relative to the reference value or to the root mean square of all values, whichever is
            larger.
        calls: number of layers with this operation.
    """

    op: str
    microseconds: float
    floor: float
    error: float
    calls: int


@dataclass(frozen=True)
class _Case:
    """One operation to measure.

    Attributes:
        op: name.
        passes: one call per layer, so that weights are not in a cache from the previous call.
        expected: computes the reference result of the first call.
        nbytes: memory traffic of one call.
    """

    op: str
    passes: Sequence[Callable[[], Tensor]]
    expected: Callable[[], Tensor]
    nbytes: int


@torch.inference_mode()
def time_ops(llm: LLM, rows: int, context: int, bandwidth: float) -> Iterator[OpTiming]:
    """Measure the operations of a decode step. The engine's state is overwritten.

    Args:
        llm: the model.
        rows: number of requests.
        context: tokens of each request.
        bandwidth: measured memory bandwidth in bytes per second.

    Yields:
        The measurement of each operation.

    Raises:
        AssertionError: an operation disagrees with its reference.
    """
    device = llm.engine.device
    for case in _cases(llm, rows, context):
        # The reference comes first, since convolutions update their history in place.
        expected = case.expected().float()
        difference = case.passes[0]().float() - expected
        sizes = expected.abs().clamp(min=float(expected.square().mean().sqrt()))
        error = float((difference.abs() / sizes).max())
        assert error <= _TOLERANCE[_dtype(llm)], f"{case.op}: error {error:.2g} against its reference"
        seconds = _seconds(case.passes, device)
        yield OpTiming(case.op, seconds * 1e6, case.nbytes / bandwidth * 1e6, error, len(case.passes))


def _cases(llm: LLM, rows: int, context: int) -> Iterator[_Case]:
    model, device = llm.engine.model, llm.engine.device
    batch = _decode_batch(llm, rows, context)
    dtype = _dtype(llm)
    modules: dict[str, list[Any]] = defaultdict(list)
    skipped = {module for mixer in idle_mixers(model) for module in mixer.modules()}
    # Norms inside a recurrent mixer are measured as part of its recurrence.
    skipped |= {norm for module in model.modules() if isinstance(module, RecurrentMixer) for norm in _norms(module)}
    for path, module in model.named_modules():
        if module not in skipped and isinstance(module, Linear | RMSNorm | Canon | PagedAttention | RecurrentMixer):
            modules[re.sub(r"^model\.|layers\.\d+\.", "", path)].append(module)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    for name, same in modules.items():
        first = same[0]
        if isinstance(first, Linear):
            x, weight = random(rows, first.shape.inputs.size), first.dense_weight
            if isinstance(first, Head):
                expected = partial(linear_reference.fp32_linear, x, first.weight)
            elif weight is not None:
                expected = partial(linear_reference.linear, x, weight, first.bias)
            else:
                expected = partial(_applied, first, x)
            stored = sum(tensor.nbytes for name, tensor in first.named_parameters() if name != "bias")
            nbytes = stored + x.nbytes + rows * first.shape.outputs.size * x.itemsize
            yield _Case(name, [partial(m, x) for m in same], expected, nbytes)
        elif isinstance(first, RMSNorm):
            x, residual = random(rows, first.weight.shape[0]), random(rows, first.weight.shape[0])
            norm = ResidualNorm(residual, first.weight, first.eps)
            expected = partial(_first, norm_reference.add_rms_norm, x, norm)
            yield _Case(name, [partial(_first, m, x, residual) for m in same], expected, 4 * x.nbytes)
        elif isinstance(first, Canon):
            x = random(rows, first.weight.shape[0])
            passes = [partial(_within, batch, m, x) for m in same]
            width = first.weight.shape[2]
            # Reads the new input and W - 1 old ones; writes the output, and the new input to the history.
            nbytes = x.nbytes * (width + 2) + first.weight.nbytes
            yield _Case(name, passes, partial(_convolved, batch, first, x), nbytes)
        elif isinstance(first, RecurrentMixer):
            inputs = [random(rows, width) for width in first.widths]
            passes = [partial(_recurred, batch, m, inputs) for m in same]
            state = sum(spec.bytes_per_request for spec in first.history.state_module.specs)
            nbytes = 2 * rows * state + sum(x.nbytes for x in inputs)
            yield _Case(f"{name}.recurrence", passes, partial(_recurred_plainly, batch, first, inputs), nbytes)
        else:
            spec = first.spec
            q = random(rows, first.heads, spec.head_dim)
            passes = [partial(_within, batch, m.read, q) for m in same]
            nbytes = rows * spec.live_tokens(context) * spec.bytes_per_token + 2 * q.nbytes
            yield _Case(name, passes, partial(_attended, batch, first, q), nbytes)


def _dtype(llm: LLM) -> torch.dtype:
    return llm.engine.model.get_parameter("model.embed_tokens.weight").dtype


def _decode_batch(llm: LLM, rows: int, context: int) -> ForwardBatch:
    """Return a decode step over random state. Every request has its own slot and blocks, in random order."""
    engine, device = llm.engine, llm.engine.device
    blocks = engine.state.num_blocks(context)
    for tensor in engine.memory.tensors:
        tensor.normal_()
    views: dict[PagedState, BlockView] = {}
    for group, pool in zip(engine.state.groups, engine.state.block_pools, strict=True):
        if pool.capacity < rows * blocks:
            raise ValueError(
                f"{rows} requests of {context} tokens need {rows * blocks} blocks, and a pool has {pool.capacity}; "
                "give fewer requests or tokens, or more num_blocks"
            )
        order = torch.randperm(pool.capacity, device=device)[: rows * blocks] + 1
        none = torch.empty(0, dtype=torch.int32, device=device)
        slot_mapping = torch.zeros(rows, dtype=torch.int64, device=device)
        views[group] = BlockView(order.view(rows, blocks).int(), slot_mapping, none, engine.state.block_size)
    ragged = RaggedBatch.from_lengths([1] * rows, [context] * rows, device)
    slots = torch.arange(1, rows + 1, device=device)
    return ForwardBatch(ragged, views, slots, engine.runner.attention)


def _norms(mixer: RecurrentMixer) -> list[RMSNorm]:
    return [module for module in mixer.modules() if isinstance(module, RMSNorm)]


def _recurred(batch: ForwardBatch, mixer: RecurrentMixer, inputs: Sequence[Tensor]) -> Tensor:
    with forward_batch(batch):
        return mixer.core(*inputs, None)


def _recurred_plainly(batch: ForwardBatch, mixer: RecurrentMixer, inputs: Sequence[Tensor]) -> Tensor:
    """Run a recurrence with portable operations, and restore its state."""
    rows = mixer.history.state_module.rows
    before = [tensor.clone() for tensor in rows]
    with portable_only():
        y = _recurred(batch, mixer, inputs)
    for tensor, old in zip(rows, before, strict=True):
        tensor.copy_(old)
    return y


def _applied(linear: Linear, x: Tensor) -> Tensor:
    """Apply a linear with its own method in fp32, the reference for weights that are not dense."""
    bias = None if linear.bias is None else linear.bias.float()
    return linear.method.apply(linear, x.float(), bias).to(x.dtype)


def _first(function: Callable[..., tuple[Tensor, Tensor]], *operands: object) -> Tensor:
    return function(*operands)[0]


def _within(batch: ForwardBatch, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_batch(batch):
        return function(x)


def _convolved(batch: ForwardBatch, canon: Canon, x: Tensor) -> Tensor:
    with forward_batch(batch):
        step = canon.step()
    state = ConvState(step.state.history.clone(), step.state.slots)
    return conv_reference.short_conv(x, step.weights, batch.ragged, state)


def _attended(batch: ForwardBatch, attention: PagedAttention, q: Tensor) -> Tensor:
    with forward_batch(batch):
        cache = attention.cache()
    spec = attention.spec
    return attention_reference.paged_attention(q, cache, batch.ragged, attention.scale, spec.window, spec.chunk)


def _seconds(passes: Sequence[Callable[[], Tensor]], device: torch.device) -> float:
    """Return the seconds of one pass: the median over rounds in which all passes run one after the other.

    On a GPU the passes run in a CUDA graph, as in the engine.
    """
    if device.type != "cuda":
        return _median(lambda: _timed(passes)) / len(passes)
    for run in passes:
        run()
    rounds = -(-_PASSES // len(passes))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in list(passes) * rounds:
            run()

    def timed() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return _median(timed) / (rounds * len(passes))


def _timed(passes: Sequence[Callable[[], Tensor]]) -> float:
    start = time.perf_counter()
    for run in passes:
        run()
    return time.perf_counter() - start


def _median(measure: Callable[[], float]) -> float:
    measure()
    times, end = [measure()], time.perf_counter() + _SECONDS
    while time.perf_counter() < end or len(times) < 3:
        times.append(measure())
    return sorted(times)[len(times) // 2]
