"""Triton's delta rule against the reference, and the operands passed to fla's kernels."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from recurrences import DeltaCase, close, pieces, same

from lamella.ops.delta_rule import reference

pytest.importorskip("triton")

from covering import covering
from lamella.ops.delta_rule import fla
from lamella.ops.delta_rule.triton import delta_rule, gates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GATES = pytest.mark.parametrize("by_channel", [False, True], ids=["by_head", "by_channel"])
BATCHES = {
    "decode": ([1, 1, 1], [1, 2, 40]),
    "mixed": ([1, 1, 2, 5, 1], [7, 1, 3, 5, 2]),
    "one": ([6], [9]),
}


def check(case, function=delta_rule, tolerance=2e-5, **changes):
    ulps = 1 if case.dtype != torch.float32 else 0
    for remembering in (True, False):
        y, blocks = case.run(function, remembering, **changes)
        expected, expected_blocks = case.run(reference.delta_rule, remembering, **changes)
        close(y, expected, tolerance, ulps)
        close(blocks, expected_blocks, tolerance)
        if remembering:
            case.check_blocks(blocks)


@covering(
    {
        "heads,dims": [((1, 2), (12, 20)), ((1, 1), (5, 3)), ((2, 2), (16, 16))],
        "batch": list(BATCHES),
        "by_channel": [False, True],
        "dtype": [torch.float32, torch.bfloat16],
    }
)
def test_delta_rule(batch, heads, dims, by_channel, dtype):
    check(DeltaCase(BATCHES[batch], heads, dims, by_channel, rate=1.0, device=DEVICE, dtype=dtype))


@GATES
@pytest.mark.parametrize("dims", [(64, 64), (128, 40), (200, 130), (256, 16)])
def test_large_heads(dims, by_channel):
    check(DeltaCase(([1, 2], [4, 2]), (1, 1), dims, by_channel, device=DEVICE, dtype=torch.bfloat16))


@GATES
@pytest.mark.parametrize("rate", [4.0, 10.0])
def test_a_head_that_forgets_fast(rate, by_channel):
    check(DeltaCase(([1, 9], [3, 9]), (1, 4), (8, 8), by_channel, rate=rate, device=DEVICE))


@GATES
def test_zero_keys_and_queries(by_channel):
    case = DeltaCase(BATCHES["mixed"], (1, 1), (8, 8), by_channel, device=DEVICE)
    tokens = torch.arange(case.batch.num_tokens, device=DEVICE)
    q, k = (case.operands[name].masked_fill((tokens % 3 == 0)[:, None, None], 0.0) for name in "qk")
    check(case, q=q, k=k)


@GATES
def test_any_cut_equals_the_whole(by_channel):
    case = DeltaCase(([9, 7], [9, 7]), (1, 2), (9, 4), by_channel, device=DEVICE)
    whole, whole_blocks = case.run(reference.delta_rule)
    for cuts in ([[1] * 9, [3, 0, 1, 2, 1]], [[2, 1, 6], [7]]):
        y, blocks = pieces(case, delta_rule, cuts)
        close(y, whole, 2e-5)
        close(blocks, whole_blocks, 2e-5)


@GATES
def test_a_request_does_not_depend_on_others_in_the_batch(by_channel):
    """A decode's bits are the same with a prompt or with other decodes in the batch."""
    case = DeltaCase(BATCHES["mixed"], (1, 2), (16, 24), by_channel, device=DEVICE, dtype=torch.bfloat16)
    y, blocks = case.run(delta_rule)
    few = DeltaCase(([1, 1], [7, 1]), (1, 2), (16, 24), by_channel, device=DEVICE, dtype=torch.bfloat16)
    few.slots, few.blocks = case.slots[:2], case.blocks
    few.operands = {n: x if n in ("a_log", "dt_bias") else x[:2] for n, x in case.operands.items()}
    alone, alone_blocks = few.run(delta_rule)
    assert torch.equal(y[:2], alone)
    assert torch.equal(blocks[few.slots, few.span], alone_blocks[few.slots, few.span])


def test_padding_rows_may_share_a_slot():
    """Padding rows write slot 0 in any order without affecting other rows."""
    case = DeltaCase(([1, 1, 1, 1], [5, 2, 3, 4]), (1, 2), (8, 8), False, device=DEVICE)
    y, blocks = case.run(delta_rule)
    case.slots = torch.cat((case.slots[:2], torch.zeros_like(case.slots[:2])))
    case.blocks[0] = 1.0
    padded, padded_blocks = case.run(delta_rule)
    assert torch.equal(padded[:2], y[:2])
    assert same(padded_blocks[case.slots[:2]], blocks[case.slots[:2]])


