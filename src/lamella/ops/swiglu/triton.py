"""SwiGLU in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import sigmoid
from lamella.ops.launch import cdiv, dependent_launch, wait_for_predecessor

BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """Compute `reference.swiglu` of gate_up (T, 2 * I), rows of any stride; return (T, I)."""
    assert gate_up.dim() == 2 and gate_up.stride(1) == 1 and gate_up.shape[1] % 2 == 0
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, width), dtype=gate_up.dtype, device=gate_up.device)
    _swiglu[(tokens, cdiv(width, BLOCK))](
        gate_up,
        out,
        gate_up.stride(0),
        N=width,
        COLUMNS=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # as in every kernel with a gate, for equal bits
        **dependent_launch(gate_up),
    )
    return out


@triton.jit
def silu(x):
    """Return x * sigmoid(x) of x in fp32."""
    return x * sigmoid(x)


@triton.jit
def gate(left, right):
    """Return silu(left) * right, rounded once to their dtype."""
    return (silu(left.to(tl.float32)) * right.to(tl.float32)).to(left.dtype)


@triton.jit
def _swiglu(gate_up, out, stride, N: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr):
    wait_for_predecessor(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < N
    left = tl.load(gate_up + row * stride + column, mask=mask, other=0.0)
    right = tl.load(gate_up + row * stride + N + column, mask=mask, other=0.0)
    tl.store(out + row * N + column, gate(left, right), mask=mask)
