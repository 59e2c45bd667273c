"""Attention through torch's `scaled_dot_product_attention`, which runs on every device."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lamella.ops.attention.chunks import pieces
from lamella.ops.operands import PagedCache
from lamella.ops.ragged import RaggedBatch


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
) -> Tensor:
    """Compute `reference.causal_attention`; requests (or chunks) of equal length share one call."""
    lengths = batch.query_lens
    if chunk is not None:
        lengths = tuple(piece.new for piece in pieces(lengths, lengths, chunk))
    if len(set(lengths)) == 1:
        q, k, v = (side.unflatten(0, (len(lengths), lengths[0])) for side in (q, k, v))
        return _attend(q, k, v, scale, window).flatten(0, 1)
    parts = zip(*(side[None].split(lengths, dim=1) for side in (q, k, v)), strict=True)
    return torch.cat([_attend(queries, keys, values, scale, window)[0] for queries, keys, values in parts])


def paged_attention(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    plan: object = None,
) -> Tensor:
    """Compute `reference.paged_attention`; all decodes share one call, and so do prefills of equal shape."""
    outputs = []
    decodes = batch.num_decodes
    if decodes:
        outputs.append(_decode(q[:decodes], cache, batch, scale, window, chunk))
    outputs += prefill_attention(q, cache, batch, scale, window, chunk)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def prefill_attention(
    q: Tensor, cache: PagedCache, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
) -> list[Tensor]:
    """Return the outputs of the requests after the decodes. Adjacent requests or chunks of equal shape share a call."""
    decodes = batch.num_decodes
    query_lens, context_lens = batch.query_lens[decodes:], batch.context_lens[decodes:]
    # Without chunks, each request is one piece.
    segments = pieces(query_lens, context_lens, chunk or max(context_lens, default=1))
    outputs = []
    start = decodes
    for (new, chunk_start, length), run in groupby(segments, key=lambda piece: piece[1:]):
        requests = [
            decodes + piece.request for piece in run
        ]  # adjacent, because two chunks of one request differ in `first`
        table, count = cache.block_table[requests[0] : requests[-1] + 1], len(requests)
        first = chunk_start if window is None else max(0, length - new - window + 1)
        positions = torch.arange(first, chunk_start + length, device=q.device).expand(count, -1)
        rows = _cache_rows(table, positions, cache.k.shape[1])
        k, v = (side.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape) for side in cache[:2])
        queries = q[start : start + count * new].unflatten(0, (count, new))
        outputs.append(_attend(queries, k, v, scale, window).flatten(0, 1))
        start += count * new
    return outputs


def _cache_rows(block_table: Tensor, positions: Tensor, block_size: int) -> Tensor:
    """Return the flat cache rows of positions (..., L) through block tables (..., B)."""
    return block_table.gather(-1, positions // block_size).long() * block_size + positions % block_size


def _decode(
    q: Tensor, cache: PagedCache, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None
) -> Tensor:
    """Compute the attention of one query per request, q (R, H, D), over contexts gathered to equal length."""
    num_requests, heads, dim = q.shape
    kv_heads, block_table = cache.k.shape[2], cache.block_table[: q.shape[0]]
    lengths = batch.context_lens[:num_requests]
    last = batch.seq_lens[:num_requests, None].long() - 1
    seen, behind = max(lengths), last  # maximum number of keys, and the keys of each request before its newest
    if window is not None:
        seen = min(seen, window)
    if chunk is not None:
        seen, behind = max((length - 1) % chunk + 1 for length in lengths), last % chunk
    # Positions are counted back from the newest token. A shorter request repeats its oldest row, which the mask hides,
    # so that only the request's own rows are read.
    back = torch.arange(seen, device=q.device)
    rows = _cache_rows(block_table, last - torch.minimum(back, behind), cache.k.shape[1])
    k, v = (
        side.flatten(0, 1).index_select(0, rows.flatten()).view(num_requests, seen, kv_heads, dim).transpose(1, 2)
        for side in cache[:2]
    )
    mask = (back <= behind)[:, None, None, :]
    # The query heads of a group share their keys. As rows of one matrix, they read the keys once.
    grouped = q.view(num_requests, kv_heads, heads // kv_heads, dim)
    return scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(num_requests, heads, dim)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Return the attention (B, n, H, D) of q (B, n, H, D) over k and v (B, m, KV, D), m >= n."""
    new, length = q.shape[1], k.shape[1]
    mask = None
    if new != length or window is not None:
        distance = torch.arange(length - new, length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        mask = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    q, k, v = (side.transpose(1, 2) for side in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
