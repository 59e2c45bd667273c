"""A mixture of experts by products of its own for each expert: tokens sorted by expert, a segment for each."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.linear import linear
from lamella.ops.moe.reference import route
from lamella.ops.swiglu import swiglu


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """See `reference.experts`. Rounds where a layer of plain projections does; waits for the device, if it is one."""
    ids, weights = route(logits, top_k)
    order = ids.flatten().argsort(stable=True)
    counts = ids.flatten().bincount(minlength=logits.shape[1]).tolist()
    start = sum(counts[:first])
    ours = counts[first : first + gate_up.shape[0]]
    order = order[start : start + sum(ours)]
    rows = (x[order // top_k].float() * weights.flatten()[order, None]).to(x.dtype)
    outputs = [x.new_zeros(0, x.shape[1])]
    for expert, segment in enumerate(rows.split(ours)):
        if segment.shape[0]:
            outputs.append(linear(swiglu(linear(segment, gate_up[expert], None)), down[expert], None))
    # Back in the order of tokens, where a token's experts are added up in the order of their logits.
    parts = x.new_zeros(ids.numel(), x.shape[1]).index_copy(0, order, torch.cat(outputs))
    total = parts.unflatten(0, (-1, top_k)).float().sum(1)
    return (total if base is None else total + base.float()).to(x.dtype)
