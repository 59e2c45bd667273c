"""Selective scan: the reference against a Python loop, and the chunked backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import BATCHES, LONG, ScanCase, close, pieces, same

from lamella.ops.selective_scan import cpu, reference, selective_scan

FORMS = {"reference": reference.selective_scan, "chunks": cpu.selective_scan, "fast": selective_scan}
# Heads of x and b and all heads; channels and width of a state.
SHAPES = [((2, 3, 6), (5, 7)), ((1, 1, 1), (1, 2)), ((4, 2, 4), (16, 16))]


def naive(case, state):
    """Compute in fp64, request by request, channel by channel, token by token; update the states."""
    a = {name: None if x is None else x.double() for name, x in case.operands.items()}
    _, heads, channels = a["dt"].shape
    out, token = torch.empty_like(a["dt"]), 0
    for request, (new, total) in enumerate(zip(case.batch.query_lens, case.batch.context_lens, strict=True)):
        slot = case.slots[request]
        for h in range(heads):
            xh, bh = h // (heads // a["x"].shape[1]), h // (heads // a["b"].shape[1])
            for p in range(channels):
                row = state[slot, h, p].double() if new < total else torch.zeros(state.shape[3], dtype=torch.float64)
                for t in range(token, token + new):
                    bias = 0.0 if a["dt_bias"] is None else float(a["dt_bias"][h, p])
                    delta, x = math.log1p(math.exp(float(a["dt"][t, h, p]) + bias)), float(a["x"][t, xh, p])
                    row = row * torch.exp(-delta * a["a_log"][h, p].exp()) + delta * x * a["b"][t, bh]
                    z = float(a["z"][t, h, p])
                    y = float(row @ a["c"][t, h]) + float(a["d"][h, p]) * x
                    out[t, h, p] = y * z / (1 + math.exp(-z))
                state[slot, h, p] = row
        token += new
    return out


@pytest.mark.parametrize("batch", ["decode", "one"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_backend_equals_the_token_loop(form, batch, bias):
    case = ScanCase(BATCHES[batch], (2, 1, 4), (3, 5), bias=bias)
    y, blocks = case.run(FORMS[form])
    expected_blocks, state = case.state()
    close(y, naive(case, state).float())
    close(blocks, expected_blocks)
    case.check_blocks(blocks)


@pytest.mark.parametrize(("heads", "dims"), SHAPES)
@pytest.mark.parametrize("rate", [0.0, 4.0, 10.0])
@pytest.mark.parametrize("entries", [cpu.CHUNK_ENTRIES, 20000])
def test_chunks_equal_the_reference(heads, dims, rate, entries, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK_ENTRIES", entries)
    case = ScanCase(LONG["lengths"], heads, dims, rate=rate)
    for remembering in (True, False):
        (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f], remembering) for f in ("chunks", "reference"))
        close(y, expected)
        close(blocks, expected_blocks)
        if remembering:
            case.check_blocks(blocks)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 200])
def test_one_request_of_any_length(length):
    for context in (length, length + 5):
        case = ScanCase(([length], [context]), (1, 3, 3), (8, 4), rate=2.0)
        (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f]) for f in ("chunks", "reference"))
        close(y, expected)
        close(blocks, expected_blocks)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_equals_the_whole(form, data):
    cuts = [data.draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 20, 65]), min_size=1, max_size=5)) for _ in range(3)]
    cuts = [cut if any(cut) else [1] for cut in cuts]
    lengths = [sum(cut) for cut in cuts]
    case = ScanCase((lengths, lengths), (1, 2, 2), (9, 4))
    whole, whole_blocks = case.run(reference.selective_scan)
    y, blocks = pieces(case, FORMS[form], cuts)
    close(y, whole)
    close(blocks, whole_blocks)
    case.check_blocks(blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
def test_results_are_rounded_once(batch, dtype):
    case = ScanCase(BATCHES[batch], (2, 4, 4), (16, 24), dtype=dtype)
    (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f]) for f in ("fast", "reference"))
    x_fp32, _ = case.run(reference.selective_scan, **{n: x.float() for n, x in case.operands.items()})
    assert same(expected, x_fp32.to(dtype))
    close(y, expected, 1e-5, ulps=1)
    close(blocks, expected_blocks)


@pytest.mark.parametrize("form", FORMS)
def test_a_channel_that_forgets_at_once_or_never(form):
    case = ScanCase(([70, 70], [70, 90]), (1, 1, 2), (4, 6))
    a_log = torch.tensor([-80.0, 70.0])[:, None, None].expand(2, 4, 6).contiguous()
    y, blocks = case.run(FORMS[form], a_log=a_log)
    expected, expected_blocks = case.run(reference.selective_scan, a_log=a_log)
    close(y, expected)
    close(blocks, expected_blocks)


def test_a_request_does_not_depend_on_others_in_the_batch():
    """A decode's bits are the same with a prompt or with other decodes in the batch."""
    case = ScanCase(BATCHES["mixed"], (2, 2, 4), (16, 8))
    y, blocks = case.run(selective_scan)
    few = ScanCase(([1, 1], [7, 1]), (2, 2, 4), (16, 8))
    few.slots, few.blocks = case.slots[:2], case.blocks
    few.operands = {n: x if n in ("a_log", "dt_bias", "d") else x[:2] for n, x in case.operands.items()}
    alone, alone_blocks = few.run(selective_scan)
    assert torch.equal(y[:2], alone)
    assert torch.equal(blocks[few.slots, few.span], alone_blocks[few.slots, few.span])


def test_out_is_where_the_result_goes():
    case = ScanCase(BATCHES["mixed"], (1, 2, 2), (8, 8))
    expected, _ = case.run(selective_scan)
    out = torch.empty_like(expected)
    y, _ = case.run(lambda **operands: selective_scan(**operands, out=out))
    assert y is out and torch.equal(out, expected)
