"""RMS norm, alone or after adding the residual stream."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.operands import ResidualNorm
from lamella.ops.rms_norm import reference

MAX_WIDTH = 16384  # limit of the Triton kernel, whose programs hold whole rows

_norm = BackendTable("rms_norm", __name__)
_add_norm = BackendTable("add_rms_norm", __name__)


def rms_norm(x: Tensor, weight: Tensor, eps: float, twice: bool = False) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, see `reference.rms_norm`.

    Args:
        x: (..., N).
        weight: (N,) fp32.
        eps: added to the mean square.
        twice: whether to round before the multiplication by the weight too.

    Returns:
        A new tensor of the shape and dtype of x.
    """
    return _norm.choose(x, twice)(x, weight, eps, twice)


def add_rms_norm(x: Tensor, norm: ResidualNorm, twice: bool = False) -> tuple[Tensor, Tensor]:
    """Return the RMS norm of x + `norm.residual`, and the sum.

    Args:
        x: (T, N).
        norm: residual, weight and epsilon.
        twice: whether to round before the multiplication by the weight too.

    Returns:
        The norm and the sum, (T, N) each, in the dtype of x.
    """
    return _add_norm.choose(x, twice)(x, norm, twice)


def _fits(x: Tensor, twice: bool) -> bool:
    return x.shape[-1] <= MAX_WIDTH


def _rounds_once(x: Tensor, twice: bool) -> bool:
    return not twice


@_norm.lazy("triton", _fits)
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.rms_norm import triton

    return triton.rms_norm


@_norm.backend("native", _rounds_once)
def _native(x: Tensor, weight: Tensor, eps: float, twice: bool = False) -> Tensor:
    return native.rms_norm(x, weight, eps)


@_add_norm.lazy("triton", _fits)
def _triton_add() -> Callable[..., tuple[Tensor, Tensor]]:
    from lamella.ops.rms_norm import triton

    return triton.add_rms_norm


@_add_norm.backend("native", _rounds_once)
def _native_add(x: Tensor, norm: ResidualNorm, twice: bool = False) -> tuple[Tensor, Tensor]:
    return native.add_rms_norm(x, *norm)


_norm.backend("reference")(reference.rms_norm)
_add_norm.backend("reference")(reference.add_rms_norm)
