"""Causal attention over a ragged batch in plain torch, one request after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.ragged import RaggedBatch


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """One request: the last queries of a context. q (n, H, D); k and v (m, KV, D), m >= n; returns (n, H, D).

    Query head h reads key/value head `h // (H / KV)`; softmax and sums in fp32, rounded once.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (side.float().repeat_interleave(group, dim=1) for side in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    distance = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None] - torch.arange(k.shape[0])
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None) -> Tensor:
    """Every request sees its own new tokens only. q (T, H, D); k and v (T, KV, D); returns (T, H, D)."""
    parts = zip(*(side.split(batch.query_lens) for side in (q, k, v)), strict=True)
    return torch.cat([attend(queries, keys, values, scale, window) for queries, keys, values in parts])


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
) -> Tensor:
    """Every request sees its whole context, which lies in pages; the new tokens' rows have been written already.

    q (T, H, D); caches (pages, page_size, KV, D); page_table (R, P) int32, where the token at position p lies in row
    `p % page_size` of page `page_table[r, p // page_size]`. Entries of pages that no query sees may be anything.
    """
    page_size = k_cache.shape[1]
    outputs = []
    for request, queries in enumerate(q.split(batch.query_lens)):
        length = batch.context_lens[request]
        start = 0 if window is None else max(0, length - queries.shape[0] - window + 1)
        positions = torch.arange(start, length, device=q.device)
        pages, rows = page_table[request, positions // page_size].long(), positions % page_size
        outputs.append(attend(queries, k_cache[pages, rows], v_cache[pages, rows], scale, window))
    return torch.cat(outputs)
