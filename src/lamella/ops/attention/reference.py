"""Causal attention over a ragged batch in plain torch, one request after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import PagedCache, QKVSteps
from lamella.ops.qkv.reference import prepare_qkv
from lamella.ops.ragged import RaggedBatch


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, chunk: int | None = None, first: int = 0
) -> Tensor:
    """Attention of one request's last queries: q (n, H, D); k and v (m, KV, D), m >= n; returns (n, H, D).

    `first` is the position of the first key. With a `window` of w a query sees the last w keys up to its own, with a
    `chunk` of c those from the last position on that is a multiple of c. Query head h reads key/value head
    `h // (H / KV)`; softmax and sums in fp32, rounded once.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (side.float().repeat_interleave(group, dim=1) for side in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    keys = torch.arange(first, first + k.shape[0])
    queries = keys[k.shape[0] - q.shape[0] :, None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    if chunk is not None:
        hidden |= keys < queries // chunk * chunk
    scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(q.dtype)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
) -> Tensor:
    """Every request sees its own new tokens only. q (T, H, D); k and v (T, KV, D); returns (T, H, D)."""
    parts = zip(*(side.split(batch.query_lens) for side in (q, k, v)), strict=True)
    return torch.cat([attend(queries, keys, values, scale, window, chunk) for queries, keys, values in parts])


def paged_attention(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    plan: object = None,
) -> Tensor:
    """Every request sees its whole context, which lies in blocks; the new tokens' rows have been written already.

    q (T, H, D); returns (T, H, D). A `plan` changes no result.
    """
    block_size = cache.k.shape[1]
    outputs = []
    for request, queries in enumerate(q.split(batch.query_lens)):
        length = batch.context_lens[request]
        position = length - queries.shape[0]
        start = 0 if window is None else max(0, position - window + 1)
        if chunk is not None:
            start = position // chunk * chunk
        positions = torch.arange(start, length, device=q.device)
        blocks, rows = cache.block_table[request, positions // block_size].long(), positions % block_size
        outputs.append(attend(queries, cache.k[blocks, rows], cache.v[blocks, rows], scale, window, chunk, start))
    return torch.cat(outputs)


def write_kv(k: Tensor, v: Tensor, cache: PagedCache) -> None:
    """Write k and v (T, KV, D) to the rows `cache.slot_mapping` of the cache, in place."""
    cache.k.flatten(0, 1).index_copy_(0, cache.slot_mapping, k)
    cache.v.flatten(0, 1).index_copy_(0, cache.slot_mapping, v)


def decode_prepared(
    qkv: Tensor, steps: QKVSteps, cache: PagedCache, batch: RaggedBatch, scale: float, window: int | None,
    chunk: int | None, plan: object,
) -> Tensor:  # fmt: skip
    """Return `paged_attention` of the queries that `prepare_qkv` makes of qkv, for one new token of each request."""
    return paged_attention(prepare_qkv(qkv, steps, cache)[0], cache, batch, scale, window, chunk)
