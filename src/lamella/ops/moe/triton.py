"""Mixture of experts in Triton: a plan on the device, and then two grouped products.

The plan sorts the pairs (token, expert) by expert and splits the pairs of each expert into blocks of rows. The number
of
blocks is known on the device only, but the shapes give an upper bound: that many programs are launched, and programs
without a block end at once. The host does not wait for the device, and a replayed CUDA graph may route differently from
the captured step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import sigmoid
from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.moe.reference import route
from lamella.ops.swiglu.triton import silu

_ONE_PROGRAM = 1 << 14  # logits that one program can plan for
_LOWEST = tl.constexpr(-3e38)


class Plan(NamedTuple):
    """The T * top_k pairs (token, choice), sorted by expert.

    Attributes:
        rows: (T * top_k,) int32, sorted pairs as token * top_k + choice.
        weights: (T * top_k,) fp32, factors of the experts' inputs, in sorted order.
        bounds: (E + 1,) int32, range of each expert in the sorted order.
    """

    rows: Tensor
    weights: Tensor
    bounds: Tensor


class Settings(NamedTuple):
    """Launch settings of a grouped product; they affect speed, and results only by rounding."""

    rows: int  # per block; a power of two >= 16
    columns: int
    inputs: int
    num_warps: int
    num_stages: int


# By rows per block and bytes per element: for the product with gate and up (two sums), and for the product with down.
_GATE_UP = {
    (16, 2): Settings(16, 32, 256, 4, 4),
    (64, 2): Settings(64, 64, 64, 4, 4),
    (128, 2): Settings(128, 128, 64, 8, 4),
    (16, 4): Settings(16, 32, 64, 4, 3),
    (64, 4): Settings(64, 32, 32, 4, 2),
    (128, 4): Settings(64, 32, 32, 4, 2),
}
_DOWN = {
    (16, 2): Settings(16, 32, 256, 4, 4),
    (64, 2): Settings(64, 128, 64, 4, 4),
    (128, 2): Settings(128, 256, 64, 8, 3),
    (16, 4): Settings(16, 32, 64, 4, 3),
    (64, 4): Settings(64, 64, 32, 4, 2),
    (128, 4): Settings(64, 64, 32, 4, 2),
}


def experts(
    x: Tensor,
    logits: Tensor,
    top_k: int,
    gate_up: Tensor,
    down: Tensor,
    base: Tensor | None = None,
    first: int = 0,
    *,
    settings: tuple[Settings, Settings] | None = None,
) -> Tensor:
    """Compute `reference.experts`. x may have rows of any stride; `settings` are those of the two products."""
    (tokens, size), (count, width), everyone = x.shape, down.shape[::2], logits.shape[1]
    assert gate_up.shape == (count, 2 * width, size) and gate_up.is_contiguous() and down.is_contiguous()
    assert down.shape == (count, size, width) and logits.shape[0] == tokens and x.stride(1) == 1
    assert x.dtype == gate_up.dtype == down.dtype and (base is None or (base.shape, base.dtype) == (x.shape, x.dtype))
    assert 0 <= first <= everyone - count
    pairs = tokens * top_k
    if settings is None:
        each = pairs // everyone  # average rows per expert
        kind = 16 if each <= 16 else 64 if each <= 96 else 128
        settings = _GATE_UP[kind, x.itemsize], _DOWN[kind, x.itemsize]
    widening, narrowing = settings
    plan = make_plan(logits, top_k)
    plan = plan._replace(bounds=plan.bounds[first : first + count + 1])
    padded = next_power_of_2(count)
    inner = torch.empty((pairs, width), dtype=x.dtype, device=x.device)
    blocks = _max_blocks(pairs, count, widening.rows)
    _gate_up_kernel[(blocks * cdiv(width, widening.columns),)](
        x, x.stride(0), *plan, gate_up, inner, blocks,
        EXPERTS=count, PADDED_EXPERTS=padded, TOP_K=top_k, SIZE=size, WIDTH=width,
        ROWS=widening.rows, COLUMNS=widening.columns, INPUTS=widening.inputs,
        num_warps=widening.num_warps, num_stages=widening.num_stages, **dependent_launch(x),
    )  # fmt: skip
    # With one expert per token, its product is the result. With several, their outputs are summed afterwards.
    single = top_k == 1
    out = torch.empty((pairs, size), dtype=x.dtype if single else torch.float32, device=x.device)
    if count < everyone and single and base is not None:
        out.copy_(base)
    elif count < everyone:
        out.zero_()
    blocks = _max_blocks(pairs, count, narrowing.rows)
    added = base if single else None
    _down_kernel[(blocks * cdiv(size, narrowing.columns),)](
        inner, plan.rows, plan.bounds, down, added, 0 if added is None else added.stride(0), out, blocks,
        EXPERTS=count, PADDED_EXPERTS=padded, SIZE=size, WIDTH=width,
        ROWS=narrowing.rows, COLUMNS=narrowing.columns, INPUTS=narrowing.inputs,
        num_warps=narrowing.num_warps, num_stages=narrowing.num_stages, **dependent_launch(x),
    )  # fmt: skip
    return out if single else _add_up(out, base, x, top_k)


def make_plan(logits: Tensor, top_k: int) -> Plan:
    """Return the plan for logits (T, E) fp32; ties are resolved arbitrarily."""
    (tokens, count), device = logits.shape, logits.device
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    padded_tokens, padded = next_power_of_2(tokens), next_power_of_2(count)
    if padded_tokens * padded > _ONE_PROGRAM:
        ids, weights = route(logits, top_k)
        ids, order = ids.flatten().sort(stable=True)
        bounds = torch.searchsorted(ids, torch.arange(count + 1, device=device), out_int32=True)
        return Plan(order.int(), weights.flatten()[order], bounds)
    rows = torch.empty(tokens * top_k, dtype=torch.int32, device=device)
    plan = Plan(rows, torch.empty_like(rows, dtype=torch.float32), rows.new_empty(count + 1))
    _plan_kernel[(1,)](
        logits, logits.stride(0), *plan, tokens,
        EXPERTS=count, TOP_K=top_k, PADDED_TOKENS=padded_tokens, PADDED_EXPERTS=padded,
        num_warps=_plan_warps(padded_tokens * padded), **dependent_launch(logits),
    )  # fmt: skip
    return plan


def _plan_warps(entries: int) -> int:
    """Return one warp if several would have less than one element per thread, which Triton 3.6 cannot compile."""
    return 1 if entries <= 128 else 4 if entries <= 4096 else 8


def _max_blocks(pairs: int, count: int, rows: int) -> int:
    """Return the maximum number of blocks of `rows` rows; the last block of an expert has at least one row."""
    return (pairs + min(pairs, count) * (rows - 1)) // rows


@triton.jit(do_not_specialize=["tokens"])
def _plan_kernel(
    logits_ptr, stride, rows_ptr, weights_ptr, bounds_ptr, tokens,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, PADDED_TOKENS: tl.constexpr, PADDED_EXPERTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    token, expert = tl.arange(0, PADDED_TOKENS)[:, None], tl.arange(0, PADDED_EXPERTS)[None, :]
    inside = (token < tokens) & (expert < EXPERTS)
    wait_for_predecessor(PDL)
    logits = tl.load(logits_ptr + token * stride + expert, mask=inside, other=0.0)
    # Padding rows may contain anything; they also get their number of experts.
    logits = tl.where(logits > _LOWEST, logits, _LOWEST)
    left = tl.where(inside, logits, float("-inf"))
    choices = tl.zeros([PADDED_TOKENS, PADDED_EXPERTS], tl.int32)
    for choice in tl.static_range(TOP_K):
        largest = tl.max(left, axis=1, keep_dims=True)
        first = tl.min(tl.where(left == largest, expert, PADDED_EXPERTS), axis=1, keep_dims=True)
        left = tl.where(expert == first, float("-inf"), left)
        choices = tl.where(expert == first, choice, choices)
    chosen = inside & (left == float("-inf"))
    ones = chosen.to(tl.int32)
    counts = tl.sum(ones, axis=0)
    ends = tl.cumsum(counts, axis=0)
    places = (ends - counts)[None, :] + tl.cumsum(ones, axis=0) - ones
    tl.store(rows_ptr + places, token * TOP_K + choices, mask=chosen)
    tl.store(weights_ptr + places, sigmoid(logits), mask=chosen)
    experts = tl.arange(0, PADDED_EXPERTS)
    tl.store(bounds_ptr + 1 + experts, ends, mask=experts < EXPERTS)
    tl.store(bounds_ptr, 0)


@triton.jit
def _find(bounds_ptr, block, EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Return a block's expert, its first index, and the end of the expert's range; 0, 0, 0 without such a block."""
    experts = tl.arange(0, PADDED_EXPERTS)
    real = experts < EXPERTS
    starts = tl.load(bounds_ptr + experts, mask=real, other=0)
    ends = tl.load(bounds_ptr + experts + 1, mask=real, other=0)
    blocks = tl.cdiv(ends - starts, ROWS)
    upto = tl.cumsum(blocks, axis=0)
    within = block - (upto - blocks)
    here = (within >= 0) & (block < upto)
    expert = tl.sum(tl.where(here, experts, 0))
    return expert, tl.sum(tl.where(here, starts + within * ROWS, 0)), tl.sum(tl.where(here, ends, 0))


