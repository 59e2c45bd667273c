"""Rotary position embedding (RoPE) of queries and keys, its cos and sin, and the temperature of queries.

torch.compile sees cos/sin and temperatures as opaque operations. They are computed once per step; the compiler would
recompute sines and logarithms in each layer and for each head, which takes longer than the rotation itself.
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
    """Rotate queries and keys; see `reference.rotate_heads`.

    Args:
        q: (T, H, D).
        k: (T, KV, D).
        rope: cos and sin of the tokens.

    Returns:
        New q and k.
    """
    return _rotate.choose(q)(q, k, rope)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of positions times frequencies; see `reference.angles`.

    Args:
        positions: (T,) int64.
        frequencies: (P,) fp32.
        magnitude: factor of cos and sin.
        period: positions are taken modulo this number; None for absolute positions.

    Returns:
        cos and sin, (T, P) fp32 each.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lamella.angles(positions, frequencies, magnitude, period)
    return _choose_angles(positions, frequencies, magnitude, period)


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """Return the position-dependent factors of queries; see `reference.temperature`.

    Args:
        positions: (T,) int64.
        scale: factor of the logarithm.
        floor_scale: positions per step of the factor.

    Returns:
        (T,) fp32.
    """
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
