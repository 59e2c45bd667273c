"""Mixture of experts in plain torch, token by token."""

from __future__ import annotations

import torch
from torch import Tensor


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Choose the experts with the largest logits.

    Args:
        logits: (T, E).
        top_k: experts per token.

    Returns:
        Expert ids (T, top_k) int64, and the weights (T, top_k) fp32 of the experts' inputs. A weight is the sigmoid of
        its own logit.
    """
    chosen, ids = logits.float().topk(top_k, dim=-1)
    return ids, chosen.sigmoid()


def experts(
    x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor, base: Tensor | None = None, first: int = 0
) -> Tensor:
    """Return `base + sum over a token's experts of expert_e(w_e x)`, in fp32, rounded once.

    `expert(z) = down(silu(gate(z)) * up(z))`. The L local experts are those from `first` on; other experts contribute
    zero. The arguments are those of `lamella.ops.moe.experts`.
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
