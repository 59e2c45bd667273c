"""The product with a weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` for x (..., in), weight (out, in)."""
    return torch.nn.functional.linear(x, weight, bias)
