"""Products of very few rows with a weight matrix: each program holds whole rows of the weight in registers.

At one row nothing counts but how fast the weight arrives. So every program asks for all of its weight at once, before
it even waits for the kernel ahead of it, whose result it needs (see `launch.wait_for_predecessor`). What stands before
the product in a block, the residual sum and its norm, is cheap enough for every program to compute for itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import dependent_launch, wait_for_predecessor

MAX_ROWS = 4
_MAX_INPUT = 1 << 14  # elements: the longest weight row that fits into a program's registers


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` and its fused forms take x (T, in) and weight (out, in)."""
    rows, size = x.shape
    return (
        1 <= rows <= MAX_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and size % 8 == 0
        and size <= _MAX_INPUT
        and x.stride(1) == 1
        and weight.is_contiguous()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, wide: bool = False) -> Tensor:
    """`x W^T + b`, see `reference.linear`; the unrounded sums in fp32 if `wide`. Rows do not depend on one another."""
    y = x.new_empty((x.shape[0], weight.shape[0]), dtype=torch.float32 if wide else x.dtype)
    _launch(x, None, None, 0.0, weight, bias, y, None, gated=False)
    return y


def norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`linear` of `add_rms_norm(x, residual)`, and the new residual. x and residual (T, in), norm_weight (in,) fp32."""
    y = x.new_empty((x.shape[0], weight.shape[0]))
    total = torch.empty_like(residual)
    _launch(x, residual, norm_weight, eps, weight, bias, y, total, gated=False)
    return y, total


def norm_swiglu_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `norm_linear` for weight (2 I, in) = [gate | up], then `silu(gate) * up`: (T, I), rounded once at the end."""
    y = x.new_empty((x.shape[0], weight.shape[0] // 2))
    total = torch.empty_like(residual)
    _launch(x, residual, norm_weight, eps, weight, bias, y, total, gated=True)
    return y, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    gated: bool,
    *,
    tile: int | None = None,
    num_warps: int = 4,
) -> None:
    rows, size = x.shape
    outputs = y.shape[1]
    padded = triton.next_power_of_2(size)
    if tile is None:
        tile, num_warps = (1 << 13, 2) if size <= 1024 else (1 << 13, 4) if weight.numel() < 5 << 20 else (1 << 14, 4)
    block = max(1, tile // padded // (2 if gated else 1))
    while padded * block * (2 if gated else 1) > tile and num_warps < 16:
        tile, num_warps = tile * 2, num_warps * 2
    _kernel[(triton.cdiv(outputs, block),)](
        x, x.stride(0), residual, 0 if residual is None else residual.stride(0), norm_weight, eps, weight, bias, y,
        total,
        ROWS=rows, OUTPUTS=outputs, SIZE=size, PADDED=padded, BLOCK=block, GATED=gated, num_warps=num_warps,
        **dependent_launch(x),
    )  # fmt: skip


@triton.jit
def _dot(weight, x):
    """Sums over the inputs of weight (BLOCK, PADDED) times x (1, PADDED)."""
    return tl.sum(weight.to(tl.float32) * x, axis=1)


@triton.jit
def _kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, norm_ptr, eps, weight_ptr, bias_ptr, y_ptr, total_ptr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inputs = tl.arange(0, PADDED)[None, :]
    inside = inputs < SIZE
    mask = (outputs < OUTPUTS)[:, None] & inside
    offsets = outputs[:, None].to(tl.int64) * SIZE + inputs
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_weight = tl.load(weight_ptr + OUTPUTS * SIZE + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    if norm_ptr is not None:
        norm_weight = tl.load(norm_ptr + inputs, mask=inside, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + outputs, mask=outputs < OUTPUTS, other=0.0).to(tl.float32)
        if GATED:
            up_bias = tl.load(bias_ptr + OUTPUTS + outputs, mask=outputs < OUTPUTS, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + inputs, mask=inside, other=0.0)
        if residual_ptr is not None:
            kept = tl.load(residual_ptr + row * residual_stride + inputs, mask=inside, other=0.0)
            total = (x.to(tl.float32) + kept.to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:
                tl.store(total_ptr + row * SIZE + inputs, total, mask=inside)
            # The norm's scale is a factor of the whole sum: both sums are added up at once, and multiplied in the end.
            wide = total.to(tl.float32)
            scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)
            wide_x = wide * norm_weight
        else:
            wide_x = x.to(tl.float32)
        y = _dot(weight, wide_x)
        if residual_ptr is not None:
            y *= scale
        if bias_ptr is not None:
            y += bias
        if GATED:
            up = _dot(up_weight, wide_x)
            if residual_ptr is not None:
                up *= scale
            if bias_ptr is not None:
                up += up_bias
            y = y / (1.0 + tl.exp(-y)) * up
        tl.store(y_ptr + row * OUTPUTS + outputs, y.to(y_ptr.dtype.element_ty), mask=outputs < OUTPUTS)
