"""The product with a weight matrix."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_fused, use_native, use_triton
from lamella.ops.opaque import operation
from lamella.ops.rms_norm.reference import NormStep
from lamella.ops.short_conv.reference import ConvStep

_BLOCK = 256  # rows that the native kernel takes at a time, see native.linear_rows
_SLICE = 16384  # rows of the weight that the portable path widens at a time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b`, see `reference.linear`. Few rows, where reading the weight is all the work, go to our own kernel.

    On a CPU it is one opaque operation to torch.compile, which would not read weights as fast.
    """
    if torch.compiler.is_compiling() and not x.is_cuda and not torch.is_grad_enabled():
        return torch.ops.lamella.linear(x, weight, bias)
    return _linear(x, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dim() == 2 and use_native(x) and 0 < x.shape[0] <= native.linear_rows(x.dtype, x.shape[1]):
        return native.linear(x, weight, bias)
    if (kernels := _kernels(x, weight)) is not None:
        return kernels.linear(x, weight, bias)[0]
    return torch.nn.functional.linear(x, weight, bias)


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether `fused_linear` has a kernel for x (T, in), and is allowed to use it."""
    return use_fused(x) and _kernels(x, weight) is not None


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gated: bool = False,
    norm: NormStep | None = None,
    conv: ConvStep | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A product with what stands around it in a block, in one kernel where it `fuses`; see `triton.linear`."""
    from lamella.ops.linear import triton

    return triton.linear(x, weight, bias, gated=gated, norm=norm, conv=conv, positions=positions)


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
    elif (kernels := _kernels(rows, weight)) is not None:
        wide = kernels.linear(rows, weight, None, wide=True)[0]
    elif x.is_cuda:
        wide = torch.mm(rows, weight.T, out_dtype=torch.float32)
    else:
        # A slice of the weight at a time: a whole copy in fp32 may not fit.
        slices = [torch.nn.functional.linear(rows.float(), part.float()) for part in weight.split(_SLICE)]
        wide = torch.cat(slices, dim=-1)
    return wide.view(*x.shape[:-1], weight.shape[0])


def _kernels(x: Tensor, weight: Tensor) -> ModuleType | None:
    """Our Triton kernels, where they serve this product."""
    if x.dim() != 2 or not use_triton(x):
        return None
    from lamella.ops.linear import triton

    return triton if triton.serves(x, weight) else None


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the operation makes of tensors without data."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = operation("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _linear, _shape)
