"""A mixture of experts: which of them each token goes to, and what they make of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.backend import use_triton
from lamella.ops.moe import segments
from lamella.ops.opaque import operation


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """See `reference.experts`. To torch.compile it is one opaque operation: what is computed depends on the routing."""
    if torch.compiler.is_compiling():
        return torch.ops.lamella.experts(x, logits, top_k, gate_up, down, base, first)
    return _experts(x, logits, top_k, gate_up, down, base, first)


def _experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None, first: int
) -> Tensor:
    if use_triton(x):
        from lamella.ops.moe import triton

        return triton.experts(x, logits, top_k, gate_up, down, base, first)
    return segments.experts(x, logits, top_k, gate_up, down, base, first)


def _shape(x: Tensor, *_: object) -> Tensor:
    """What the operation makes of tensors without data."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library = operation(
    "experts(Tensor x, Tensor logits, int top_k, Tensor gate_up, Tensor down, Tensor? base, int first) -> Tensor",
    _experts,
    _shape,
)
