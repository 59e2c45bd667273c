"""A mixture of experts in plain torch, one token after the other."""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The experts (T, top_k) int64 of the largest of the logits (T, E), and the weights (T, top_k) fp32 of what enters.

    A weight is the sigmoid of its own logit, whatever the others are.
    """
    chosen, ids = logits.float().topk(top_k, dim=-1)
    return ids, chosen.sigmoid()


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """`base + sum over a token's experts of expert_e(w_e x)` with `expert(z) = down(silu(gate(z)) * up(z))`.

    x and base (T, H), logits (T, E) fp32, gate_up (L, 2 I, H) with the gates' rows first, down (L, H, I); returns
    (T, H). The L experts at hand are those from `first` on, and others count nothing. In fp32, rounded once. Nothing
    is changed in place.
    """
    ids, weights = route(logits, top_k)
    rows = []
    for token, row in enumerate(x.float()):
        total = torch.zeros_like(row) if base is None else base[token].float()
        for expert, weight in zip(ids[token] - first, weights[token], strict=True):
            if not 0 <= expert < len(gate_up):
                continue
            gate, up = (gate_up[expert].float() @ (weight * row)).chunk(2)
            total = total + down[expert].float() @ (torch.nn.functional.silu(gate) * up)
        rows.append(total)
    return torch.stack(rows).to(x.dtype)
