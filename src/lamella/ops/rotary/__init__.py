"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native
from lamella.ops.rotary import reference


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Both of q (T, H, D) and k (T, KV, D) turned, as new tensors; see `reference.rotate`."""
    if use_native(q):
        return native.rotary(q, k, cos, sin, interleaved)
    return reference.rotate(q, cos, sin, interleaved), reference.rotate(k, cos, sin, interleaved)


def angles(positions: Tensor, frequencies: Tensor, magnitude: float) -> tuple[Tensor, Tensor]:
    """`magnitude` times cos and sin (T, P) fp32 of positions (T,) int64 times frequencies (P,) fp32, on a GPU."""
    from lamella.ops.rotary import triton

    return triton.angles(positions, frequencies, magnitude)
