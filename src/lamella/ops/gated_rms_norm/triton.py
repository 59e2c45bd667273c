"""RMS norm of each head's output, multiplied by a gate, in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import sigmoid
from lamella.ops.gated_rms_norm.reference import Activation
from lamella.ops.launch import cdiv, dependent_launch, wait_for_predecessor
from lamella.ops.rms_norm.triton import row_block, row_scale


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """Compute `reference.gated_rms_norm`. x and gate may have any stride over tokens and heads."""
    tokens, heads, width = x.shape
    assert gate.shape == x.shape and x.stride(2) == gate.stride(2) == 1
    assert weight.shape == (width,) and weight.is_contiguous() and activation in ("silu", "sigmoid")
    rows, columns, warps = row_block(width)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _gated_rms_norm[(cdiv(tokens * heads, rows),)](
        x,
        gate,
        weight,
        out,
        tokens * heads,
        *x.stride()[:2],
        *gate.stride()[:2],
        eps,
        HEADS=heads,
        N=width,
        SILU=activation == "silu",
        COLUMNS=columns,
        ROWS=rows,
        num_warps=warps,
        enable_fp_fusion=False,  # as in the other norms
        **dependent_launch(x),
    )
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _gated_rms_norm(
    x,
    gate,
    weight,
    out,
    num_rows,
    x_stride_token,
    x_stride_head,
    gate_stride_token,
    gate_stride_head,
    eps,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    SILU: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    mask = (row < num_rows) & (column < N)
    token, head = row // HEADS, row % HEADS
    w = tl.load(weight + column, mask=column < N, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = tl.load(x + token * x_stride_token + head * x_stride_head + column, mask=mask, other=0.0).to(tl.float32)
    factor = tl.load(gate + token * gate_stride_token + head * gate_stride_head + column, mask=mask, other=0.0)
    factor = factor.to(tl.float32)
    opened = sigmoid(factor)
    if SILU:
        opened *= factor
    value = value * row_scale(value, N, eps) * w * opened
    tl.store(out + row * N + column, value.to(out.dtype.element_ty), mask=mask)
