"""The product with a weight matrix, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x (..., in), weight (out, in), bias (out,) or None; in fp32, rounded once to the dtype of x."""
    wide = torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in fp32."""
    return torch.nn.functional.linear(x.float(), weight.float())
