"""The native CPU kernels against plain float32 torch formulas, on random inputs of awkward shapes."""

import ctypes
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import recurrences
import torch
import torch.nn.functional as F
from recurrences import Case, DeltaCase, ScanCase
from torch import Tensor

from lamella.ops import native
from lamella.ops.delta_rule import reference as delta_reference
from lamella.ops.native import bindings, build
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.selective_scan import reference as scan_reference

pytestmark = pytest.mark.skipif(not native.available(), reason="native CPU kernels are not available (no compiler?)")

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SEEDS = pytest.mark.parametrize("seed", range(6))
NAN = float("nan")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pick(g: torch.Generator, *options: int) -> int:
    return options[int(torch.randint(len(options), (), generator=g))]


def randn(g: torch.Generator, *shape: int, dtype: torch.dtype, pad: int = 0) -> Tensor:
    """Return random numbers; with pad, a view of strided rows with NaN between them."""
    width = math.prod(shape[1:])
    x_fp32 = torch.full((shape[0], width + pad), NAN, dtype=dtype)
    x_fp32[:, :width] = torch.randn(shape[0], width, generator=g).to(dtype)
    return x_fp32[:, :width].unflatten(1, shape[1:]) if len(shape) > 2 else x_fp32[:, :width]


def close(actual: Tensor, expected: Tensor, ulps: float = 1.0) -> None:
    """expected is float32 of bf16-exact inputs: one rounding to bf16 is half an ulp, 2**-9 of the value."""
    rtol = 1e-5 if actual.dtype == torch.float32 else ulps * 2.0**-8
    atol = 1e-5 if actual.dtype == torch.float32 else 1e-5 * ulps
    torch.testing.assert_close(actual.float(), expected, rtol=rtol, atol=atol)


