"""The product with a weight matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native

_BLOCK = 256  # rows that the native kernel takes at a time, see native.linear_rows
_SLICE = 16384  # rows of the weight that the portable path widens at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, see `reference.linear`. Few rows, where reading the weight is all the work, go to our own kernel."""
    if x.dim() == 2 and use_native(x) and 0 < x.shape[0] <= native.linear_rows(x.dtype, x.shape[1]):
        return native.linear(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x W^T` in fp32 for x (..., in) of any float dtype, see `reference.wide_linear`.

    The sums stay unrounded, except under autograd, where they are rounded to the dtype of x before they become fp32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if x.dtype == torch.float32 or not rows.shape[0]:
        wide = linear(rows, weight, None).float()
    elif use_native(x):
        # In blocks of what the kernel is fast for: the alternative is a copy of the whole weight.
        parts = [native.linear(part, weight, wide=True) for part in rows.split(_BLOCK)]
        wide = parts[0] if len(parts) == 1 else torch.cat(parts)
    elif torch.is_grad_enabled():
        wide = torch.nn.functional.linear(rows, weight).float()
    elif x.is_cuda:
        wide = torch.mm(rows, weight.T, out_dtype=torch.float32)
    else:
        # A slice of the weight at a time: a whole copy in fp32 may not fit.
        slices = [torch.nn.functional.linear(rows.float(), part.float()) for part in weight.split(_SLICE)]
        wide = torch.cat(slices, dim=-1)
    return wide.view(*x.shape[:-1], weight.shape[0])
