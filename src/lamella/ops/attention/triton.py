"""Decode attention in Triton: one query token per request over a paged KV cache.

The visible context of a request is split into chunks that depend on its own length only, so that no sum depends on
other requests. `plan_decode` lists the chunks of all requests once per step, longest first, so that programs finish at
about the same time. For each layer, a fixed number of programs then processes the list. The last program of a request
to finish combines the partial results of its chunks.
"""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor

MAX_CHUNKS = tl.constexpr(64)  # per request; longer requests get larger chunks
LOG2_E = 1.4426950408889634
# Fields of an item: request, first position, last position + 1, index of its part, first part and number of parts of
# the request.
_FIELDS = 6


class Settings(NamedTuple):
    """Launch settings of `decode_attention`; they affect speed, and results only by rounding."""

    tile: int  # tokens per iteration of a program, a power of two >= 16
    num_warps: int
    num_stages: int
    programs: int  # per multiprocessor
    registers: int | None = None  # maximum per thread, so that all programs are resident


# With few requests, small chunks give work to every multiprocessor. Many requests need no small chunks.
FEW_REQUESTS, _SHORT_CHUNK, _LONG_CHUNK = 8, 128, 1024
# By head_dim, padded to a power of two, and bytes per element.
_SETTINGS = {
    (16, 2): Settings(128, 4, 3, 4),
    (32, 2): Settings(128, 4, 3, 4),
    (64, 2): Settings(128, 4, 3, 3, 168),
    (128, 2): Settings(64, 4, 3, 3, 168),
    (256, 2): Settings(32, 4, 3, 3),
    (16, 4): Settings(64, 4, 3, 4),
    (32, 4): Settings(64, 4, 3, 4),
    (64, 4): Settings(32, 4, 3, 3),
    (128, 4): Settings(16, 4, 3, 3),
    (256, 4): Settings(16, 8, 2, 2),
}


def max_items(requests: int, length: int) -> int:
    """Return the maximum number of items in a plan of `requests` requests with at most `length` visible tokens each."""
    few = min(requests, FEW_REQUESTS)
    return max(few * _chunks(length, _SHORT_CHUNK), requests * _chunks(length, _LONG_CHUNK))


def _chunks(length: int, chunk: int) -> int:
    return min(cdiv(length, chunk), MAX_CHUNKS.value)


class DecodeWorkspace:
    """Device memory for a plan and for partial outputs; only one stream may use it at a time.

    Attributes:
        items: (6, max_items) int32, the plan, longest items first; undefined beyond `num_items`.
        num_items: (1,) int32.
        arrived: (1 + max_requests * kv_heads,) int32, zero between calls: units of work handed out, then finished parts
            of each request and key/value head.
        parts: (max_items, heads, head_dim) fp32, partial outputs; `maxima` and `sums` (max_items, heads) fp32 belong to
            it.
        chunk: tokens per chunk for requests with at most `MAX_CHUNKS` chunks; None to choose by the number of requests.
    """

    def __init__(
        self,
        max_requests: int,
        max_items: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str,
        *,
        chunk: int | None = None,
    ) -> None:
        """Allocate the memory. `max_items` is the maximum number of chunks in a step, see the function of this name."""
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.chunk = chunk
        self.items = torch.zeros(_FIELDS, max_items, dtype=torch.int32, device=device)
        self.num_items = torch.zeros(1, dtype=torch.int32, device=device)
        self.arrived = torch.zeros(1 + max_requests * kv_heads, dtype=torch.int32, device=device)
        self.parts = torch.empty(max_items, heads, head_dim, dtype=torch.float32, device=device)
        self.maxima = torch.empty(max_items, heads, dtype=torch.float32, device=device)
        self.sums = torch.empty_like(self.maxima)
        self.processors = (
            torch.cuda.get_device_properties(self.items.device).multi_processor_count if self.items.is_cuda else 1
        )

    def for_another_plan(self) -> DecodeWorkspace:
        """Return a workspace with its own plan that shares the memory used within one layer only."""
        other = copy(self)
        other.items, other.num_items = torch.zeros_like(self.items), torch.zeros_like(self.num_items)
        return other


