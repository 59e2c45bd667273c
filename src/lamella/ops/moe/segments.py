"""A mixture of experts by products of its own for each expert: tokens sorted by expert, a segment for each."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.linear import linear
from lamella.ops.moe.reference import route
from lamella.ops.swiglu import swiglu


def experts(x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None) -> Tensor:
    """See `reference.experts`. Rounds where a layer of plain projections does; waits for the device, if it is one."""
    ids, weights = route(logits, top_k)
    order = ids.flatten().argsort(stable=True)
    rows = (x[order // top_k].float() * weights.flatten()[order, None]).to(x.dtype)
    outputs = []
    counts = ids.flatten().bincount(minlength=gate_up.shape[0]).tolist()
    for expert, segment in enumerate(rows.split(counts)):
        if segment.shape[0]:
            outputs.append(linear(swiglu(linear(segment, gate_up[expert], None)), down[expert], None))
    # Back in the order of tokens, where a token's experts are added up in the order of their logits.
    total = torch.cat(outputs)[order.argsort()].unflatten(0, (-1, top_k)).float().sum(1)
    return (total if base is None else total + base.float()).to(x.dtype)
