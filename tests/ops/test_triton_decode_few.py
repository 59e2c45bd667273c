"""Preparation and decode attention in one kernel against the composition of the references."""

from __future__ import annotations

import pytest
import torch

from lamella.ops.attention import reference
from lamella.ops.operands import HeadNorms, HeadSizes, PagedCache, QKVSteps, Rope
from lamella.ops.qkv.reference import prepare_qkv
from lamella.ops.ragged import RaggedBatch

pytest.importorskip("triton")

from lamella.ops.attention.triton import MAX_CHUNKS, DecodeWorkspace, plan_decode
from lamella.ops.attention.triton_decode_few import _SETTINGS, decode_prepared
from lamella.ops.qkv import triton as qkv_triton

device = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # heads, kv_heads, head_dim, block_size, rotated pairs
    (4, 1, 64, 16, 32),
    (4, 2, 128, 8, 64),
    (8, 2, 128, 16, 64),
    (2, 2, 16, 4, 8),
    (6, 2, 24, 1, 5),
    (16, 1, 80, 128, 16),
    (3, 1, 200, 16, 0),
]


class Case:
    """Random arguments; the last `num_padding` requests are padding. Memory that no query may see is NaN or invalid."""

    def __init__(
        self,
        shape,
        context,
        dtype,
        *,
        window=None,
        norms=True,
        interleaved=False,
        chunk=None,
        num_padding=0,
        grows=False,
    ):
        self.heads, self.kv_heads, self.dim, block, pairs = shape
        self.context, self.window, self.dtype, self.chunk = context, window, dtype, chunk
        self.requests = len(context)
        self.scale = self.dim**-0.5
        counts = [-(-n // block) for n in context[: self.requests - num_padding]]
        order = (torch.randperm(sum(counts)) + 1).tolist()
        # Heads of a cache row are strided, as if keys and values share an allocation.
        shape = (sum(counts) + 1, block, self.kv_heads, 2, self.dim)
        self.cache = torch.full(shape, torch.nan, dtype=dtype)
        self.table = torch.full((self.requests, max([1, *counts]) + 2), 2**31 - 1, dtype=torch.int32)
        self.rows = torch.zeros(self.requests, dtype=torch.int64)
        self.table[self.requests - num_padding :, 0] = 0
        for r, count in enumerate(counts):
            blocks = torch.tensor([order.pop() for _ in range(count)])
            length = context[r]
            visible = 0 if window is None else max(0, length - window)
            self.table[r, visible // block : count] = blocks[visible // block :]
            # The new token is not there yet.
            positions = torch.arange(visible, length - 1)
            values = torch.randn(len(positions), self.kv_heads, 2, self.dim).to(dtype)
            self.cache[blocks[positions // block], positions % block] = values
            self.rows[r] = blocks[-1] * block + (length - 1) % block
        channels = (self.heads + 2 * self.kv_heads) * self.dim
        x_fp32 = torch.full((self.requests, (channels + 47) // 16 * 16), torch.nan, dtype=dtype)
        x_fp32[:, 16 : 16 + channels] = torch.randn(self.requests, channels)
        self.qkv = x_fp32.to(device)[:, 16 : 16 + channels]
        self.cache, self.table, self.rows = (x.to(device) for x in (self.cache, self.table, self.rows))
        weights = [torch.rand(self.dim, device=device) + 0.5 for _ in "qk"]
        angles = torch.rand(self.requests, pairs, device=device) * 6
        self.steps = QKVSteps(
            HeadSizes(self.heads, self.kv_heads, self.dim),
            HeadNorms(*weights, 1e-5) if norms else None,
            Rope(angles.cos(), angles.sin(), interleaved) if pairs else None,
            torch.rand(self.requests, device=device) + 1 if grows else None,
        )
        self.seq_lens = torch.tensor(context, dtype=torch.int32, device=device)

    def picked(self, requests):
        """Return the operands of some requests."""
        rope, scale = self.steps.rope, self.steps.q_scale
        if rope is not None:
            rope = rope._replace(cos=rope.cos[requests].contiguous(), sin=rope.sin[requests].contiguous())
        return self.steps._replace(rope=rope, q_scale=None if scale is None else scale[requests].contiguous())

    def paged(self, cache, requests=slice(None)):
        """Return the cache of some requests; `cache` holds keys and values together."""
        return PagedCache(cache[..., 0, :], cache[..., 1, :], self.table[requests], self.rows[requests])

    def workspace(self):
        """Return a fresh workspace with NaN in its parts."""
        items = sum(min(-(-n // (self.chunk or 128)), MAX_CHUNKS.value) for n in self.context)
        workspace = DecodeWorkspace(self.requests, items, self.heads, self.kv_heads, self.dim, device, chunk=self.chunk)
        for floats in (workspace.parts, workspace.maxima, workspace.sums):
            floats.fill_(torch.nan)
        return workspace

    def run(self, cache, workspace, requests=slice(None), settings=None):
        plan_decode(self.seq_lens[requests], self.window, workspace)
        return self.attend(cache, workspace, requests, settings)

    def attend(self, cache, workspace, requests=slice(None), settings=None):
        return decode_prepared(
            self.qkv[requests], self.picked(requests), self.paged(cache, requests), self.scale, self.window, workspace,
            settings=settings,
        )  # fmt: skip

    def compose(self, prepare, cache):
        """Compute the references in sequence."""
        cache = self.paged(cache)
        q, _, _ = prepare(self.qkv, self.steps, cache)
        batch = RaggedBatch.from_lengths([1] * self.requests, self.context, device)
        return reference.paged_attention(q, cache, batch, self.scale, self.window)

    def check(self, settings=None):
        """Compare one call with the references: output, rows of the slot mapping in the caches, all other memory."""
        inputs = [self.qkv, self.table, self.rows, self.seq_lens]
        norms, rope, scale = self.steps[1:]
        inputs += [x for x in (*(norms or ()), *(rope or ()), scale) if isinstance(x, torch.Tensor)]
        copies = [x.clone() for x in inputs]
        cache, expected_cache = self.cache.clone(), self.cache.clone()
        workspace = self.workspace()
        actual = self.run(cache, workspace, settings=settings)
        expected = self.compose(prepare_qkv, expected_cache)
        # Queries and keys that are rounded the other way move scores, too.
        close(actual, expected, steps=2)
        assert not workspace.arrived.any()
        assert all(same(x, copy) for x, copy in zip(inputs, copies, strict=True))
        new, expected_new = cache.flatten(0, 1)[self.rows], expected_cache.flatten(0, 1)[self.rows]
        # A norm that is rounded the other way moves the rotation's result by a step of its larger part.
        close(new[..., 0, :], expected_new[..., 0, :], steps=2 if self.steps.norms else 1)
        assert same(new[..., 1, :], expected_new[..., 1, :])
        cache.flatten(0, 1)[self.rows] = self.cache.flatten(0, 1)[self.rows]
        assert same(cache, self.cache)
        return actual


def close(actual, expected, steps):
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    eps = torch.finfo(actual.dtype).eps
    tolerance = 40 * eps if actual.dtype == torch.float32 else steps * eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def same(a, b):
    """Return True for bitwise equality."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Norms, interleaved pairs, window; the interpreter takes its time.
OPTIONS = [(True, False, None), (False, True, 30), (True, True, None), (True, False, 1)]
CASES = [
    (shape, dtype, options)
    for i, shape in enumerate(SHAPES)
    for j, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))
    for options in (OPTIONS if device == "cuda" else [OPTIONS[(i + 3 * j) % 4]])
    if device == "cuda" or dtype != torch.float16 or i == 0
]


@pytest.mark.parametrize(("shape", "dtype", "options"), CASES)
def test_options(shape, dtype, options):
    norms, interleaved, window = options
    case = Case(shape, [1, 33, 65, 100, 64], dtype, norms=norms, interleaved=interleaved, window=window, chunk=32)
    case.check()


@pytest.mark.parametrize("window", [None, 128, 129])
@pytest.mark.parametrize("tile", [16, 128])
def test_edges_of_chunks(tile, window):
    """Includes chunks longer than the early loads, and chunks with the newest token only."""
    case = Case((4, 2, 32, 16, 16), [127, 128, 129, 256, 257], torch.float32, window=window)
    case.check(_SETTINGS[32, 4]._replace(tile=tile))


@pytest.mark.parametrize("newest", [-500.0, 500.0])
def test_scores_far_from_zero(newest):
    """No weight is lost if the newest token or older tokens in other chunks dominate."""
    case = Case((4, 2, 16, 4, 0), [40, 41, 2], torch.float32, norms=False, chunk=16)
    case.qkv[:, : 4 * 16] = 1
    case.qkv[:, 4 * 16 : 6 * 16] = newest
    case.cache[..., 0, :] -= 250
    actual = case.run(case.cache.clone(), case.workspace())
    # Scores of 1000 have an error of their own.
    torch.testing.assert_close(actual, case.compose(prepare_qkv, case.cache), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_new_rows_are_those_of_the_separate_kernel(interleaved, norms):
    case = Case((2, 2, 64, 8, 24), [3, 20], torch.bfloat16, norms=norms, interleaved=interleaved)
    cache, expected_cache = case.cache.clone(), case.cache.clone()
    case.run(cache, case.workspace())
    case.compose(qkv_triton.prepare_qkv, expected_cache)
    new, expected = (x.flatten(0, 1)[case.rows] for x in (cache, expected_cache))
    if norms:
        close(new, expected, steps=2)
    else:
        assert same(new, expected)


@pytest.mark.parametrize("window", [None, 50])
def test_requests_do_not_depend_on_one_another(window):
    case = Case((4, 2, 64, 16, 32), [33, 1, 90, 64], torch.bfloat16, window=window, chunk=32)
    together_cache, cache = case.cache.clone(), case.cache.clone()
    together = case.run(together_cache, case.workspace())
    workspace = case.workspace()
    for r in (2, 0, 3, 1):  # a shorter plan leaves the longer one's items behind it
        alone = case.run(cache, workspace, slice(r, r + 1))
        assert same(alone, together[r : r + 1])
    assert same(cache, together_cache)


def test_padding_and_consecutive_calls():
    """Layers share a plan; padding requests have one token each, written to row 0, with NaN projections."""
    case = Case((4, 2, 32, 4, 16), [70, 17, 1, 1], torch.float32, chunk=16, num_padding=2)
    case.qkv[2:] = torch.nan
    expected_cache = case.cache.clone()
    expected = case.compose(prepare_qkv, expected_cache)
    workspace = case.workspace()
    plan_decode(case.seq_lens, case.window, workspace)
    for _layer in range(2):
        cache = case.cache.clone()
        close(case.attend(cache, workspace)[:2], expected[:2], steps=1)
        assert not workspace.arrived.any()
        close(cache[1:].nan_to_num(), expected_cache[1:].nan_to_num(), steps=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 2, 16, 4, 8), (3, 1, 24, 16, 0)])
def test_queries_that_grow(shape, dtype):
    case = Case(shape, [1, 33, 65, 64], dtype, norms=bool(shape[-1]), interleaved=True, chunk=32, grows=True)
    case.check()
