"""Product with a weight matrix, alone or fused with the operations around it in a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable, use_fused
from lamella.ops.linear import reference
from lamella.ops.linear.limits import serves
from lamella.ops.opaque import operation
from lamella.ops.operands import ConvStep, ResidualNorm

_BLOCK = 256  # rows per call of the native kernel, see native.linear_rows
_SLICE = 16384  # rows of the weight that the portable path converts to fp32 at a time

_linear = BackendTable("linear", __name__)
_fused = BackendTable("fused_linear", __name__)
_fp32 = BackendTable("fp32_linear", __name__)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `x W^T + b`.

    For few rows, where reading the weight dominates, lamella's own kernels are used. On a CPU, torch.compile sees the
    product as one opaque operation, because its own code would read the weight more slowly.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (..., out) in the dtype of x.
    """
    if torch.compiler.is_compiling() and not x.is_cuda and not torch.is_grad_enabled():
        return torch.ops.lamella.linear(x, weight, bias)
    return _choose_linear(x, weight, bias)


def _choose_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear.choose(x, weight)(x, weight, bias)


def fuses(x: Tensor, weight: Tensor) -> bool:
    """Return True if `fused_linear` may be used for x (T, in)."""
    return use_fused(x) and _few_rows(x, weight)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
    norm: ResidualNorm | None = None,
    conv: ConvStep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute a product and the operations around it in one kernel; see `reference.fused_linear`.

    Call it only if `fuses` is True; this is not checked.

    Args:
        x: (T, in).
        weight: (out, in).
        bias: (out,), or None.
        gated: whether the product is [gate | up], and the result `silu(gate) * up`.
        norm: norm applied to x first, or None.
        conv: convolution applied to the product before the gate, or None.

    Returns:
        The result (T, out), or (T, out / 2) if gated; and the new residual (T, in), None without a norm.
    """
    return _triton_fused.run(x, weight, bias, gated, norm, conv)


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x W^T` in fp32; see `reference.fp32_linear`.

    The sums are not rounded, except under autograd, where they are rounded to the dtype of x first.

    Args:
        x: (..., in) of any float dtype.
        weight: (out, in) in the dtype of x.

    Returns:
        (..., out) fp32.
    """
    rows = x.reshape(-1, x.shape[-1])
    return _fp32.choose(rows, weight)(rows, weight).view(*x.shape[:-1], weight.shape[0])


def _few_rows(x: Tensor, weight: Tensor) -> bool:
    return x.dim() == 2 and serves(x, weight)


@_linear.lazy("triton", _few_rows)
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.linear import triton

    return triton.linear


@_linear.backend("native", lambda x, weight: x.dim() == 2 and 0 < x.shape[0] <= native.linear_rows(x.dtype, x.shape[1]))
def _native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return native.linear(x, weight, bias)


@_linear.backend("torch")
def _torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight, bias)


@_fused.lazy("triton", _few_rows)
def _triton_fused() -> Callable[..., tuple[Tensor, Tensor | None]]:
    from lamella.ops.linear import triton

    return triton.fused_linear


@_fp32.lazy("triton", _few_rows)
def _triton_fp32() -> Callable[..., Tensor]:
    from lamella.ops.linear import triton

    return triton.fp32_linear


@_fp32.backend("native", lambda x, weight: x.dtype != torch.float32 and x.shape[0] > 0)
def _native_fp32(x: Tensor, weight: Tensor) -> Tensor:
    # In blocks of rows for which the kernel is fast; the alternative would copy the whole weight.
    parts = [native.linear(part, weight, fp32_out=True) for part in x.split(_BLOCK)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@_fp32.backend("torch")
def _torch_fp32(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype == torch.float32 or not x.shape[0]:
        return linear(x, weight, None).float()
    if torch.is_grad_enabled():
        return torch.nn.functional.linear(x, weight).float()
    if x.is_cuda:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    # One slice of the weight at a time: an fp32 copy of the whole weight may not fit into memory.
    slices = [torch.nn.functional.linear(x.float(), part.float()) for part in weight.split(_SLICE)]
    return torch.cat(slices, dim=-1)


_linear.backend("reference")(reference.linear)
_fused.backend("reference")(reference.fused_linear)
_fp32.backend("reference")(reference.fp32_linear)


def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Fake (meta) kernel: output shape only."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_library = operation("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _choose_linear, _shape)
