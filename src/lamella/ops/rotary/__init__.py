"""What queries and keys are told of their positions: the rotation, and the temperature of queries."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.rotary import reference


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both of q (T, H, D) and k (T, KV, D) turned, as new tensors; see `reference.rotate`."""
    if use_native(q):
        return native.rotary(q, k, cos, sin, interleaved)
    return reference.rotate(q, cos, sin, interleaved), reference.rotate(k, cos, sin, interleaved)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """See `reference.angles`."""
    if use_triton(positions):
        from lamella.ops.rotary import triton

        return triton.angles(positions, frequencies, magnitude, period)
    return reference.angles(positions, frequencies, magnitude, period)


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """See `reference.temperature`."""
    if use_triton(positions):
        from lamella.ops.rotary import triton

        return triton.temperature(positions, scale, floor_scale)
    return reference.temperature(positions, scale, floor_scale)