def test_a_request_without_a_new_token_keeps_its_state():
    case = DeltaCase(([5, 2], [9, 2]), (1, 2), (8, 8), False, device=DEVICE)
    y, blocks = case.run(delta_rule)
    bounds = torch.tensor([0, 5, 7, 7], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([9, 2, 0], dtype=torch.int32, device=DEVICE)
    case.batch = replace(case.batch, query_start_loc=bounds, seq_lens=lengths, num_decodes=0)
    case.slots = torch.cat((case.slots, torch.zeros_like(case.slots[:1])))
    padded, padded_blocks = case.run(delta_rule)
    assert torch.equal(padded, y) and same(padded_blocks, blocks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@GATES
def test_gates(by_channel, dtype):
    case = DeltaCase(BATCHES["mixed"], (1, 3), (20, 4), by_channel, rate=2.0, device=DEVICE, dtype=dtype)
    decay, beta, a_log, dt_bias = (case.operands[name] for name in ("decay", "beta", "a_log", "dt_bias"))
    decay = decay * 8  # from the flat to the straight part of softplus
    logs, rates = gates(decay, beta, a_log, dt_bias)
    torch.testing.assert_close(logs, reference.log_decay(decay, a_log, dt_bias), rtol=2e-5, atol=1e-12)
    torch.testing.assert_close(rates, beta.float().sigmoid(), rtol=2e-5, atol=0)


def recurrence(
    q, k, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens, cu_seqlens_cpu
):
    """Compute what fla's documentation specifies."""
    assert use_qk_l2norm_in_kernel and torch.equal(cu_seqlens.cpu(), cu_seqlens_cpu) and cu_seqlens.dtype == torch.int64
    assert g.dtype == beta.dtype == torch.float32 and q.shape[0] == 1
    group = v.shape[2] // q.shape[2]
    q, k = (reference.l2_norm(x[0]).repeat_interleave(group, 1) for x in (q, k))
    out, finals = torch.empty_like(v[0]), []
    for r, (start, end) in enumerate(zip(cu_seqlens_cpu[:-1].tolist(), cu_seqlens_cpu[1:].tolist(), strict=True)):
        memory = q.new_zeros(v.shape[2], q.shape[2], v.shape[3]) if initial_state is None else initial_state[r]
        for t in range(start, end):
            factor = g[0, t].exp()
            memory = memory * (factor[:, None, None] if g.dim() == 3 else factor[:, :, None])
            update = beta[0, t][:, None] * (v[0, t].float() - torch.einsum("hkv,hk->hv", memory, k[t]))
            memory = memory + k[t][:, :, None] * update[:, None]
            out[t] = torch.einsum("hkv,hk->hv", memory, q[t]) * q.shape[2] ** -0.5
        finals.append(memory)
    return out[None], torch.stack(finals) if output_final_state else None


@GATES
@pytest.mark.parametrize("known", [True, False], ids=["lengths on the host", "lengths unknown"])
def test_operands_passed_to_fla(known, by_channel, monkeypatch):
    chosen = []

    def kernel(by, *args, **kwargs):
        chosen.append(by)
        return recurrence(*args, **kwargs)

    monkeypatch.setattr(fla, "_kernels", lambda: (partial(kernel, False), partial(kernel, True)))
    monkeypatch.setattr(fla, "serves", lambda *_: True)
    case = DeltaCase(BATCHES["mixed"], (1, 2), (12, 8), by_channel, device=DEVICE, dtype=torch.bfloat16)
    if not known:
        case.batch = replace(case.batch, query_lens=(), context_lens=())
    check(case)
    assert chosen == [by_channel] * 2


def test_fla_is_used_only_for_long_prompts_in_16_bit_dtypes(monkeypatch):
    monkeypatch.setattr(fla, "_kernels", lambda: pytest.fail("asked"))
    x_fp32, narrow = (torch.empty(1, 32, 128, device=DEVICE, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    many = fla.MIN_WORK // (32 * 128 * 128) + 1
    assert not fla.serves(narrow, 128, many - 2, 1) and not fla.serves(x_fp32, 128, many, 1)
    long = fla.MIN_LENGTH
    assert not fla.serves(narrow, 1, 2 * long - 1, 2) and not fla.serves(x_fp32, 1, 2 * long, 2)


def test_missing_fla_is_logged_once(monkeypatch, caplog):
    def missing(name):
        raise ImportError(f"no package {name}")

    monkeypatch.setattr(fla, "version", missing)
    fla._kernels.cache_clear()
    try:
        assert fla._kernels() == fla._kernels() == ()
    finally:
        fla._kernels.cache_clear()
    assert len(caplog.records) == 1 and "fla-core is not used (no package fla-core)" in caplog.text


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@GATES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "dims"), [((2, 6), (64, 64)), ((4, 4), (128, 128))])
def test_fla(heads, dims, dtype, by_channel, monkeypatch):
    """Chunks round q, k and updates to their dtype, so prompts are near the reference; decodes are bitwise equal."""
    pytest.importorskip("fla")
    lengths = [1, 1, 63, 64, 65, 127, 700]
    case = DeltaCase(
        (lengths, [9, 1, 63, 99, 65, 300, 701]), heads, dims, by_channel, rate=1.0, device=DEVICE, dtype=dtype
    )
    monkeypatch.setattr(fla, "MIN_LENGTH", 0)
    assert fla.serves(case.operands["v"], dims[0], sum(lengths) - 2, len(lengths) - 2)
    (y, blocks), (expected, expected_blocks) = (case.run(f) for f in (delta_rule, reference.delta_rule))
    close(y, expected, 3e-2 if dtype == torch.bfloat16 else 5e-3)
    close(blocks, expected_blocks, 3e-2 if dtype == torch.bfloat16 else 5e-3)
    case.check_blocks(blocks)
    close(y[:2], expected[:2], 2e-5, ulps=1)
