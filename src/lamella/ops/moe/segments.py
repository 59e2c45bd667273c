"""Mixture of experts by separate products for each expert, over tokens sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.linear import linear
from lamella.ops.moe.reference import route
from lamella.ops.swiglu import swiglu


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """Compute `reference.experts`, rounded after each product; waits for the device if x is not on a CPU."""
    ids, weights = route(logits, top_k)
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=logits.shape[1]).tolist()
    start = sum(counts[:first])
    local_counts = counts[first : first + gate_up.shape[0]]
    order = order[start : start + sum(local_counts)]
    rows = (x[order // top_k].float() * weights.flatten()[order, None]).to(x.dtype)
    outputs = [x.new_zeros(0, x.shape[1])]
    for expert, segment in enumerate(rows.split(local_counts)):
        if segment.shape[0]:
            outputs.append(linear(swiglu(linear(segment, gate_up[expert], None)), down[expert], None))
    # Restore the order of tokens, and sum each token's experts in the order of their logits.
    parts = x.new_zeros(ids.numel(), x.shape[1]).index_copy(0, order, torch.cat(outputs))
    total = parts.unflatten(0, (-1, top_k)).float().sum(1)
    return (total if base is None else total + base.float()).to(x.dtype)
