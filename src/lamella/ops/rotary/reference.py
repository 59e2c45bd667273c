"""Rotary position embedding and the temperature of queries in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import Rope


def rotate_heads(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Rotate queries (T, H, D) and keys (T, KV, D)."""
    return rotate(q, rope), rotate(k, rope)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the first 2 * P channels of each head of x (T, heads, D) in fp32, rounded once; copy the others."""
    (cos, sin, interleaved), pairs = rope, rope.cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    else:
        first, second = rotated[..., :pairs], rotated[..., pairs:]
    halves = (first * cos - second * sin, second * cos + first * sin)
    rotated = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return `magnitude` times cos and sin (T, P) fp32 of positions (T,) int64 times frequencies (P,) fp32.

    With a `period`, positions are taken modulo it, so that large positions do not lose precision.
    """
    if period is not None:
        positions = positions % period
    radians = positions.float()[:, None] * frequencies
    return radians.cos() * magnitude, radians.sin() * magnitude


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """Return `1 + scale * log(1 + floor((p + 1) / floor_scale))` (T,) fp32 for positions p (T,)."""
    return torch.log1p(((positions + 1) // floor_scale).float()) * scale + 1.0
