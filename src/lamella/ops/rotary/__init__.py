"""Rotary position embedding of queries and keys, its angles, and the temperature of queries.

Angles and temperatures are opaque operations to torch.compile. They belong to the step, and the compiler would compute
sines and logarithms again in each layer and for each head, which takes longer than the rotation itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.opaque import operation
from lamella.ops.operands import Rope
from lamella.ops.rotary import reference

_rotate = BackendTable("rotate", __name__)
_angles = BackendTable("angles", __name__)
_temperature = BackendTable("temperature", __name__)


def rotate(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return q (T, H, D) and k (T, KV, D) rotated, as new tensors; see `reference.rotate_heads`."""
    return _rotate.choose(q)(q, k, rope)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin (T, P) fp32 of positions (T,) int64 times frequencies (P,) fp32; see `reference.angles`."""
    if torch.compiler.is_compiling():
        return torch.ops.lamella.angles(positions, frequencies, magnitude, period)
    return _choose_angles(positions, frequencies, magnitude, period)


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """Return the factors (T,) fp32 of queries at positions (T,) int64; see `reference.temperature`."""
    if torch.compiler.is_compiling():
        return torch.ops.lamella.temperature(positions, scale, floor_scale)
    return _choose_temperature(positions, scale, floor_scale)


def _choose_angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None
) -> tuple[Tensor, Tensor]:
    return _angles.choose(positions)(positions, frequencies, magnitude, period)


def _choose_temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    return _temperature.choose(positions)(positions, scale, floor_scale)


@_rotate.backend("native")
def _native_rotate(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    return native.rotary(q, k, *rope)


@_angles.lazy("triton")
def _triton_angles() -> Callable[..., tuple[Tensor, Tensor]]:
    from lamella.ops.rotary import triton

    return triton.angles


@_temperature.lazy("triton")
def _triton_temperature() -> Callable[..., Tensor]:
    from lamella.ops.rotary import triton

    return triton.temperature


_rotate.backend("reference")(reference.rotate_heads)
_angles.backend("reference")(reference.angles)
_temperature.backend("reference")(reference.temperature)


def _shapes_of_angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None
) -> tuple[Tensor, Tensor]:
    cos, sin = (frequencies.new_empty(positions.shape[0], frequencies.shape[0]) for _ in range(2))
    return cos, sin


def _shape_of_temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    return positions.new_empty(positions.shape, dtype=torch.float32)


_libraries = (
    operation(
        "angles(Tensor positions, Tensor frequencies, float magnitude, int? period) -> (Tensor, Tensor)",
        _choose_angles,
        _shapes_of_angles,
    ),
    operation(
        "temperature(Tensor positions, float scale, int floor_scale) -> Tensor",
        _choose_temperature,
        _shape_of_temperature,
    ),
)
