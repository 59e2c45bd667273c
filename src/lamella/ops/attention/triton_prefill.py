"""Prefill attention in Triton: many new tokens per request, over a paged KV cache or over the new tokens only.

A program processes some adjacent tokens and all query heads of one key/value head, as rows of one matrix, and iterates
over the keys that any row sees. It evaluates the mask only in tiles at the edges of the visible range.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.attention.triton import LOG2_E, padded_dim
from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor


class Settings(NamedTuple):
    """Launch settings of the kernel; they affect speed, and results only by rounding."""

    rows: int  # per program: tokens times query heads of a group; a power of two >= 16
    tile: int  # keys per iteration, a power of two >= 16
    num_warps: int
    num_stages: int


# By head_dim, padded to a power of two, and bytes per element.
_SETTINGS = {
    (16, 2): Settings(128, 64, 4, 3),
    (32, 2): Settings(128, 64, 4, 3),
    (64, 2): Settings(128, 64, 8, 5),
    (128, 2): Settings(128, 64, 8, 5),
    (256, 2): Settings(64, 64, 8, 3),
    (16, 4): Settings(64, 32, 4, 2),
    (32, 4): Settings(64, 32, 4, 2),
    (64, 4): Settings(64, 32, 8, 2),
    (128, 4): Settings(32, 16, 8, 2),
    (256, 4): Settings(16, 16, 8, 1),
}


def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    *,
    out: Tensor | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """Compute `reference.paged_attention`: q (T, H, D) -> (T, H, D), written to `out` if given.

    Request r has the queries query_start_loc[r] to query_start_loc[r + 1], at most `max_query_len`, possibly none. They
    are the last of its seq_lens[r] tokens. query_start_loc (R + 1,) and seq_lens (R,) are int32. Rows of queries that
    belong to no request are not written.
    """
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1
    assert seq_lens.dtype == torch.int32 and seq_lens.is_contiguous()
    assert k_cache.shape[1] & (k_cache.shape[1] - 1) == 0
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _launch(
        q, k_cache, v_cache, block_table, query_start_loc, seq_lens, max_query_len, scale, window, chunk, settings, out
    )
    return out


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    *,
    settings: Settings | None = None,
) -> Tensor:
    """Compute `reference.causal_attention`: q (T, H, D), k and v (T, KV, D), rows of any stride -> (T, H, D)."""
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _launch(q, k[:, None], v[:, None], None, query_start_loc, None, max_query_len, scale, window, chunk, settings, out)
    return out


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor | None,
    query_start_loc: Tensor,
    seq_lens: Tensor | None,
    max_query_len: int,
    scale: float,
    window: int | None,
    chunk: int | None,
    settings: Settings | None,
    out: Tensor,
) -> None:
    """Launch over k and v (blocks, block_size, KV, D); without a table, each block is one token in the order of q."""
    _, heads, dim = q.shape
    kv_heads = k.shape[2]
    assert q.stride(2) == 1 and q.stride(1) == dim and k.stride(3) == 1
    assert k.stride() == v.stride() and q.dtype == k.dtype == v.dtype and scale > 0
    assert query_start_loc.dtype == torch.int32 and query_start_loc.is_contiguous()
    group, padded = heads // kv_heads, padded_dim(dim)
    settings = settings or _SETTINGS[padded, q.itemsize]
    rows = max(settings.rows, next_power_of_2(group))
    assert out.is_contiguous() and out.shape == q.shape
    _kernel[(cdiv(max_query_len, rows // group), kv_heads, query_start_loc.shape[0] - 1)](
        q, q.stride(0), k, v, k.stride(0), k.stride(1), k.stride(2),
        block_table, 0 if block_table is None else block_table.stride(0), query_start_loc, seq_lens, out,
        scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_SIZE=k.shape[1], PADDED=padded, WINDOW=window or 0,
        CHUNK=chunk or 0, ROWS=rows, TILE=settings.tile, num_warps=settings.num_warps, num_stages=settings.num_stages,
        **dependent_launch(q),
    )  # fmt: skip


@triton.jit
def _kernel(
    q_ptr, q_stride, k_ptr, v_ptr, block_stride, row_stride, head_stride, table_ptr, table_stride,
    starts_ptr, lengths_ptr, out_ptr, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = ROWS // GROUP
    first_token = (tl.num_programs(0) - 1 - tl.program_id(0)) * TOKENS  # the last tokens have most keys and start first
    kv_head = tl.program_id(1)
    request = tl.program_id(2)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    wait_for_predecessor(PDL)
    start = tl.load(starts_ptr + request)
    count = tl.load(starts_ptr + request + 1) - start
    if first_token >= count:
        return
    if table_ptr is not None:
        context = tl.load(lengths_ptr + request) - count
        table_ptr += request.to(tl.int64) * table_stride
        first_block = 0
    else:
        context = 0
        first_block = start
    tokens = first_token + rows // GROUP
    mask = ((tokens < count) & (rows < TOKENS * GROUP))[:, None] & (dims < DIM)[None, :]
    heads = kv_head * GROUP + rows % GROUP
    q = tl.load(
        q_ptr + (start + tokens).to(tl.int64)[:, None] * q_stride + heads[:, None] * DIM + dims[None, :],
        mask=mask, other=0.0,
    )  # fmt: skip

    # Some row sees tokens `begin` to `end` - 1; all rows see tokens `all_from` to `all_to` - 1.
    positions = context + tokens
    begin = 0
    end = context + tl.minimum(first_token + TOKENS, count)
    all_from = 0
    if WINDOW > 0:
        begin = tl.maximum(0, context + first_token - (WINDOW - 1))
        all_from = tl.maximum(0, end - WINDOW)
    if CHUNK > 0:
        begin = (context + first_token) // CHUNK * CHUNK
        all_from = (end - 1) // CHUNK * CHUNK
    all_to = context + first_token + 1
    # Tiles start at multiples of TILE, so that a row's sums do not depend on adjacent rows.
    tiles_from = begin // TILE * TILE
    inner_from = tl.cdiv(all_from, TILE) * TILE
    inner_to = tl.maximum(all_to // TILE * TILE, inner_from)
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    maximum = tl.full((ROWS,), -1e38, tl.float32)  # finite, for rows that see no key of the first tile
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, PADDED), tl.float32)
    if WINDOW > 0 or CHUNK > 0:
        maximum, total, sums = _attend(
            q, positions, maximum, total, sums, tiles_from, tl.minimum(inner_from, end), begin, end,
            k_ptr, v_ptr, block_stride, row_stride, table_ptr, first_block, scale,
            DIM, BLOCK_SIZE, PADDED, WINDOW, CHUNK, TILE, True,
        )  # fmt: skip
    maximum, total, sums = _attend(
        q, positions, maximum, total, sums, inner_from, inner_to, begin, end,
        k_ptr, v_ptr, block_stride, row_stride, table_ptr, first_block, scale,
        DIM, BLOCK_SIZE, PADDED, WINDOW, CHUNK, TILE, False,
    )  # fmt: skip
    maximum, total, sums = _attend(
        q, positions, maximum, total, sums, inner_to, end, begin, end,
        k_ptr, v_ptr, block_stride, row_stride, table_ptr, first_block, scale,
        DIM, BLOCK_SIZE, PADDED, WINDOW, CHUNK, TILE, True,
    )  # fmt: skip
    out_offsets = ((start + tokens).to(tl.int64) * (KV_HEADS * GROUP) + heads)[:, None] * DIM + dims[None, :]
    tl.store(out_ptr + out_offsets, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _attend(
    q, positions, maximum, total, sums, tiles_from, tiles_to, begin, end,
    k_ptr, v_ptr, block_stride, row_stride, table_ptr, first_block, scale,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    TILE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Update the softmax of rows q at `positions` with some tiles of keys; without EDGE, every row sees all of them."""
    dims = tl.arange(0, PADDED)
    for tile in tl.range(tiles_from, tiles_to, TILE):
        keys = tile + tl.arange(0, TILE)
        exists = (keys >= begin) & (keys < end) if EDGE else tl.full((TILE,), True, tl.int1)
        if table_ptr is not None:
            blocks = tl.load(table_ptr + keys // BLOCK_SIZE, mask=exists, other=0)
        else:
            blocks = first_block + keys // BLOCK_SIZE
        offsets = blocks.to(tl.int64) * block_stride + keys % BLOCK_SIZE * row_stride
        cells = offsets[:, None] + dims[None, :]
        mask = exists[:, None] & (dims < DIM)[None, :]
        k = tl.load(k_ptr + cells, mask=mask, other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if EDGE:
            distance = positions[:, None] - keys[None, :]
            seen = distance >= 0
            if WINDOW > 0:
                seen &= distance < WINDOW
            if CHUNK > 0:
                seen &= keys[None, :] >= (positions // CHUNK * CHUNK)[:, None]
            scores = tl.where(seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        weights = tl.exp2(scores * scale - new_maximum[:, None])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(weights, axis=1)
        v = tl.load(v_ptr + cells, mask=mask, other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
        maximum = new_maximum
    return maximum, total, sums
