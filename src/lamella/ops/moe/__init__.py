"""A mixture of experts: routing, and the experts' feed-forwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.ops.backend import BackendTable
from lamella.ops.moe import reference, segments
from lamella.ops.opaque import operation

_table = BackendTable("experts", __name__)


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """Return `base` plus what each token's experts compute of it; see `reference.experts`.

    To torch.compile it is one opaque operation: what is computed depends on the routing.

    Args:
        x: (T, H).
        logits: (T, E) fp32, of the router.
        top_k: experts of a token.
        gate_up: (L, 2 I, H), of the L experts at hand, gates first.
        down: (L, H, I).
        base: (T, H), or None.
        first: the first of the experts at hand.
    """
    if torch.compiler.is_compiling():
        return torch.ops.lamella.experts(x, logits, top_k, gate_up, down, base, first)
    return _experts(x, logits, top_k, gate_up, down, base, first)


def _experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None, first: int
) -> Tensor:
    return _table.choose(x)(x, logits, top_k, gate_up, down, base, first)


@_table.lazy("triton")
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.moe import triton

    return triton.experts


_table.backend("torch")(segments.experts)
_table.backend("reference")(reference.experts)


def _shape(x: Tensor, *_: object) -> Tensor:
    """Fake (meta) kernel: output shape only."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_library = operation(
    "experts(Tensor x, Tensor logits, int top_k, Tensor gate_up, Tensor down, Tensor? base, int first) -> Tensor",
    _experts,
    _shape,
)
