"""What queries and keys are told of their positions: the rotation, and the temperature of queries.

Angles and temperatures are opaque operations to torch.compile: they are a step's, and it would compute sines and
logarithms anew in each layer and for each head, in longer than it takes to turn queries and keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.opaque import operation
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
    if torch.compiler.is_compiling():
        return torch.ops.lamella.angles(positions, frequencies, magnitude, period)
    return _angles(positions, frequencies, magnitude, period)


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """See `reference.temperature`."""
    if torch.compiler.is_compiling():
        return torch.ops.lamella.temperature(positions, scale, floor_scale)
    return _temperature(positions, scale, floor_scale)


def _angles(positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None) -> tuple[Tensor, Tensor]:
    if use_triton(positions):
        from lamella.ops.rotary import triton

        return triton.angles(positions, frequencies, magnitude, period)
    return reference.angles(positions, frequencies, magnitude, period)


def _temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    if use_triton(positions):
        from lamella.ops.rotary import triton

        return triton.temperature(positions, scale, floor_scale)
    return reference.temperature(positions, scale, floor_scale)


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
        _angles,
        _shapes_of_angles,
    ),
    operation(
        "temperature(Tensor positions, float scale, int floor_scale) -> Tensor", _temperature, _shape_of_temperature
    ),
)