class Unchanged:
    """Check at the end of a `with` block that tensors are bitwise unchanged (including NaN)."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self.tensors = [t for t in tensors if t is not None]

    @staticmethod
    def bits(t: Tensor) -> Tensor:
        return t.contiguous().view(torch.uint8).clone()

    def __enter__(self) -> None:
        self.before = [self.bits(t) for t in self.tensors]

    def __exit__(self, *_: object) -> None:
        for before, t in zip(self.before, self.tensors, strict=True):
            assert torch.equal(before, self.bits(t))


# ---- decode_attention ----------------------------------------------------------------------------------------------


def flat_rows(blocks: Tensor, begin: int, end: int, block: int) -> Tensor:
    """Return the rows of the flattened cache for positions [begin, end) of a request with these blocks."""
    p = torch.arange(begin, end)
    return blocks[p // block] * block + p % block


def attention_case(seed: int, dtype: torch.dtype, lens: list[int], heads: tuple[int, int], D: int, block: int):
    g = generator(seed)
    H, KV = heads
    blocks = [-(-n // block) for n in lens]
    P = sum(blocks) + 3
    k_cache, v_cache = (torch.full((P, block, KV, D), NAN, dtype=dtype) for _ in range(2))
    # Entries past a request's blocks are garbage: far outside the pool.
    block_table = torch.randint(10**8, 2 * 10**9, (len(lens), max(blocks) + 2), generator=g, dtype=torch.int32)
    free = torch.randperm(P, generator=g).to(torch.int32)
    keys, values = [], []
    for r, n in enumerate(lens):
        mine, free = free[: blocks[r]], free[blocks[r] :]
        block_table[r, : blocks[r]] = mine
        k, v = (torch.randn(n, KV, D, generator=g).to(dtype) for _ in range(2))
        rows = flat_rows(mine, 0, n, block)
        k_cache.flatten(0, 1)[rows], v_cache.flatten(0, 1)[rows] = k, v
        keys.append(k.float()), values.append(v.float())
    q = randn(g, len(lens), H, D, dtype=dtype, pad=5)
    return q, k_cache, v_cache, block_table, torch.tensor(lens, dtype=torch.int32), keys, values


def attention_reference(q: Tensor, keys: list[Tensor], values: list[Tensor], scale: float, window: int | None):
    out = []
    for row, k, v in zip(q.float(), keys, values, strict=True):
        group = q.shape[1] // k.shape[1]
        k, v = (x[-window if window else 0 :].repeat_interleave(group, 1) for x in (k, v))
        out.append(torch.einsum("ht,thd->hd", (torch.einsum("hd,thd->ht", row, k) * scale).softmax(-1), v))
    return torch.stack(out)


@DTYPES
@SEEDS
@pytest.mark.parametrize("window", [None, 1, 7, 300])
def test_decode_attention(dtype: torch.dtype, seed: int, window: int | None) -> None:
    g = generator(seed + 100)
    lens = [pick(g, 1, 2, 3, 15, 16, 17, 40, 255, 256, 257, 511, 700) for _ in range(pick(g, 1, 2, 5))]
    heads = [(1, 1), (4, 2), (6, 2), (8, 1), (7, 1), (16, 8)][seed]
    D, block = pick(g, 8, 16, 20, 64, 80, 96, 128, 144, 256), pick(g, 1, 5, 16, 64)
    q, k_cache, v_cache, block_table, seq_lens, keys, values = attention_case(seed, dtype, lens, heads, D, block)
    with Unchanged(q, k_cache, v_cache, block_table, seq_lens):
        out = native.decode_attention(q, k_cache, v_cache, block_table, seq_lens, D**-0.5, window)
    assert out.dtype == dtype
    assert out.is_contiguous()
    close(out, attention_reference(q, keys, values, D**-0.5, window))
    if window:  # what the window hides may be anything: not even its blocks need to exist
        for r, n in enumerate(lens):
            hidden = flat_rows(block_table[r], 0, max(0, n - window), block)
            k_cache.flatten(0, 1)[hidden] = v_cache.flatten(0, 1)[hidden] = NAN
            block_table[r, : max(0, n - window) // block] = 2**31 - 1
        again = native.decode_attention(q, k_cache, v_cache, block_table, seq_lens, D**-0.5, window)
        assert torch.equal(out, again)


@DTYPES
@pytest.mark.parametrize("chunk", [1, 7, 64, 256, 1000])
def test_decode_attention_in_chunks(dtype: torch.dtype, chunk: int) -> None:
    """Only the chunk is visible; earlier memory may contain anything."""
    lens = [1, 6, 7, 8, 64, 65, 256, 257, 511, 700]
    q, k_cache, v_cache, block_table, seq_lens, keys, values = attention_case(0, dtype, lens, (6, 2), 64, 16)
    firsts = [(n - 1) // chunk * chunk for n in lens]
    keys, values = ([x[first:] for x, first in zip(side, firsts, strict=True)] for side in (keys, values))
    for r, first in enumerate(firsts):
        hidden = flat_rows(block_table[r], 0, first, 16)
        k_cache.flatten(0, 1)[hidden] = v_cache.flatten(0, 1)[hidden] = NAN
        block_table[r, : first // 16] = 2**31 - 1
    with Unchanged(q, k_cache, v_cache, block_table, seq_lens):
        out = native.decode_attention(q, k_cache, v_cache, block_table, seq_lens, 0.125, chunk=chunk)
    close(out, attention_reference(q, keys, values, 0.125, None))


@DTYPES
def test_decode_attention_rows_are_independent(dtype: torch.dtype) -> None:
    lens = [300, 1, 700, 64, 256]
    q, k_cache, v_cache, block_table, seq_lens, *_ = attention_case(0, dtype, lens, (8, 2), 64, 16)
    together = native.decode_attention(q, k_cache, v_cache, block_table, seq_lens, 0.125)
    threads = torch.get_num_threads()
    try:
        for r in range(len(lens)):
            torch.set_num_threads(1 + r % 3)
            one = slice(r, r + 1)
            alone = native.decode_attention(q[one], k_cache, v_cache, block_table[one], seq_lens[one], 0.125)
            assert torch.equal(alone, together[one])
    finally:
        torch.set_num_threads(threads)


# ---- short_conv ----------------------------------------------------------------------------------------------------


def conv_reference(x: Tensor, weight: Tensor, bias: Tensor | None, old: Tensor, first: int, act: bool, residual: bool):
    """Return (y, new state) in float32 of one request whose first token has the absolute position `first`."""
    n, W = x.shape[0], weight.shape[1]
    window = first + torch.arange(W - 1)  # positions modulo W-1
    inputs = torch.cat([old[window % (W - 1)], x])
    inputs[: max(0, W - 1 - first)] = 0.0
    y = sum(inputs[j : j + n] * weight[:, j] for j in range(W))
    y = y if bias is None else y + bias
    y = F.silu(y) if act else y
    return (x + y if residual else y), torch.empty_like(old).index_copy_(0, (window + n) % (W - 1), inputs[n:])


@DTYPES
@SEEDS
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("layout", ["DW", "WD"])
def test_short_conv(dtype: torch.dtype, seed: int, with_state: bool, layout: str) -> None:
    g = generator(seed)
    W, D, R = pick(g, 2, 3, 4, 7), pick(g, 1, 15, 16, 33, 256, 300), pick(g, 1, 2, 5)
    lens = [pick(g, 1, 1, 2, 3, 9, 40) for _ in range(R)]
    firsts = [pick(g, 0, 0, 1, 2, 5, 1000) if with_state else 0 for _ in range(R)]
    act, residual, with_bias = (bool(pick(g, 0, 1)) for _ in range(3))
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(f, f + n) for f, n in zip(firsts, lens, strict=True)])
    x = randn(g, sum(lens), D, dtype=dtype, pad=3)
    weight = randn(g, D, W, dtype=dtype)
    weight = weight if layout == "DW" else weight.t().contiguous().t()
    bias = randn(g, 1, D, dtype=dtype)[0] if with_bias else None
    pool = torch.full((R + 2, W - 1, D + 9), NAN, dtype=dtype)
    state = pool[:, :, 4 : 4 + D]
    slots = torch.randperm(R + 2, generator=g)[:R] if pick(g, 0, 1) else None
    rows = list(range(R)) if slots is None else slots.tolist()
    for s, first in zip(rows, firsts, strict=True):  # rows before position 0 stay NaN
        seen = torch.arange(max(0, first - (W - 1)), first)
        state[s, seen % (W - 1)] = torch.randn(len(seen), D, generator=g).to(dtype)
    before = pool.clone()
    with Unchanged(x, weight, bias, slots, starts, positions):
        y = native.short_conv(
            x, weight, bias, state if with_state else None, slots, starts, positions, act, residual
        )  # fmt: skip
    expected_pool = before.clone()
    for r, s in enumerate(rows):
        mine = slice(int(starts[r]), int(starts[r + 1]))
        old = before[s, :, 4 : 4 + D].float()
        expected, new = conv_reference(
            x[mine].float(), weight.float(), None if bias is None else bias.float(), old, firsts[r], act, residual
        )
        close(y[mine], expected)
        if with_state:
            expected_pool[s, :, 4 : 4 + D] = new.to(dtype)
    torch.testing.assert_close(pool, expected_pool, rtol=0, atol=0, equal_nan=True)


@DTYPES
@SEEDS
def test_short_conv_is_the_same_however_it_is_cut(dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    T, D, W = pick(g, 5, 13, 30), pick(g, 16, 37, 260), pick(g, 2, 3, 4)
    x, weight, bias = randn(g, T, D, dtype=dtype), randn(g, D, W, dtype=dtype), randn(g, 1, D, dtype=dtype)[0]

    def run(cuts: list[int]) -> tuple[Tensor, Tensor]:
        state = torch.full((1, W - 1, D), NAN, dtype=dtype)
        parts = [
            native.short_conv(
                x[a:b], weight, bias, state, None, torch.tensor([0, b - a], dtype=torch.int32), torch.arange(a, b),
                True, True,
            )
            for a, b in zip([0, *cuts], [*cuts, T], strict=True)
        ]  # fmt: skip
        return torch.cat(parts), state

    whole, state = run([])
    some = sorted(set(torch.randint(1, T, (3,), generator=g).tolist()))
    for cuts in (list(range(1, T)), some, [1], [T - 1]):
        y, other = run(cuts)
        assert torch.equal(y, whole)
        assert torch.equal(other, state)


# ---- recurrent mixers ----------------------------------------------------------------------------------------------


def native_form(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the kernel with the operation's signature."""

    def form(batch: RaggedBatch, state: RecurrentState | None = None, **operands: Tensor) -> Tensor:
        matrix, slots = (None, None) if state is None else (state.matrix, state.slots.contiguous())
        return kernel(
            **operands, state=matrix, slots=slots, query_start_loc=batch.query_start_loc, seq_lens=batch.seq_lens
        )

    return form


