"""Channel orders of RoPE pairs in checkpoints: adjacent channels, or the two halves of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_order(head_dim: int, rope_dim: int, to: str) -> Tensor:
    """Return the permutation that converts a head to another channel order.

    Args:
        head_dim: channels of a head.
        rope_dim: number of leading channels that are rotated; the other channels are not moved.
        to: "huggingface" for pairs (i, i + rope_dim / 2), "lingua" for pairs (2i, 2i + 1).

    Returns:
        (head_dim,) int64, the old channel at each new index.
    """
    halves = torch.arange(rope_dim).view(-1, 2).T.flatten()
    order = halves if to == "huggingface" else halves.argsort()
    return torch.cat((order, torch.arange(rope_dim, head_dim)))


def permute_heads(rows: Tensor, order: Tensor) -> Tensor:
    """Return `rows` (heads * D, ...) with the D rows of each head permuted by `order` (D,)."""
    return rows.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
