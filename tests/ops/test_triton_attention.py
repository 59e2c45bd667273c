"""Triton attention kernels against the reference: odd shapes, memory filled with NaN, independent requests."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from covering import covering, mostly_slow
from lamella.ops.attention import reference
from lamella.ops.attention import triton as decode
from lamella.ops.attention import triton_prefill as prefill
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.operands import PagedCache
from lamella.ops.ragged import RaggedBatch

device = "cuda" if torch.cuda.is_available() else "cpu"


def random_case(new, context, heads, kv_heads, dim, block, window, dtype, seed=0, chunk=None):
    """Return q (strided rows), caches, block table and batch; memory that no query may see is NaN or invalid."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // block) for n in context]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    k_cache, v_cache = (torch.full((sum(counts) + 1, block, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.full((len(counts), max(counts) + 2), 2**31 - 1, dtype=torch.int32)
    for r, (n, length) in enumerate(zip(new, context, strict=True)):
        blocks = torch.tensor([order.pop() for _ in range(counts[r])])
        visible = 0 if window is None else max(0, length - n - window + 1)
        if chunk is not None:
            visible = (length - n) // chunk * chunk
        table[r, visible // block : counts[r]] = blocks[visible // block :]
        positions = torch.arange(visible, length)
        for cache in (k_cache, v_cache):
            values = torch.randn(len(positions), kv_heads, dim, generator=generator).to(dtype)
            cache[blocks[positions // block], positions % block] = values
    x_fp32 = torch.full((sum(new), heads * dim + 8), torch.nan, dtype=dtype, device=device)
    q = x_fp32[:, : heads * dim].unflatten(1, (heads, dim))
    q.copy_(torch.randn(q.shape, generator=generator) * 2)
    return (
        q,
        k_cache.to(device),
        v_cache.to(device),
        table.to(device),
        RaggedBatch.from_lengths(new, context, device),
    )


def cache_of(k_cache, v_cache, table):
    """Return a cache in which the new tokens have been written; its slot mapping is unused."""
    return PagedCache(k_cache, v_cache, table, torch.empty(0, dtype=torch.int64))


def assert_near(actual, expected):
    """Check equality within the rounding of the output and of the softmax weights."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == torch.float32:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    else:
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=eps, atol=eps / 2)


def workspace_for(q, k_cache, context, chunk=None, max_items=None):
    heads, dim = q.shape[1:]
    if max_items is None:
        max_items = sum(min(-(-n // (chunk or 128)), decode.MAX_CHUNKS.value) for n in context)
    return decode.DecodeWorkspace(len(context), max_items, heads, k_cache.shape[2], dim, device, chunk=chunk)


SHAPES = [  # heads, kv_heads, head_dim, block_size
    (4, 1, 64, 16),
    (6, 3, 24, 4),
    (16, 1, 16, 8),
    (17, 1, 32, 1),
    (2, 2, 128, 128),
    (3, 1, 200, 16),
]
CASES = [
    (shape, dtype, window)
    for shape in SHAPES
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for window in (None, 1, 30)
    # The interpreter takes its time.
    if device == "cuda" or shape == SHAPES[0] or (dtype, window) in ((torch.float32, 30), (torch.bfloat16, None))
]


@pytest.mark.parametrize(("shape", "dtype", "window"), CASES)
def test_decode(shape, dtype, window):
    heads, kv_heads, dim, block = shape
    context = [1, 33, 64, 100]
    q, k_cache, v_cache, table, batch = random_case([1] * 4, context, heads, kv_heads, dim, block, window, dtype)
    inputs = (q, k_cache, v_cache, table, batch.seq_lens)
    copies = [x.clone() for x in inputs]
    workspace = workspace_for(q, k_cache, context, chunk=32)
    for floats in (workspace.parts, workspace.maxima, workspace.sums):
        floats.fill_(torch.nan)
    scale = dim**-0.5
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, scale, window)
    decode.plan_decode(batch.seq_lens, window, workspace)
    actual = decode.decode_attention(q, k_cache, v_cache, table, scale, workspace)
    assert_near(actual, expected)
    assert not workspace.arrived.any()
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize("window", [None, 50])
def test_decode_requests_do_not_depend_on_one_another(window):
    context = [33, 1, 90, 64]
    q, k_cache, v_cache, table, batch = random_case([1] * 4, context, 4, 2, 64, 16, window, torch.bfloat16)
    workspace = workspace_for(q, k_cache, context, chunk=32)
    decode.plan_decode(batch.seq_lens, window, workspace)
    together = decode.decode_attention(q, k_cache, v_cache, table, 0.2, workspace)
    for r in range(4):
        alone = slice(r, r + 1)
        decode.plan_decode(batch.seq_lens[alone], window, workspace)
        actual = decode.decode_attention(q[alone], k_cache, v_cache, table[alone], 0.2, workspace)
        assert torch.equal(actual, together[alone])


def test_decode_replays_with_other_lengths():
    """One workspace serves plans of different lengths, and padding rows of one token in block 0."""
    workspace = decode.DecodeWorkspace(4, 24, 4, 2, 32, device, chunk=16)
    workspace.processors = 1  # few programs: they must share the work
    for seed, context in enumerate([[5, 70, 17], [100], [1, 1, 1, 16]]):
        q, k_cache, v_cache, table, batch = random_case(
            [1] * len(context), context, 4, 2, 32, 4, None, torch.float32, seed
        )
        lengths = torch.cat([batch.seq_lens, batch.seq_lens.new_ones(1)])[:4]
        table = torch.cat([table, torch.zeros_like(table[:1])])[:4]
        queries = torch.cat([q, torch.full_like(q[:1], torch.nan)])[:4]
        decode.plan_decode(lengths, None, workspace)
        for _layer in range(2):
            out = torch.full(queries.shape, torch.nan, device=device)
            actual = decode.decode_attention(queries, k_cache, v_cache, table, 0.2, workspace, out=out)
            assert not workspace.arrived.any()
            expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, 0.2, None)
            assert_near(actual[: len(context)], expected)


@pytest.mark.parametrize("length", [1, 16, 17, 1024, 1025, 2048, 2049, 5000])
@pytest.mark.parametrize("window", [None, 1500])
def test_plan(length, window):
    lengths = [length, 1, 40]
    workspace = decode.DecodeWorkspace(3, 200, 1, 1, 64, device, chunk=16)
    decode.plan_decode(torch.tensor(lengths, dtype=torch.int32, device=device), window, workspace)
    items = workspace.items[:, : int(workspace.num_items)].T.tolist()
    assert [end - start for _, start, end, *_ in items] == sorted((i[2] - i[1] for i in items), reverse=True)
    items.sort(key=lambda item: item[3])
    index = 0
    for request, n in enumerate(lengths):
        first = 0 if window is None else max(0, n - window)
        size = 16
        while -(-(n - first) // size) > 64:
            size *= 2
        starts = range(first, n, size)
        assert len(starts) <= 64
        expected = [
            [request, start, min(start + size, n), index + i, index, len(starts)] for i, start in enumerate(starts)
        ]
        assert items[index : index + len(starts)] == expected
        index += len(starts)
    assert index == len(items)


@pytest.mark.parametrize("window", [None, 40])
def test_plan_queues_every_chunk_once_and_the_longest_first(window):
    """Chunks of different and equal lengths, including the larger chunks of long requests."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (37,), generator=generator, dtype=torch.int32)
    lengths[[3, 11, 12]] = torch.tensor([16 * 64 + 1, 5000, 16 * 64 * 4], dtype=torch.int32)
    lengths[20:24] = 48
    workspace = decode.DecodeWorkspace(37, 1000, 1, 1, 64, device, chunk=16)
    workspace.items.fill_(-1)
    decode.plan_decode(lengths.to(device), window, workspace)
    count = int(workspace.num_items)
    assert (workspace.items[:, count:] == -1).all()
    request, start, end, part, first, parts = (field.tolist() for field in workspace.items[:, :count])
    sizes = [e - s for s, e in zip(start, end, strict=True)]
    assert sizes == sorted(sizes, reverse=True) and min(sizes) > 0
    assert sorted(part) == list(range(count))
    order = sorted(range(count), key=lambda i: part[i])
    assert [request[i] for i in order] == sorted(request)
    for r, n in enumerate(lengths.tolist()):
        mine = [i for i in order if request[i] == r]
        seen = [position for i in mine for position in range(start[i], end[i])]
        assert seen == list(range(0 if window is None else max(0, n - window), n))
        assert {first[i] for i in mine} == {part[mine[0]]} and {parts[i] for i in mine} == {len(mine)}


@pytest.mark.parametrize("length", mostly_slow([1, 128, 700, 9000], fast=[1, 128, 700]))
@pytest.mark.parametrize("requests", [1, 8, 9, 20])
def test_max_items_bounds_every_plan(requests, length):
    """For steps as long as the bound allows, and with fewer requests."""
    workspace = decode.DecodeWorkspace(requests, decode.max_items(requests, length), 1, 1, 16, device)
    for some in {1, min(8, requests), requests}:
        decode.plan_decode(torch.full((some,), length, dtype=torch.int32, device=device), None, workspace)
        assert 0 < int(workspace.num_items) <= workspace.items.shape[1]


RAGGED = [([3, 1, 20], [50, 7, 20]), ([40], [75])]  # new and all tokens


@covering({"shape,dtype,window": CASES, "new,context": RAGGED}, strength=1)
def test_prefill(new, context, shape, dtype, window):
    heads, kv_heads, dim, block = shape
    q, k_cache, v_cache, table, batch = random_case(new, context, heads, kv_heads, dim, block, window, dtype)
    inputs = (q, k_cache, v_cache, table, batch.seq_lens, batch.query_start_loc)
    copies = [x.clone() for x in inputs]
    settings = prefill._SETTINGS[decode.padded_dim(dim), q.itemsize]._replace(rows=64, tile=16)
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, dim**-0.5, window)
    actual = prefill.prefill_attention(
        q, k_cache, v_cache, table, batch.query_start_loc, batch.seq_lens, max(new) + 30, dim**-0.5, window,
        settings=settings,
    )  # fmt: skip
    assert_near(actual, expected)
    for x, copy in zip(inputs, copies, strict=True):
        assert torch.equal(x.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_attention(dtype, window):
    lengths = [30, 1, 70]
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 6 + 2 + 2, 24).to(device, dtype)
    q, k, v = qkv.split([6, 2, 2], dim=1)
    batch = RaggedBatch.from_lengths(lengths, lengths, device)
    expected = reference.causal_attention(q, k, v, batch, 0.2, window)
    actual = prefill.causal_attention(q, k, v, batch.query_start_loc, max(lengths), 0.2, window)
    assert_near(actual, expected)


@pytest.mark.parametrize("window", [None, 37])
def test_prefill_requests_do_not_depend_on_one_another(window):
    new, context = [20, 33, 2], [61, 33, 90]
    q, k_cache, v_cache, table, batch = random_case(new, context, 4, 2, 32, 16, window, torch.bfloat16)
    together = prefill.prefill_attention(
        q, k_cache, v_cache, table, batch.query_start_loc, batch.seq_lens, max(new), 0.2, window
    )
    for r, (queries, expected) in enumerate(zip(q.split(new), together.split(new), strict=True)):
        starts = batch.query_start_loc[r : r + 2] - batch.query_start_loc[r]
        actual = prefill.prefill_attention(
            queries, k_cache, v_cache, table[r : r + 1], starts, batch.seq_lens[r : r + 1], new[r], 0.2, window
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("empty", [0, 1, 2])
def test_prefill_takes_requests_without_new_tokens(empty):
    """Like padding requests in a captured graph."""
    q, k_cache, v_cache, table, batch = random_case([5, 18], [9, 18], 4, 2, 32, 16, None, torch.float32)
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, 0.2, None)
    bounds, lengths = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    bounds.insert(empty, bounds[empty])
    lengths.insert(empty, 1)
    order = [0, 1]
    order.insert(empty, 0)
    starts, lens = (torch.tensor(x, dtype=torch.int32, device=device) for x in (bounds, lengths))
    actual = prefill.prefill_attention(q, k_cache, v_cache, table[order], starts, lens, 18, 0.2, None)
    assert_near(actual, expected)


@pytest.mark.parametrize("chunk", [1, 16, 40, 64, 200])
def test_decode_in_chunks(chunk):
    """Contexts that end before, at and after the end of a chunk; earlier memory is invalid."""
    context = [1, 39, 40, 41, 64, 65, 100]
    case = random_case([1] * 7, context, 6, 3, 24, 4, None, torch.float32, chunk=chunk)
    q, k_cache, v_cache, table, batch = case
    workspace = workspace_for(q, k_cache, context, chunk=32)
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, 0.3, None, chunk)
    decode.plan_decode(batch.seq_lens, None, workspace, chunk)
    assert_near(decode.decode_attention(q, k_cache, v_cache, table, 0.3, workspace), expected)
    assert not workspace.arrived.any()
    items = workspace.items[:, : int(workspace.num_items)].T.tolist()
    for request, length in enumerate(context):
        seen = sorted(p for r, start, end, *_ in items if r == request for p in range(start, end))
        assert seen == list(range((length - 1) // chunk * chunk, length))


@covering({"chunk": [1, 7, 16, 64, 500], "dtype": [torch.float32, torch.bfloat16]}, strength=1)
def test_prefill_in_chunks(chunk, dtype):
    new, context = [5, 33, 40, 1, 16], [5, 70, 101, 49, 64]
    q, k_cache, v_cache, table, batch = random_case(new, context, 4, 2, 16, 8, None, dtype, chunk=chunk)
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, 0.25, None, chunk)
    actual = prefill.prefill_attention(
        q, k_cache, v_cache, table, batch.query_start_loc, batch.seq_lens, max(new), 0.25, None, chunk,
        settings=prefill.Settings(16, 16, 4, 1),
    )  # fmt: skip
    assert_near(actual, expected)
    k, v = (torch.randn(sum(new), 2, 16, device=device).to(dtype) for _ in "kv")
    alone = RaggedBatch.from_lengths(new, new, device)
    expected = reference.causal_attention(q, k, v, alone, 0.25, None, chunk)
    assert_near(prefill.causal_attention(q, k, v, alone.query_start_loc, max(new), 0.25, None, chunk), expected)


def test_mixer_batches_of_a_step_have_separate_plans():
    """Plans do not overlap, share layer memory, and have the same address in each step."""
    context, heads, kv_heads, dim, block = [37, 5, 1, 150], 4, 2, 16, 16
    q, k_cache, v_cache, table, batch = random_case([1] * 4, context, heads, kv_heads, dim, block, None, torch.float32)
    expected = reference.paged_attention(q, cache_of(k_cache, v_cache, table), batch, 0.3, None)
    space = AttentionSpace(4, 160, device=torch.device(device))
    whole, *parts = (
        s.decode_workspace(heads, kv_heads, dim, None) for s in (space, space.subspace(0), space.subspace(1))
    )
    space.begin_step()
    assert [space.subspace(index).decode_workspace(heads, kv_heads, dim, None) for index in (0, 1)] == parts
    assert all(part.parts is whole.parts and part.items is not whole.items for part in parts)
    mine = torch.tensor([True, False, True, False], device=device)
    for part, rows in zip(parts, (mine, ~mine), strict=True):
        decode.plan_decode(batch.seq_lens.masked_fill(~rows, 1), None, part)
    decode.plan_decode(batch.seq_lens, None, whole)
    for _ in range(2):
        for workspace, rows in ((whole, mine | True), (parts[0], mine), (parts[1], ~mine)):
            out = decode.decode_attention(q, k_cache, v_cache, table, 0.3, workspace)
            torch.testing.assert_close(out[rows], expected[rows], rtol=1e-5, atol=1e-5)
