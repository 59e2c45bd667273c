"""RMS norm in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import ResidualNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float, twice: bool = False) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32, rounded to the dtype of x.

    With `twice`, the normalized x is also rounded before the multiplication by the weight, as in `transformers`.

    Args:
        x: (..., N).
        weight: (N,).
        eps: added to the mean square.
        twice: whether to round twice.
    """
    x_fp32 = x.float()
    normed = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    if twice:
        normed = normed.to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, norm: ResidualNorm, twice: bool = False) -> tuple[Tensor, Tensor]:
    """Return the norm of the rounded sum x + `norm.residual`, and the rounded sum; all are (..., N)."""
    total = (x.float() + norm.residual.float()).to(x.dtype)
    return rms_norm(total, norm.weight, norm.eps, twice), total
