"""Rotary position embedding, and the temperature of queries, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import Rope


def rotate_heads(q: Tensor, k: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
    """Return `rotate` of queries (T, H, D) and of keys (T, KV, D)."""
    return rotate(q, rope), rotate(k, rope)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Return x with the first 2 P channels of each head rotated, in fp32, rounded once; the others as they are.

    x is (T, heads, D) with D >= 2 P.
    """
    (cos, sin, interleaved), pairs = rope, rope.cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].float(), x[..., 2 * pairs :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    halves = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.stack(halves, dim=-1).flatten(-2) if interleaved else torch.cat(halves, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """`magnitude` times cos and sin (T, P) fp32 of positions (T,) int64 times frequencies (P,) fp32.

    With a `period`, of the positions modulo it, whose angles are as exact at a million as at the start.
    """
    if period is not None:
        positions = positions % period
    turns = positions.float()[:, None] * frequencies
    return turns.cos() * magnitude, turns.sin() * magnitude


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """What queries are multiplied by at positions p (T,): `1 + scale log(1 + floor((p + 1) / floor_scale))`, fp32."""
    return torch.log1p(((positions + 1) // floor_scale).float()) * scale + 1.0
