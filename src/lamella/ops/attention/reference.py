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
    """Compute the attention of the last n queries of one request, in fp32, rounded once.

    Query head h reads key/value head `h // (H / KV)`.

    Args:
        q: (n, H, D).
        k: (m, KV, D), m >= n.
        v: (m, KV, D).
        scale: factor of the scores.
        window: number of latest keys that a query sees, including its own; None for all.
        chunk: a query sees the keys from the last multiple of this number up to its own position; None for all.
        first: position of the first key.

    Returns:
        (n, H, D) in the dtype of q.
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
    """Compute the attention of every request over its new tokens only: q (T, H, D), k and v (T, KV, D) -> (T, H, D)."""
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
    """Compute the attention of q (T, H, D) over each request's whole context in the cache; return (T, H, D).

    The keys and values of the new tokens must be in the cache already. `plan` is unused.
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
    """Compute `prepare_qkv` and then `paged_attention`, for one new token of each request."""
    return paged_attention(prepare_qkv(qkv, steps, cache)[0], cache, batch, scale, window, chunk)
