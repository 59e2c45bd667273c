"""Decode attention for few requests in one launch: `prepare_qkv` and attention over a paged KV cache.

With few requests a step is latency-bound. Before it waits for the launch ahead, the kernel therefore loads everything
that recent launches do not write: the plan, block ids, and the keys and values of older tokens. Every program prepares
the new token's query, key and value that it needs, without a round trip through memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.attention.triton import LOG2_E, MAX_CHUNKS, DecodeWorkspace, finish, load_item, padded_dim
from lamella.ops.launch import dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.operands import PagedCache, QKVSteps
from lamella.ops.rms_norm.triton import row_scale


class Settings(NamedTuple):
    """Launch settings of `decode_prepared`; they affect speed, and results only by rounding."""

    tile: int  # tokens per iteration of a program, a power of two >= 16; the first tile is read before the wait
    num_warps: int
    registers: int | None = None  # maximum per thread; fewer registers let the kernel start while the launch ahead runs


# By head_dim, padded to a power of two, and bytes per element.
_SETTINGS = {
    (16, 2): Settings(128, 4),
    (32, 2): Settings(128, 4),
    (64, 2): Settings(128, 4, 128),
    (128, 2): Settings(128, 4),
    (256, 2): Settings(64, 8),
    (16, 4): Settings(128, 4),
    (32, 4): Settings(64, 4),
    (64, 4): Settings(64, 8),
    (128, 4): Settings(16, 8),
    (256, 4): Settings(16, 8),
}


def decode_prepared(
    qkv: Tensor,
    steps: QKVSteps,
    cache: PagedCache,
    scale: float,
    window: int | None,
    workspace: DecodeWorkspace,
    *,
    settings: Settings | None = None,
) -> Tensor:
    """Compute `prepare_qkv` and `decode_attention` for one token per request: qkv (R, (H + 2 * KV) * D) -> (R, H, D).

    The requests and `window` must be those of `plan_decode`. The rows `cache.slot_mapping` of the cache are written in
    place: v unchanged, k as by `prepare_qkv`, except that a norm may round differently. The workspace is overwritten.
    Read before the wait (see `lamella.ops.launch`): the plan, the slot mapping, the block table, the weights of the
    norms, and the keys and values of older tokens.
    """
    (num_heads, num_kv_heads, head_dim), norms, rope, q_scale = steps
    k_cache, v_cache, block_table, rows = cache
    requests = qkv.shape[0]
    assert qkv.shape == (requests, (num_heads + 2 * num_kv_heads) * head_dim) and qkv.stride(1) == 1
    assert (num_heads, num_kv_heads, head_dim) == (workspace.heads, workspace.kv_heads, workspace.head_dim)
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    assert norms is None or all(norm.shape == (head_dim,) and norm.is_contiguous() for norm in norms[:2])
    cos, sin, interleaved = rope or (None, None, False)
    pairs = 0 if rope is None else rope.cos.shape[1]
    if rope is not None:
        assert rope.cos.dtype == rope.sin.dtype == torch.float32 and rope.cos.shape == rope.sin.shape
        assert rope.cos.shape[0] == requests and 2 * pairs <= head_dim
        assert rope.cos.is_contiguous() and rope.sin.is_contiguous()
    assert q_scale is None or (q_scale.shape == (requests,) and q_scale.is_contiguous())
    block_size = k_cache.shape[1]
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (num_kv_heads, head_dim)
    assert k_cache.stride() == v_cache.stride() and k_cache.stride(3) == 1
    assert k_cache.stride(0) == block_size * k_cache.stride(1) and block_size & (block_size - 1) == 0
    assert qkv.dtype == k_cache.dtype == v_cache.dtype
    assert rows.shape == (requests,) and rows.dtype == torch.int64 and rows.is_contiguous()
    assert block_table.dtype == torch.int32 and block_table.stride(1) == 1
    group, padded = num_heads // num_kv_heads, padded_dim(head_dim)
    padded_group = next_power_of_2(group)
    settings = settings or _SETTINGS[padded, qkv.itemsize]
    items = min(workspace.items.shape[1], requests * MAX_CHUNKS.value)
    out = torch.empty((requests, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _decode_prepared[(items * num_kv_heads,)](
        qkv, qkv.stride(0), q_norm, k_norm, cos, sin, q_scale, rows,
        k_cache, v_cache, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        block_table, block_table.stride(0), workspace.items, workspace.items.shape[1], workspace.num_items,
        workspace.arrived, workspace.parts, workspace.maxima, workspace.sums, out, scale * LOG2_E, eps,
        KV_HEADS=num_kv_heads, GROUP=group, DIM=head_dim, PAIRS=pairs, INTERLEAVED=interleaved, BLOCK_SIZE=block_size,
        ROWS=max(16, padded_group), PADDED_GROUP=padded_group, PADDED=padded, TILE=settings.tile,
        PARTS=max(1, 4096 // (padded_group * padded)),
        num_warps=settings.num_warps, num_stages=1, maxnreg=settings.registers,
        enable_fp_fusion=False,  # so that the rotation is bitwise equal to that of `prepare_qkv`
        **dependent_launch(qkv),
    )  # fmt: skip
    return out


@triton.jit
def _load_gains(norm, channels, partners, mask, turned):
    """Return the norm weights of the channels and of their rotation partners; an empty tuple without a norm."""
    gains = ()
    if norm is not None:
        gains = (tl.load(norm + channels, mask=mask, other=0.0), tl.load(norm + partners, mask=turned, other=0.0))
    return gains


@triton.jit
def _prepare(x, partner, gains, cos, sin, DIM: tl.constexpr, PAIRS: tl.constexpr, eps):
    """Norm and rotate some heads, given the channels and their rotation partners; round after each step."""
    dtype: tl.constexpr = x.dtype
    if len(gains) > 0:
        scale = row_scale(x.to(tl.float32), DIM, eps)
        x = (x.to(tl.float32) * scale * gains[0]).to(dtype)
        partner = (partner.to(tl.float32) * scale * gains[1]).to(dtype)
    if PAIRS > 0:
        x = (x.to(tl.float32) * cos + partner.to(tl.float32) * sin).to(dtype)
    return x


@triton.jit
def _load_tile(
    k_ptr, v_ptr, block_stride, row_stride, blocks_ptr, tile, end,
    DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load keys and values (TILE, PADDED) from position `tile` on; zeros from position `end` on."""
    positions = tile + tl.arange(0, TILE)
    dims = tl.arange(0, PADDED)
    seen = positions < end
    blocks = tl.load(blocks_ptr + positions // BLOCK_SIZE, mask=seen, other=0).to(tl.int64)
    offsets = blocks * block_stride + (positions % BLOCK_SIZE) * row_stride
    cached = offsets[:, None] + dims[None, :]
    mask = seen[:, None] & (dims < DIM)[None, :]
    return tl.load(k_ptr + cached, mask=mask, other=0.0), tl.load(v_ptr + cached, mask=mask, other=0.0)


@triton.jit
def _score(q, k, tile, end, scale, TILE: tl.constexpr):
    """Return the scores (ROWS, TILE) of queries and the keys of a tile; keys from position `end` on are masked."""
    scores = tl.dot(q, k.T, input_precision="ieee") * scale
    return tl.where((tile + tl.arange(0, TILE) < end)[None, :], scores, float("-inf"))


@triton.jit
def _add(scores, v, maximum, total, part):
    """Update the running softmax (maximum, total, part) with one more tile."""
    new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_maximum[:, None])
    shrink = tl.exp2(maximum - new_maximum)
    total = total * shrink + tl.sum(weights, axis=1)
    part = tl.dot(weights.to(v.dtype), v, part * shrink[:, None], input_precision="ieee")
    return new_maximum, total, part


