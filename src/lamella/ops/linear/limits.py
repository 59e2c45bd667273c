"""Limits of the Triton kernel for products; does not import Triton."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 2
_LARGE = 1 << 25  # weight elements from which cuBLAS computes two rows
_MAX_INPUT = 1 << 14  # elements: the longest weight row that fits into a program's registers


def serves(x: Tensor, weight: Tensor) -> bool:
    """Return True if the Triton kernels of `linear` support x (T, in) and weight (out, in)."""
    rows, size = x.shape
    return (
        1 <= rows <= (MAX_ROWS if weight.numel() < _LARGE else 1)
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and size % 8 == 0
        and size <= _MAX_INPUT
        and x.stride(1) == 1
        and weight.is_contiguous()
    )