def check_recurrence(case: Case, kernel: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
    ulps = 1 if case.dtype == torch.bfloat16 else 0
    for remembering in (True, False):
        y, blocks = case.run(native_form(kernel), remembering)
        expected, expected_blocks = case.run(reference, remembering)
        recurrences.close(y, expected, ulps=ulps)
        recurrences.close(blocks, expected_blocks)
        if remembering:
            case.check_blocks(blocks)


@DTYPES
@pytest.mark.parametrize("by_channel", [False, True], ids=["by_head", "by_channel"])
@pytest.mark.parametrize("dims", [(64, 64), (16, 80), (33, 17), (7, 130), (128, 5), (1, 1)])
def test_delta_rule(dtype: torch.dtype, dims: tuple[int, int], by_channel: bool) -> None:
    for rate in (0.0, 4.0):
        case = DeltaCase(([1, 1, 9, 2], [4, 1, 9, 7]), (2, 4), dims, by_channel, rate=rate, dtype=dtype)
        check_recurrence(case, native.delta_rule, delta_reference.delta_rule)


@DTYPES
@pytest.mark.parametrize("dims", [(16, 16), (5, 33), (40, 64), (1, 1)])
@pytest.mark.parametrize("bias", [False, True])
def test_selective_scan(dtype: torch.dtype, dims: tuple[int, int], bias: bool) -> None:
    for rate in (0.0, 4.0):
        case = ScanCase(([1, 1, 9, 2], [4, 1, 9, 7]), (2, 4, 4), dims, bias, rate=rate, dtype=dtype)
        check_recurrence(case, native.selective_scan, scan_reference.selective_scan)


@DTYPES
def test_recurrences_are_the_same_however_they_are_cut(dtype: torch.dtype) -> None:
    delta = DeltaCase(([13, 9], [13, 9]), (1, 2), (20, 70), True, dtype=dtype)
    scan = ScanCase(([13, 9], [13, 9]), (1, 2, 2), (5, 20), dtype=dtype)
    for case, kernel in ((delta, native.delta_rule), (scan, native.selective_scan)):
        whole, blocks = case.run(native_form(kernel))
        for cuts in ([[1] * 13, [9]], [[2, 1, 10], [0, 8, 1]]):
            y, other = recurrences.pieces(case, native_form(kernel), cuts)
            assert torch.equal(y, whole)
            assert recurrences.same(other, blocks)


@pytest.mark.parametrize("value", [-200.0, -87.0, -20.0, -1e-4, 0.0, 0.8, 0.9, 5.0, 30.0, 1e4])
def test_softplus(value: float) -> None:
    """Tested through the decay of a state: exp(-softplus) = sigmoid(-x)."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1)
    state = torch.ones(1, 1, 1, 1)
    native.delta_rule(
        one, 0 * one, one, torch.tensor([[value]]), zero, torch.zeros(1), torch.zeros(1), state,
        torch.tensor([0]), torch.tensor([0, 1], dtype=torch.int32), torch.tensor([2], dtype=torch.int32),
    )  # fmt: skip
    assert float(state) == pytest.approx(float(torch.tensor(-value).double().sigmoid()), rel=2e-6, abs=2e-38)


# ---- norm and activation -------------------------------------------------------------------------------------------


def norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normed * weight


@DTYPES
@SEEDS
def test_add_rms_norm(dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    T, N = pick(g, 1, 3, 50), pick(g, 1, 16, 37, 1024, 1030)
    x, residual = (randn(g, T, N, dtype=dtype, pad=pad) for pad in (4, 0))
    weight = randn(g, 1, N, dtype=torch.float32)[0]
    with Unchanged(x, residual, weight):
        normed, new_residual = native.add_rms_norm(x, residual, weight, 1e-5)
        plain = native.rms_norm(x, weight, 1e-5)
    assert torch.equal(new_residual, x + residual)
    close(normed, norm_reference(new_residual, weight, 1e-5), ulps=2)
    close(plain, norm_reference(x, weight, 1e-5), ulps=2)


@DTYPES
@SEEDS
def test_norm_per_head(dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    T, H, KV, D = pick(g, 1, 7, 70), 6, 2, pick(g, 8, 64, 100, 128)
    qkv, weight = randn(g, T, H + 2 * KV, D, dtype=dtype, pad=3), randn(g, 1, D, dtype=torch.float32)[0]
    for view in (qkv[:, :H], qkv[:, H : H + KV], qkv[:, ::2]):
        with Unchanged(qkv):
            normed = native.rms_norm(view, weight, 1e-6)
        assert normed.shape == view.shape
        assert normed.is_contiguous()
        close(normed, norm_reference(view, weight, 1e-6), ulps=2)


@DTYPES
@SEEDS
def test_silu_mul(dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    x = randn(g, pick(g, 1, 3, 40), 2 * pick(g, 1, 16, 31, 3072, 4100), dtype=dtype, pad=2) * 4
    x[0, 0] = -200.0
    with Unchanged(x):
        y = native.silu_mul(x)
    gate, up = x.float().chunk(2, -1)
    close(y, F.silu(gate) * up)


# ---- linear --------------------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (32, 16), (64, 50), (96, 1), (1024, 112), (200, 37), (33, 64), (160, 333)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype: torch.dtype, shape: tuple[int, int], with_bias: bool) -> None:
    K, N = shape
    g = generator(K + N)
    weight = randn(g, N, K, dtype=dtype)
    bias = randn(g, 1, N, dtype=dtype)[0] if with_bias else None
    x = randn(g, 70, K, dtype=dtype, pad=32)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    whole = None
    for M in (70, 1, 2, 3, 5, 8, 15, 16, 17, 33):
        with Unchanged(x, weight, bias):
            y = native.linear(x[:M], weight, bias)
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
        torch.testing.assert_close(y.double(), exact[:M], rtol=tolerance, atol=2e-5 * K**0.5)
        whole = y if whole is None else whole
        assert torch.equal(y, whole[:M])  # a row does not depend on how many there are


def test_linear_of_a_large_weight() -> None:
    """Many tasks on several threads."""
    g = generator(0)
    x, weight = randn(g, 5, 1024, dtype=torch.bfloat16), randn(g, 3000, 1024, dtype=torch.bfloat16)
    y = native.linear(x, weight)
    torch.testing.assert_close(y.float(), x.float() @ weight.float().t(), rtol=2.0**-8, atol=1e-3)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(native.linear(x, weight), y)
    finally:
        torch.set_num_threads(threads)


# ---- rotary and write_kv -------------------------------------------------------------------------------------------


@DTYPES
@SEEDS
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary(dtype: torch.dtype, seed: int, interleaved: bool) -> None:
    g = generator(seed)
    T, H, KV, D = pick(g, 1, 6, 50), 4, pick(g, 1, 2, 4), pick(g, 8, 20, 64, 128)
    half = pick(g, D // 2, D // 4, 1, 3)
    q, k = randn(g, T, H, D, dtype=dtype, pad=6), randn(g, T, KV, D, dtype=dtype)
    angles = torch.rand(T, half, generator=g) * 6.3
    cos, sin = angles.cos(), angles.sin()
    with Unchanged(q, k, cos, sin):
        outs = native.rotary(q, k, cos, sin, interleaved)
    c, s = cos[:, None], sin[:, None]
    for x, out in zip((q, k), outs, strict=True):
        first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (
            slice(0, half), slice(half, 2 * half),
        )  # fmt: skip
        expected = x.float().clone()
        expected[..., first] = x[..., first].float() * c - x[..., second].float() * s
        expected[..., second] = x[..., second].float() * c + x[..., first].float() * s
        assert out.is_contiguous()
        close(out, expected)
        assert torch.equal(out[..., 2 * half :], x[..., 2 * half :])


@DTYPES
@SEEDS
def test_write_kv(dtype: torch.dtype, seed: int) -> None:
    g = generator(seed)
    T, KV, D, P, block = pick(g, 1, 5, 60), pick(g, 1, 3, 8), pick(g, 5, 64, 128), 9, 16
    k, v = randn(g, T, KV, D, dtype=dtype, pad=7), randn(g, T, KV, D, dtype=dtype)
    caches = [torch.full((P, block, KV, D), NAN, dtype=dtype) for _ in range(2)]
    slots = torch.randperm(P * block, generator=g)[:T]
    with Unchanged(k, v, slots):
        native.write_kv(k, v, *caches, slots)
    for x, cache in zip((k, v), caches, strict=True):
        expected = torch.full((P * block, KV, D), NAN, dtype=dtype)
        expected[slots] = x
        torch.testing.assert_close(cache.flatten(0, 1), expected, rtol=0, atol=0, equal_nan=True)


# ---- the library itself --------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("requests", [0, 2])
def test_empty_inputs_do_not_crash(dtype: torch.dtype, requests: int) -> None:
    """A division by the number of tokens or requests would end the process."""
    none, slots = torch.zeros(requests + 1, dtype=torch.int32), torch.arange(requests) + 1
    lengths, positions = torch.zeros(requests, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)

    def rows(*shape: int) -> Tensor:
        return torch.zeros(0, *shape, dtype=dtype)

    ring, memory, states = torch.ones(4, 3, 8, dtype=dtype), torch.ones(4, 2, 4, 8), torch.ones(4, 2, 4, 5)
    conv = native.short_conv(rows(8), torch.ones(8, 4, dtype=dtype), None, ring, slots, none, positions, True, True)
    delta = native.delta_rule(
        rows(2, 4), rows(2, 4), rows(2, 8), rows(2), rows(2), torch.ones(2), torch.ones(2), memory, slots, none, lengths
    )
    heads = (rows(2, 4), rows(2, 4), rows(1, 5), rows(2, 5), rows(2, 4))
    scan = native.selective_scan(
        *heads, torch.ones(2, 4, 5), torch.ones(2, 4), torch.ones(2, 4), states, slots, none, lengths
    )
    cache, norm = torch.ones(3, 4, 2, 8, dtype=dtype), torch.ones(8)
    attention = native.decode_attention(
        rows(4, 8), cache, cache, torch.zeros(0, 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 1.0
    )
    native.write_kv(rows(2, 8), rows(2, 8), cache, cache, positions)
    turned = native.rotary(rows(4, 8), rows(2, 8), torch.zeros(0, 4), torch.zeros(0, 4), False)
    linear = native.linear(rows(32), torch.ones(16, 32, dtype=dtype))
    normed, _ = native.add_rms_norm(rows(8), rows(8), norm, 1e-5)
    results = (conv, delta, scan, attention, *turned, linear, normed, native.silu_mul(rows(16)))
    assert all(result.shape[0] == 0 for result in results)
    assert all(bool((kept == 1).all()) for kept in (ring, memory, states, cache))  # no request's state was touched


@DTYPES
def test_a_request_without_tokens_keeps_its_state(dtype: torch.dtype) -> None:
    """Another request has tokens: the ring buffer is written by tokens of its own request only."""
    state, starts = torch.ones(4, 3, 8, dtype=dtype), torch.tensor([0, 0, 2, 2], dtype=torch.int32)
    x, slots, positions = torch.full((2, 8), 2.0, dtype=dtype), torch.tensor([1, 2, 3]), torch.tensor([0, 1])
    native.short_conv(x, torch.ones(8, 4, dtype=dtype), None, state, slots, starts, positions, False, False)
    assert bool((state[[1, 3]] == 1).all())
    assert state[2, :, 0].tolist() == [2, 2, 0]


def test_one_openmp_runtime_is_mapped() -> None:
    native.silu_mul(torch.randn(64, 2048))
    torch.randn(1 << 20).exp()
    maps = Path("/proc/self/maps").read_text()
    assert len(set(re.findall(r"/\S*lib(?:gomp|iomp5|omp)\b\S*", maps))) == 1


def in_subprocess(code: str, **env: str) -> str:
    command = [sys.executable, "-c", f"import logging; logging.basicConfig(level='INFO'); {code}"]
    path = os.pathsep.join(sys.path)
    run = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, **env}, capture_output=True, text=True, check=True
    )
    return run.stdout + run.stderr


ASK = "from lamella.ops import native; print([native.available() for _ in range(3)])"


def test_switched_off() -> None:
    output = in_subprocess(ASK, LAMELLA_NATIVE="0")
    assert "[False, False, False]" in output
    assert output.count("INFO:lamella") == 1
    assert "WARNING" not in output


def test_no_compiler_is_one_warning(tmp_path: Path) -> None:
    output = in_subprocess(ASK, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path))
    assert "[False, False, False]" in output
    assert output.count("WARNING:lamella") == 1
    assert "no-such-compiler" in output
    assert "portable torch path" in output


def test_failed_build_is_one_warning(tmp_path: Path) -> None:
    output = in_subprocess(ASK, LAMELLA_NATIVE_MARCH="no-such-march", XDG_CACHE_HOME=str(tmp_path))
    assert "[False, False, False]" in output
    assert output.count("WARNING:lamella") == 1
    assert "no-such-march" in output


def test_processes_that_start_at_once_compile_once(tmp_path: Path) -> None:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*) echo 1; exit;; *" -c "*) echo compiled >> {log}; sleep 0.5;; esac\n'
        'for last; do true; done\necho > "$last"\n'
    )
    compiler.chmod(0o755)
    code = "from lamella.ops.native.build import build; print(build())"
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    libraries = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert len(libraries) == 1 and Path(libraries.pop()).exists()
    assert log.read_text() == "compiled\n"


def c_types(prototype: str) -> list[type]:
    """Return the ctypes of a C++ parameter list."""
    plain = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "bool": ctypes.c_bool, "int": ctypes.c_int}
    found = []
    for parameter in prototype.split(","):
        kind = parameter.replace("const", "").split()[0]
        found.append(ctypes.c_void_p if "*" in parameter else plain[kind])
    return found


def exported() -> dict[str, str]:
    """Return the parameter list of every exported C++ kernel."""
    found = {}
    for path in build.sources():
        text = path.read_text()
        for name in re.findall(r"^EXPORT\((\w+)\)$", text, re.MULTILINE):
            (parameters,) = re.findall(
                rf"^template <class T>\nvoid {name}\((.*?)\) {{$", text, re.MULTILINE | re.DOTALL
            )
            found[name] = parameters
    return found


def test_every_signature_is_that_of_the_cpp() -> None:
    assert {name: c_types(parameters) for name, parameters in exported().items()} == bindings.SIGNATURES


def test_every_source_is_part_of_the_library_and_of_its_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise a changed header, or a file missing in kernels.cpp, would not be rebuilt."""
    unit = (build.FOLDER / "kernels.cpp").read_text()
    included = set(re.findall(r'#include "(\w+\.cpp)"', unit))
    assert {path.name for path in build.sources() if path.suffix == ".cpp"} - {"kernels.cpp"} == included
    for path in build.sources():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    keys = {build._key([])}
    for path in sorted(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes() + b"\n")
        keys.add(build._key([]))
    assert len(keys) == 1 + len(build.sources())


def test_every_source_is_packaged() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (line,) = re.findall(r'^"lamella\.ops\.native" = (\[.*\])$', project, re.MULTILINE)
    assert {f'"*{path.suffix}"' for path in build.sources()} == set(line.strip("[]").split(", "))