@triton.jit(do_not_specialize=["blocks"])
def _gate_up_kernel(
    x_ptr, x_stride, rows_ptr, weights_ptr, bounds_ptr, gate_up_ptr, out_ptr, blocks,
    EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    # Adjacent programs use the same columns of the weight, which stay in the cache for all blocks of an expert.
    block, column = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    expert, start, end = _find(bounds_ptr, block, EXPERTS, PADDED_EXPERTS, ROWS)
    if start >= end:
        return
    places, outputs, inputs = start + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, INPUTS)
    here, inside = places < end, outputs < WIDTH
    tokens = tl.load(rows_ptr + places, mask=here, other=0) // TOP_K
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * x_stride + inputs[None, :]
    gate_ptrs = gate_up_ptr + expert.to(tl.int64) * (2 * WIDTH * SIZE) + outputs[None, :] * SIZE + inputs[:, None]
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, SIZE, INPUTS):
        rest = inputs < SIZE - first
        x = tl.load(x_ptrs + first, mask=here[:, None] & rest[None, :], other=0.0)
        mask = rest[:, None] & inside[None, :]
        gate = tl.dot(x, tl.load(gate_ptrs + first, mask=mask, other=0.0), gate, input_precision="ieee")
        up = tl.dot(x, tl.load(gate_ptrs + first + WIDTH * SIZE, mask=mask, other=0.0), up, input_precision="ieee")
    # The weight of the input is a factor of the sums.
    weights = tl.load(weights_ptr + places, mask=here, other=0.0)[:, None]
    inner = (silu(gate * weights) * (up * weights)).to(out_ptr.dtype.element_ty)
    cells = places.to(tl.int64)[:, None] * WIDTH + outputs[None, :]
    tl.store(out_ptr + cells, inner, mask=here[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["blocks"])
def _down_kernel(
    x_ptr, rows_ptr, bounds_ptr, down_ptr, base_ptr, base_stride, out_ptr, blocks,
    EXPERTS: tl.constexpr, PADDED_EXPERTS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write rows back from sorted order to pairs; with a base, pairs are tokens."""
    wait_for_predecessor(PDL)
    block, column = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    expert, start, end = _find(bounds_ptr, block, EXPERTS, PADDED_EXPERTS, ROWS)
    if start >= end:
        return
    places, outputs, inputs = start + tl.arange(0, ROWS), column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, INPUTS)
    here, inside = places < end, outputs < SIZE
    rows = tl.load(rows_ptr + places, mask=here, other=0).to(tl.int64)
    x_ptrs = x_ptr + places.to(tl.int64)[:, None] * WIDTH + inputs[None, :]
    down_ptrs = down_ptr + expert.to(tl.int64) * (SIZE * WIDTH) + outputs[None, :] * WIDTH + inputs[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in tl.range(0, WIDTH, INPUTS):
        rest = inputs < WIDTH - first
        x = tl.load(x_ptrs + first, mask=here[:, None] & rest[None, :], other=0.0)
        down = tl.load(down_ptrs + first, mask=rest[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, down, total, input_precision="ieee")
    mask = here[:, None] & inside[None, :]
    if base_ptr is not None:
        base = tl.load(base_ptr + rows[:, None] * base_stride + outputs[None, :], mask=mask, other=0.0)
        total += base.to(tl.float32)
    tl.store(out_ptr + rows[:, None] * SIZE + outputs[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def _add_up(parts: Tensor, base: Tensor | None, x: Tensor, top_k: int) -> Tensor:
    """Return the sum of each token's parts (T * top_k, H) fp32 and base (T, H): (T, H) in the dtype of x."""
    tokens, size = x.shape
    out = torch.empty((tokens, size), dtype=x.dtype, device=x.device)
    block = 1024
    _add_up_kernel[(tokens, cdiv(size, block))](
        parts, base, 0 if base is None else base.stride(0), out,
        TOP_K=top_k, SIZE=size, BLOCK=block, num_warps=4, **dependent_launch(x),
    )  # fmt: skip
    return out


@triton.jit
def _add_up_kernel(
    parts_ptr, base_ptr, base_stride, out_ptr,
    TOP_K: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    token, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(TOP_K):
        total += tl.load(parts_ptr + (token * TOP_K + choice) * SIZE + columns, mask=mask, other=0.0)
    if base_ptr is not None:
        total += tl.load(base_ptr + token * base_stride + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * SIZE + columns, total.to(out_ptr.dtype.element_ty), mask=mask)
