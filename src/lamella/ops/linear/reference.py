"""Product with a weight matrix, and the operations around it in a layer, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import ConvStep, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import add_rms_norm
from lamella.ops.short_conv.reference import short_conv
from lamella.ops.swiglu.reference import swiglu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b` for x (..., in), weight (out, in), bias (out,) or None, in fp32, rounded once."""
    x_fp32 = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return x_fp32.to(x.dtype)


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T` (..., out) in fp32 for x (..., in) and weight (out, in)."""
    return torch.nn.functional.linear(x.float(), weight.float())


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
    norm: ResidualNorm | None = None,
    conv: ConvStep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `add_rms_norm`, `linear`, `short_conv` and `swiglu` in this order; return the result and new residual.

    Steps whose argument is None or False are skipped. Each step rounds to the dtype of x.
    """
    total = None
    if norm is not None:
        x, total = add_rms_norm(x, norm)
    y = linear(x, weight, bias)
    if conv is not None:
        y = short_conv(y, conv.weights, RaggedBatch.from_decodes(conv.positions), conv.state)
    return swiglu(y) if gated else y, total
