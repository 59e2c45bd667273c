"""Mixture of experts: routing, and the feed-forwards of the experts."""

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
    """Return `base` plus the weighted outputs of each token's experts; see `reference.experts`.

    torch.compile sees it as one opaque operation, because the computation depends on the routing.

    Args:
        x: (T, H).
        logits: (T, E) fp32, router logits over all experts.
        top_k: experts per token.
        gate_up: (L, 2 * I, H) of the L local experts, gates first.
        down: (L, H, I).
        base: (T, H) to add to the result, or None.
        first: index of the first local expert.

    Returns:
        (T, H) in the dtype of x.
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