@triton.jit
def _decode_prepared(
    qkv_ptr, qkv_stride, q_norm, k_norm, cos_ptr, sin_ptr, q_scale_ptr, rows_ptr,
    k_ptr, v_ptr, block_stride, row_stride, head_stride, table_ptr, table_stride, items_ptr, max_items, num_items_ptr,
    arrived_ptr, parts_ptr, maxima_ptr, sums_ptr, out_ptr, scale, eps,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr, PADDED_GROUP: tl.constexpr, PADDED: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    HEADS: tl.constexpr = KV_HEADS * GROUP
    item, kv_head = tl.program_id(0) // KV_HEADS, tl.program_id(0) % KV_HEADS
    # Load the item together with the number of items, before knowing whether it exists.
    request, start, end, index, first, count = load_item(items_ptr, max_items, item)
    if item >= tl.load(num_items_ptr):
        # End without a wait, to free the multiprocessor. Item 0 always exists, and its programs wait.
        return
    # The newest token is the last position of the last chunk. It is not in the cache yet; it is written here.
    newest = index == first + count - 1
    end -= newest.to(tl.int32)

    # Load everything per channel in the shape of q, repeated per row, so that it is in the same threads as q.
    rows, dims = tl.arange(0, ROWS), tl.arange(0, PADDED)
    channels = tl.zeros_like(rows)[:, None] + dims[None, :]
    inside = channels < DIM
    turned = channels < 2 * PAIRS
    partners = channels
    cos, sin = 0.0, 0.0
    if PAIRS > 0:
        if INTERLEAVED:
            partners, angles, second = channels ^ 1, channels // 2, channels % 2 == 1
        else:
            partners, angles, second = (channels + PAIRS) % (2 * PAIRS), channels % PAIRS, channels >= PAIRS
        angles += request * PAIRS
    q_gains = _load_gains(q_norm, channels, partners, inside, turned)
    k_gains = _load_gains(k_norm, channels, partners, inside, turned)
    cache_row = tl.load(rows_ptr + request, mask=newest, other=0) * row_stride
    blocks_ptr = table_ptr + request.to(tl.int64) * table_stride
    k_ptr += kv_head * head_stride
    v_ptr += kv_head * head_stride
    k, v = _load_tile(k_ptr, v_ptr, block_stride, row_stride, blocks_ptr, start, end, DIM, BLOCK_SIZE, PADDED, TILE)

    wait_for_predecessor(PDL)
    cells = rows[:, None] * DIM + dims[None, :]  # offsets in a group's q, parts and output
    cell_mask = (rows < GROUP)[:, None] & inside
    q_ptr = qkv_ptr + request.to(tl.int64) * qkv_stride + kv_head * GROUP * DIM
    new_k_ptr = q_ptr + (HEADS + kv_head - kv_head * GROUP) * DIM
    new_v_ptr = new_k_ptr + KV_HEADS * DIM
    q = tl.load(q_ptr + cells, mask=cell_mask, other=0.0)
    q_partner = tl.load(q_ptr + rows[:, None] * DIM + partners, mask=cell_mask & turned, other=0.0)
    # A step's first layer of each kind computes its cos/sin and temperatures directly ahead of this launch, so these
    # loads must follow the wait.
    if PAIRS > 0:
        cos = tl.load(cos_ptr + angles, mask=turned, other=1.0)
        sin = tl.load(sin_ptr + angles, mask=turned, other=0.0)
        sin = tl.where(second & turned, sin, -sin)
    if q_scale_ptr is not None:
        q_scale = tl.load(q_scale_ptr + request)
    new_k = tl.load(new_k_ptr + channels, mask=inside & newest, other=0.0)
    k_partner = tl.load(new_k_ptr + partners, mask=turned & newest, other=0.0)
    new_v = tl.load(new_v_ptr + channels, mask=inside & newest, other=0.0)
    q = _prepare(q, q_partner, q_gains, cos, sin, DIM, PAIRS, eps)
    if q_scale_ptr is not None:
        q = (q.to(tl.float32) * q_scale).to(q.dtype)
    scores = _score(q, k, start, end, scale, TILE)
    new_k = _prepare(new_k, k_partner, k_gains, cos, sin, DIM, PAIRS, eps)
    once = (rows == 0)[:, None] & inside & newest
    tl.store(k_ptr + cache_row + channels, new_k, mask=once)
    tl.store(v_ptr + cache_row + channels, new_v, mask=once)
    # The softmax starts with the newest token, or with a value that the first tile scales to zero.
    score = tl.sum(q.to(tl.float32) * new_k.to(tl.float32), axis=1) * scale
    maximum = tl.where(newest, score, float("-inf"))
    total = tl.full((ROWS,), 1.0, tl.float32)
    maximum, total, part = _add(scores, v, maximum, total, new_v.to(tl.float32))
    for tile in tl.range(start + TILE, end, TILE):
        k, v = _load_tile(k_ptr, v_ptr, block_stride, row_stride, blocks_ptr, tile, end, DIM, BLOCK_SIZE, PADDED, TILE)
        scores = _score(q, k, tile, end, scale, TILE)
        maximum, total, part = _add(scores, v, maximum, total, part)

    finish(
        part, maximum, total, request, kv_head, index, first, count, cells, cell_mask,
        arrived_ptr, parts_ptr, maxima_ptr, sums_ptr, out_ptr,
        KV_HEADS, GROUP, DIM, ROWS, PADDED_GROUP, PADDED, PARTS,
    )  # fmt: skip
