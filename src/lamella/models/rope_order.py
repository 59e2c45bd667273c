"""The two orders in which files hold the channels that RoPE rotates in pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_order(head_dim: int, rope_dim: int, to: str) -> Tensor:
    """Return the old channel of a head for each new one, (head_dim,) int64.

    Args:
        head_dim: channels of a head.
        rope_dim: the leading channels that are rotated; the others keep their place.
        to: "huggingface" for pairs (i, i + rope_dim / 2), "lingua" for adjacent ones.
    """
    halves = torch.arange(rope_dim).view(-1, 2).T.flatten()
    order = halves if to == "huggingface" else halves.argsort()
    return torch.cat((order, torch.arange(rope_dim, head_dim)))


def permute_heads(rows: Tensor, order: Tensor) -> Tensor:
    """Return `rows` (heads * D, ...) with the D rows of each head in a new order (D,)."""
    return rows.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)