def plan_decode(seq_lens: Tensor, window: int | None, workspace: DecodeWorkspace, span: int | None = None) -> None:
    """Write the plan of one step into `workspace`.

    The chunks of a request depend on its own length and on whether the step has few or many requests.

    Args:
        seq_lens: (R,) int32, at least 1, including the new token.
        window: number of latest tokens that a token sees, including itself; None for all.
        workspace: is written.
        span: a token sees the tokens from the last multiple of this number on; None for all. (Other modules call it
            `chunk`, which is a unit of work here.)
    """
    requests = seq_lens.shape[0]
    assert seq_lens.dtype == torch.int32 and seq_lens.is_contiguous()
    assert requests * workspace.kv_heads < workspace.arrived.shape[0]
    padded = next_power_of_2(requests)
    _plan_kernel[(requests,)](
        seq_lens, requests, workspace.items, workspace.items.shape[1], workspace.num_items,
        PADDED=padded, WINDOW=window or 0, SPAN=span or 0,
        CHUNK=workspace.chunk or (_SHORT_CHUNK if requests <= FEW_REQUESTS else _LONG_CHUNK),
        num_warps=1 if padded <= 128 else 4,
        **dependent_launch(seq_lens),
    )  # fmt: skip
    # Attention reads the plan before its wait, so an ordinary kernel must run between the plan and attention.
    workspace.arrived[:1].zero_()


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    scale: float,
    workspace: DecodeWorkspace,
    *,
    out: Tensor | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """Compute the attention of one query token per request: q (R, H, D) -> (R, H, D), written to `out` if given.

    The requests must be those of `plan_decode`. Caches and block_table (R, P) int32 are as in `PagedCache`. The
    workspace is overwritten.
    """
    requests, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    assert (heads, kv_heads, dim) == (workspace.heads, workspace.kv_heads, workspace.head_dim)
    assert q.stride(2) == 1 and q.stride(1) == dim and k_cache.stride(3) == 1 and block_table.stride(1) == 1
    assert k_cache.stride() == v_cache.stride() and q.dtype == k_cache.dtype == v_cache.dtype
    assert block_table.dtype == torch.int32 and block_size & (block_size - 1) == 0
    group, padded = heads // kv_heads, padded_dim(dim)
    padded_group = next_power_of_2(group)
    settings = settings or _SETTINGS[padded, q.itemsize]
    items = min(workspace.items.shape[1], requests * MAX_CHUNKS.value)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    assert out.is_contiguous() and out.shape == q.shape
    _decode_kernel[(min(settings.programs * workspace.processors, items * kv_heads),)](
        q, q.stride(0), k_cache, v_cache, k_cache.stride(0), k_cache.stride(1), k_cache.stride(2),
        block_table, block_table.stride(0), workspace.items, workspace.items.shape[1], workspace.num_items,
        workspace.arrived, workspace.parts, workspace.maxima, workspace.sums, out, scale * LOG2_E,
        KV_HEADS=kv_heads, GROUP=group, DIM=dim, BLOCK_SIZE=block_size, ROWS=max(16, padded_group),
        PADDED_GROUP=padded_group, PADDED=padded, TILE=settings.tile,
        PARTS=max(1, 4096 // (padded_group * padded)),
        num_warps=settings.num_warps, num_stages=settings.num_stages, maxnreg=settings.registers,
        **dependent_launch(q),
    )  # fmt: skip
    return out


def padded_dim(dim: int) -> int:
    """Return the number of channels, with padding, that a kernel processes for a head of `dim` channels."""
    return max(16, next_power_of_2(dim))


@triton.jit
def _chunking(length, WINDOW: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Return for each request: first visible position, tokens per chunk, number of chunks."""
    visible = length
    if WINDOW > 0:
        visible = tl.minimum(length, WINDOW)
    if SPAN > 0:
        # Padding entries with length 0 have no chunks.
        visible = tl.where(length > 0, (length - 1) % SPAN + 1, 0)
    # The smallest power of two, times CHUNK, with which MAX_CHUNKS chunks cover the context.
    size = visible * 0 + CHUNK
    for _ in tl.static_range(12):
        size = tl.where(visible > size * MAX_CHUNKS, size * 2, size)
    return length - visible, size, tl.cdiv(visible, size)


@triton.jit(do_not_specialize=["requests"])
def _plan_kernel(
    lengths_ptr, requests, items_ptr, max_items, num_items_ptr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    others = tl.arange(0, PADDED)
    wait_for_predecessor(PDL)
    lengths = tl.load(lengths_ptr + others, mask=others < requests, other=0)
    starts, sizes, counts = _chunking(lengths, WINDOW, SPAN, CHUNK)
    before = others < request
    first = tl.sum(tl.where(before, counts, 0))
    if request == 0:
        tl.store(num_items_ptr, tl.sum(counts))
    length = tl.load(lengths_ptr + request)
    start, size, count = _chunking(length, WINDOW, SPAN, CHUNK)
    chunks = tl.arange(0, MAX_CHUNKS)
    # The index of a chunk in the list is the number of chunks before it: longer chunks, and equal ones of earlier
    # requests. All chunks of a request except the last have full size; among equally long chunks, full ones come first.
    whole = tl.maximum(counts - 1, 0)
    lasts = lengths - starts - whole * sizes
    last = length - start - (count - 1) * size
    ahead = tl.where((sizes > size) | ((sizes == size) & before), whole, 0) + (lasts > size).to(tl.int32)
    ahead_of_last = tl.where(sizes >= last, whole, 0) + ((lasts > last) | ((lasts == last) & before)).to(tl.int32)
    places = tl.where(chunks < count - 1, tl.sum(ahead) + chunks, tl.sum(ahead_of_last))
    mine = chunks < count
    chunk_starts = start + chunks * size
    item_ptrs = items_ptr + places
    tl.store(item_ptrs, tl.zeros_like(chunks) + request, mask=mine)
    tl.store(item_ptrs + max_items, chunk_starts, mask=mine)
    tl.store(item_ptrs + 2 * max_items, tl.minimum(chunk_starts + size, length), mask=mine)
    tl.store(item_ptrs + 3 * max_items, first + chunks, mask=mine)
    tl.store(item_ptrs + 4 * max_items, tl.zeros_like(chunks) + first, mask=mine)
    tl.store(item_ptrs + 5 * max_items, tl.zeros_like(chunks) + count, mask=mine)


@triton.jit
def load_item(items_ptr, max_items, item):
    """Return the fields of an item of the plan, see `_FIELDS`."""
    item_ptr = items_ptr + item
    return (
        tl.load(item_ptr),
        tl.load(item_ptr + max_items),
        tl.load(item_ptr + 2 * max_items),
        tl.load(item_ptr + 3 * max_items),
        tl.load(item_ptr + 4 * max_items),
        tl.load(item_ptr + 5 * max_items),
    )


@triton.jit
def _decode_kernel(
    q_ptr, q_stride, k_ptr, v_ptr, block_stride, row_stride, head_stride, table_ptr, table_stride,
    items_ptr, max_items, num_items_ptr, arrived_ptr, parts_ptr, maxima_ptr, sums_ptr, out_ptr, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, PADDED)
    inside = dims < DIM
    cells = rows[:, None] * DIM + dims[None, :]  # offsets in a group's q, parts and output
    cell_mask = (rows < GROUP)[:, None] & inside[None, :]
    unit = tl.program_id(0)
    # Load the item together with the number of items, before knowing whether it exists: one wait less at batch size 1.
    request, start, end, index, first, count = load_item(items_ptr, max_items, unit // KV_HEADS)
    units = tl.load(num_items_ptr) * KV_HEADS
    wait_for_predecessor(PDL)
    if unit < units:
        q, blocks = _load_first(
            q_ptr, q_stride, table_ptr, table_stride, request, start, end, unit % KV_HEADS, cells, cell_mask,
            GROUP, DIM, BLOCK_SIZE, TILE,
        )  # fmt: skip
        while unit < units:
            kv_head = unit % KV_HEADS
            # Load early, so that the value has arrived when it is needed.
            next_unit = _next_unit(unit, units, arrived_ptr)
            next_item = load_item(items_ptr, max_items, tl.minimum(next_unit, units - 1) // KV_HEADS)
            blocks_ptr = table_ptr + request.to(tl.int64) * table_stride
            k_head_ptr = k_ptr + kv_head * head_stride
            v_head_ptr = v_ptr + kv_head * head_stride
            maximum = tl.full((ROWS,), float("-inf"), tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            part = tl.zeros((ROWS, PADDED), tl.float32)
            for tile in tl.range(start, end, TILE):
                positions = tile + tl.arange(0, TILE)
                seen = positions < end
                offsets = blocks.to(tl.int64) * block_stride + (positions % BLOCK_SIZE) * row_stride
                blocks = _load_blocks(blocks_ptr, positions + TILE, end, BLOCK_SIZE)
                cached = offsets[:, None] + dims[None, :]
                mask = seen[:, None] & inside[None, :]
                k = tl.load(k_head_ptr + cached, mask=mask, other=0.0)
                scores = tl.dot(q, k.T, input_precision="ieee") * scale
                scores = tl.where(seen[None, :], scores, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_maximum[:, None])
                shrink = tl.exp2(maximum - new_maximum)
                total = total * shrink + tl.sum(weights, axis=1)
                v = tl.load(v_head_ptr + cached, mask=mask, other=0.0)
                part = tl.dot(weights.to(v.dtype), v, part * shrink[:, None], input_precision="ieee")
                maximum = new_maximum
            q, blocks = _load_first(
                q_ptr, q_stride, table_ptr, table_stride, next_item[0], next_item[1], next_item[2],
                next_unit % KV_HEADS, cells, cell_mask, GROUP, DIM, BLOCK_SIZE, TILE,
            )  # fmt: skip
            finish(
                part, maximum, total, request, kv_head, index, first, count, cells, cell_mask,
                arrived_ptr, parts_ptr, maxima_ptr, sums_ptr, out_ptr,
                KV_HEADS, GROUP, DIM, ROWS, PADDED_GROUP, PADDED, PARTS,
            )  # fmt: skip
            unit = next_unit
            request, start, end, index, first, count = next_item


@triton.jit
def _next_unit(unit, units, arrived_ptr):
    """Return the next unit of work after `unit` for this program; at least `units` if there is none.

    The first units are assigned by program number. Programs that finish take further units from a shared counter.
    """
    programs = tl.num_programs(0)
    unit += programs
    if units > programs:
        unit = programs + tl.atomic_add(arrived_ptr, 1, sem="relaxed", scope="gpu")
        if unit == units + programs - 1:  # the last request to the counter in this launch
            tl.store(arrived_ptr, 0)
    return unit


@triton.jit
def _load_blocks(blocks_ptr, positions, end, BLOCK_SIZE: tl.constexpr):
    return tl.load(blocks_ptr + tl.minimum(positions, end - 1) // BLOCK_SIZE)


@triton.jit
def _load_first(
    q_ptr, q_stride, table_ptr, table_stride, request, start, end, kv_head, cells, cell_mask,
    GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Load the queries of an item and the block ids of its first tile."""
    blocks = _load_blocks(table_ptr + request.to(tl.int64) * table_stride, start + tl.arange(0, TILE), end, BLOCK_SIZE)
    q = tl.load(q_ptr + request.to(tl.int64) * q_stride + kv_head * GROUP * DIM + cells, mask=cell_mask, other=0.0)
    return q, blocks


@triton.jit
def finish(
    part, maximum, total, request, kv_head, index, first, count, cells, cell_mask,
    arrived_ptr, parts_ptr, maxima_ptr, sums_ptr, out_ptr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Write the output of an item, or its part; the last item of a request to finish combines the parts."""
    HEADS: tl.constexpr = KV_HEADS * GROUP
    rows = tl.arange(0, ROWS)
    out_head_ptr = out_ptr + (request * HEADS + kv_head * GROUP) * DIM
    if count == 1:
        tl.store(out_head_ptr + cells, (part / total[:, None]).to(out_ptr.dtype.element_ty), mask=cell_mask)
    else:
        head = index * HEADS + kv_head * GROUP
        tl.store(parts_ptr + head.to(tl.int64) * DIM + cells, part, mask=cell_mask)
        tl.store(maxima_ptr + head + rows, maximum, mask=rows < GROUP)
        tl.store(sums_ptr + head + rows, total, mask=rows < GROUP)
        # All threads store before one of them signals it, and read other parts only afterwards.
        tl.debug_barrier()
        counter_ptr = arrived_ptr + 1 + request * KV_HEADS + kv_head
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == count - 1:
            _combine(
                parts_ptr, maxima_ptr, sums_ptr, out_head_ptr, first, count, kv_head * GROUP,
                HEADS, GROUP, DIM, PADDED_GROUP, PADDED, PARTS,
            )  # fmt: skip
            tl.store(counter_ptr, 0)


@triton.jit
def _combine(
    parts_ptr, maxima_ptr, sums_ptr, out_ptr, first, count, first_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    PADDED_GROUP: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one request and key/value head, PARTS at a time in order."""
    rows = tl.arange(0, PADDED_GROUP)
    dims = tl.arange(0, PADDED)
    cells = rows[:, None] * DIM + dims[None, :]
    cell_mask = (rows < GROUP)[:, None] & (dims < DIM)[None, :]
    maximum = tl.full((PADDED_GROUP,), float("-inf"), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    out = tl.zeros((PADDED_GROUP, PADDED), tl.float32)
    for part in range(0, count, PARTS):
        parts = part + tl.arange(0, PARTS)
        heads = (first + parts) * HEADS + first_head
        mask = (parts < count)[:, None] & (rows < GROUP)[None, :]
        # Bypass the L1 cache, which does not see writes of other multiprocessors.
        maxima = tl.load(
            maxima_ptr + heads[:, None] + rows[None, :], mask=mask, other=float("-inf"), cache_modifier=".cg"
        )
        sums = tl.load(sums_ptr + heads[:, None] + rows[None, :], mask=mask, other=0.0, cache_modifier=".cg")
        values = tl.load(
            parts_ptr + heads.to(tl.int64)[:, None, None] * DIM + cells[None],
            mask=(parts < count)[:, None, None] & cell_mask[None], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        # Keep the maximum finite for padding rows, which have no parts.
        new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
        new_maximum = tl.where(rows < GROUP, new_maximum, 0.0)
        weights = tl.exp2(maxima - new_maximum[None, :])
        shrink = tl.exp2(maximum - new_maximum)
        total = total * shrink + tl.sum(sums * weights, axis=0)
        out = out * shrink[:, None] + tl.sum(values * weights[:, :, None], axis=0)
        maximum = new_maximum
    tl.store(out_ptr + cells, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=cell_mask)
