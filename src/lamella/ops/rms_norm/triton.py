"""RMS norm in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.operands import ResidualNorm
from lamella.ops.rms_norm import MAX_WIDTH


def rms_norm(x: Tensor, weight: Tensor, eps: float, twice: bool = False) -> Tensor:
    """Compute `reference.rms_norm` of x (T, N) or (T, heads, N), weight (N,) fp32; return a new contiguous tensor."""
    assert x.dim() in (2, 3)
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight, eps, normed, None, twice)
    return normed


def add_rms_norm(
    x: Tensor, norm: ResidualNorm, twice: bool = False, *, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.add_rms_norm` of x (T, N), weight fp32; return new contiguous tensors."""
    residual, weight, eps = norm
    assert x.dim() == 2 and residual.shape == x.shape and residual.dtype == x.dtype and residual.stride(1) == 1
    normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(normed) if total is None else total
    assert total.shape == x.shape and total.dtype == x.dtype and total.is_contiguous()
    _launch(x, residual, weight, eps, normed, total, twice)
    return normed, total


def row_block(width: int) -> tuple[int, int, int]:
    """Return how rows of `width` elements are processed: rows per program, columns with padding, warps.

    The last two determine the order of a row's sum. Every kernel whose norm must be bitwise equal uses this function.
    """
    assert width <= MAX_WIDTH
    columns = next_power_of_2(width)
    return (2048 // columns, columns, 4) if columns <= 256 else (1, columns, min(16, columns // 512))


@triton.jit
def row_scale(x, N: tl.constexpr, eps):
    """Return 1 / sqrt(mean(x^2) + eps) of each row of x (rows, columns) fp32, zero beyond column N: (rows, 1)."""
    return tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / N + eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, normed: Tensor, total: Tensor | None, twice: bool
) -> None:
    tokens, heads, width = x.shape if x.dim() == 3 else (x.shape[0], 1, x.shape[1])
    assert x.stride(-1) == 1 and weight.is_contiguous() and weight.shape == (width,)
    rows, columns, warps = row_block(width)
    _rms_norm[(cdiv(tokens * heads, rows),)](
        x,
        residual,
        weight,
        normed,
        total,
        tokens * heads,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        eps,
        HEADS=heads,
        N=width,
        COLUMNS=columns,
        ROWS=rows,
        TWICE=twice,
        num_warps=warps,
        enable_fp_fusion=False,  # fusion depends on the surrounding code, but other kernels must give equal bits
        **dependent_launch(x),
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,
    residual,
    weight,
    normed,
    total,
    num_rows,
    x_stride_token,
    x_stride_head,
    residual_stride,
    eps,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    TWICE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < N)
    w = tl.load(weight + column, mask=column < N, other=0.0)
    wait_for_predecessor(PDL)
    source = row // HEADS * x_stride_token + row % HEADS * x_stride_head + column
    value = tl.load(x + source, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
        kept = value.to(total.dtype.element_ty)
        tl.store(total + row * N + column, kept, mask=mask)
        value = kept.to(tl.float32)
    value = value * row_scale(value, N, eps)
    if TWICE:
        value = value.to(normed.dtype.element_ty).to(tl.float32)
    value *= w
    tl.store(normed + row * N + column, value.to(normed.dtype.element_ty), mask=mask)
