"""RMS normalisation in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NormStep(NamedTuple):
    """What `add_rms_norm` is given beside its input."""

    residual: Tensor
    weight: Tensor
    eps: float


def rms_norm(x: Tensor, weight: Tensor, eps: float, where: Tensor | None = None, twice: bool = False) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in fp32, rounded once to the dtype of `x`; or
    `twice`, before the weight too, as `transformers` does.

    x (..., N), weight (N,). Where `where`, () bool, is false, it is `x * weight`.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if where is not None:
        scale = scale.where(where, 1.0)
    normed = wide * scale
    if twice:
        normed = normed.to(x.dtype).float()
    return (normed * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, twice: bool = False) -> tuple[Tensor, Tensor]:
    """The new residual `x + residual`, rounded to its dtype, and the norm of what was kept.

    x and residual (..., N) of one dtype; returns (normed, residual).
    """
    total = (x.float() + residual.float()).to(x.dtype)
    return rms_norm(total, weight, eps, twice=twice), total
