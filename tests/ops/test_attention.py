"""Paged attention against the plain formula: mixtures of decodes and chunks, windows, pools filled with NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.ops import attention
from lamella.ops.attention import reference, sdpa
from lamella.ops.attention.chunks import pieces, seen_blocks
from lamella.ops.operands import PagedCache
from lamella.ops.ragged import RaggedBatch

VISIBLE = [(None, None), (1, None), (3, None), (17, None), (None, 1), (None, 4), (None, 10), (None, 64)]


@st.composite
def cases(draw):
    requests = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40)), min_size=1, max_size=4))
    requests.sort(key=lambda pair: pair[0] != 1)  # decodes stand first
    return {
        "new": [new for new, _ in requests],
        "context": [new + old for new, old in requests],
        "kv_heads": draw(st.sampled_from([1, 2, 3])),
        "group": draw(st.sampled_from([1, 2, 5])),
        "dim": draw(st.sampled_from([8, 16, 24, 64])),
        "block": draw(st.sampled_from([1, 4, 16])),
        **dict(zip(("window", "chunk"), draw(st.sampled_from(VISIBLE)), strict=True)),
        "seed": draw(st.integers(0, 2**31)),
    }


def first_seen(position, window, chunk):
    if chunk is not None:
        return position - position % chunk
    return 0 if window is None else max(0, position - window + 1)


def fp64_attention(q, keys, values, new, scale, window, chunk=None):
    """Compute attention in fp64, one request, one query and one head at a time."""
    heads, group = q.shape[1], q.shape[1] // keys.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    for i in range(new):
        position = len(keys) - new + i
        first = first_seen(position, window, chunk)
        for h in range(heads):
            k, v = (side[first : position + 1, h // group].double() for side in (keys, values))
            out[i, h] = torch.softmax(k @ q[i, h].double() * scale, 0) @ v
    return out


def paged(case, dtype):
    """Return random requests in blocks; memory that no query may see is NaN or an invalid block."""
    generator = torch.Generator().manual_seed(case["seed"])
    block, kv_heads, dim = case["block"], case["kv_heads"], case["dim"]
    counts = [-(-n // block) for n in case["context"]]
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    k_cache, v_cache = (torch.full((sum(counts) + 1, block, kv_heads, dim), torch.nan, dtype=dtype) for _ in range(2))
    table = torch.zeros(len(counts), max(counts) + 2, dtype=torch.int32)
    queries, keys, values = [], [], []
    for r, (new, length) in enumerate(zip(case["new"], case["context"], strict=True)):
        blocks = [order.pop() for _ in range(counts[r])]
        table[r, : len(blocks)] = torch.tensor(blocks)
        k, v = (torch.randn(length, kv_heads, dim, generator=generator).to(dtype) for _ in range(2))
        visible = first_seen(length - new, case["window"], case["chunk"])
        for p in range(visible, length):
            k_cache[blocks[p // block], p % block], v_cache[blocks[p // block], p % block] = k[p], v[p]
        table[r, : visible // block] = 0
        queries.append(torch.randn(new, kv_heads * case["group"], dim, generator=generator).to(dtype))
        keys.append(k)
        values.append(v)
    cache = PagedCache(k_cache, v_cache, table, torch.empty(0, dtype=torch.int64))
    return queries, keys, values, cache, RaggedBatch.from_lengths(case["new"], case["context"])


@pytest.mark.parametrize(
    "implementation",
    [reference.paged_attention, sdpa.paged_attention, attention.paged_attention],
    ids=["reference", "sdpa", "fast"],
)
@settings(max_examples=40, deadline=None)
@given(case=cases())
@torch.inference_mode()
def test_paged_attention(implementation, case):
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        queries, keys, values, cache, batch = paged(case, dtype)
        scale = case["dim"] ** -0.5
        visible = {"window": case["window"], "chunk": case["chunk"]}
        out = implementation(torch.cat(queries), cache, batch, scale, **visible)
        parts = zip(queries, keys, values, case["new"], strict=True)
        expected = torch.cat([fp64_attention(*part, scale, **visible) for part in parts])
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (3, None), (None, 3), (None, 1), (None, 7)])
@pytest.mark.parametrize("lengths", [[4, 4], [1, 7, 3], [5]])
def test_causal_attention_without_blocks(lengths, window, chunk):
    torch.manual_seed(0)
    q, k, v = torch.randn(sum(lengths), 6, 16), torch.randn(sum(lengths), 2, 16), torch.randn(sum(lengths), 2, 16)
    batch = RaggedBatch.from_lengths(lengths, lengths)
    expected = torch.cat(
        [
            fp64_attention(*parts, len(parts[0]), 0.3, window, chunk)
            for parts in zip(*(side.split(lengths) for side in (q, k, v)), strict=True)
        ]
    ).float()
    for implementation in (reference.causal_attention, attention.causal_attention):
        torch.testing.assert_close(implementation(q, k, v, batch, 0.3, window, chunk), expected, rtol=2e-5, atol=2e-5)


def test_write_kv_writes_its_rows_and_no_other():
    k_cache, v_cache = torch.full((3, 4, 2, 8), torch.nan), torch.full((3, 4, 2, 8), torch.nan)
    k, v, rows = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.tensor([7, 0, 9])
    with torch.inference_mode():
        attention.write_kv(k, v, PagedCache(k_cache, v_cache, torch.empty(0), rows))
    assert torch.equal(k_cache.flatten(0, 1)[rows], k)
    assert torch.equal(v_cache.flatten(0, 1)[rows], v)
    assert k_cache.isnan().sum() == k_cache.numel() - k.numel()


@settings(max_examples=60, deadline=None)
@given(case=cases(), blocks=st.integers(1, 4))
@torch.inference_mode()
def test_chunks_become_separate_requests(case, blocks):
    """A library without chunked attention gets every chunk as a request, with the blocks that it sees."""
    block = case["block"]
    case |= {"window": None, "chunk": block * blocks}
    queries, _, _, cache, batch = paged(case, torch.float32)
    lengths = case["new"], case["context"]
    listed = torch.cat([row[: -(-n // block)] for row, n in zip(cache.block_table, case["context"], strict=True)])
    listed = listed[seen_blocks(*lengths, case["chunk"], block)]
    cut = pieces(*lengths, case["chunk"])
    counts = [-(-piece.length // block) for piece in cut]
    rows = torch.nn.utils.rnn.pad_sequence(list(listed.split(counts)), batch_first=True)
    separate = RaggedBatch.from_lengths([piece.new for piece in cut], [piece.length for piece in cut])
    q = torch.cat(queries)
    expected = reference.paged_attention(q, cache, batch, 0.3, None, case["chunk"])
    alone = cache._replace(block_table=rows)
    torch.testing.assert_close(reference.paged_attention(q, alone, separate, 0.3, None), expected)
