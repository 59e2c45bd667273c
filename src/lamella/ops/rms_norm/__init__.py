"""RMS normalisation, alone or after adding the residual stream."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.rms_norm import reference

_MAX_WIDTH = 16384  # of a row that one program of our Triton kernel holds


def rms_norm(x: Tensor, weight: Tensor, eps: float, where: Tensor | None = None, twice: bool = False) -> Tensor:
    """See `reference.rms_norm`."""
    if where is not None:
        return reference.rms_norm(x, weight, eps, where, twice)
    if use_native(x) and not twice:
        return native.add_rms_norm(x, None, weight, eps)[0]
    if use_triton(x) and x.shape[-1] <= _MAX_WIDTH:
        from lamella.ops.rms_norm import triton

        return triton.rms_norm(x, weight, eps, twice)
    return reference.rms_norm(x, weight, eps, twice=twice)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, twice: bool = False) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    if use_native(x) and not twice:
        normed, total = native.add_rms_norm(x, residual, weight, eps)
        assert total is not None
        return normed, total
    if use_triton(x) and x.shape[-1] <= _MAX_WIDTH:
        from lamella.ops.rms_norm import triton

        return triton.add_rms_norm(x, residual, weight, eps, twice=twice)
    return reference.add_rms_norm(x, residual, weight, eps, twice)
