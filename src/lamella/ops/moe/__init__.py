"""A mixture of experts: which of them each token goes to, and what they make of it."""

from __future__ import annotations

from torch import Tensor

from lamella.ops.backend import use_triton
from lamella.ops.moe import segments


def experts(x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None) -> Tensor:
    """See `reference.experts`."""
    if use_triton(x):
        from lamella.ops.moe import triton

        return triton.experts(x, logits, top_k, gate_up, down, base)
    return segments.experts(x, logits, top_k, gate_up, down, base)
