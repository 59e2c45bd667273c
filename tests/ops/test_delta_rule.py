"""Gated delta rule: the reference against a Python loop, and the chunked backend against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import BATCHES, LONG, DeltaCase, close, pieces, same

from lamella.ops.delta_rule import cpu, delta_rule, reference

GATES = pytest.mark.parametrize("by_channel", [False, True], ids=["by_head", "by_channel"])
FORMS = {"reference": reference.delta_rule, "chunks": cpu.delta_rule, "fast": delta_rule}
# Key and value heads; key and value channels.
SHAPES = [((2, 6), (24, 40)), ((1, 1), (5, 3)), ((4, 4), (16, 16))]


def unit(x):
    return x / math.sqrt(float(x @ x) + 1e-6)


def naive(case, state):
    """Compute in fp64, request by request, head by head, token by token; update the states."""
    a = {name: x.double() for name, x in case.operands.items()}
    heads, group = a["v"].shape[1], a["v"].shape[1] // a["q"].shape[1]
    out, token = torch.empty_like(a["v"]), 0
    for request, (new, total) in enumerate(zip(case.batch.query_lens, case.batch.context_lens, strict=True)):
        slot = case.slots[request]
        for head in range(heads):
            memory = state[slot, head].double() if new < total else torch.zeros(state.shape[2:], dtype=torch.float64)
            for t in range(token, token + new):
                q, k = unit(a["q"][t, head // group]) / math.sqrt(a["q"].shape[2]), unit(a["k"][t, head // group])
                log = (a["decay"][t, head] + a["dt_bias"][head]).exp().log1p() * -a["a_log"][head].exp()
                memory = memory * (log.exp()[:, None] if log.dim() else log.exp())
                rate = 1 / (1 + math.exp(-a["beta"][t, head]))
                memory = memory + torch.outer(k, rate * (a["v"][t, head] - k @ memory))
                out[t, head] = q @ memory
            state[slot, head] = memory
        token += new
    return out


@GATES
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("form", FORMS)
def test_every_backend_equals_the_token_loop(form, batch, by_channel):
    case = DeltaCase(BATCHES[batch], (2, 4), (6, 5), by_channel, rate=1.0)
    y, blocks = case.run(FORMS[form])
    expected_blocks, state = case.state()
    close(y, naive(case, state).float())
    close(blocks, expected_blocks)
    case.check_blocks(blocks)


@GATES
@pytest.mark.parametrize(("heads", "dims"), SHAPES)
@pytest.mark.parametrize("rate", [0.0, 4.0, 10.0])
def test_chunks_equal_the_reference(heads, dims, rate, by_channel):
    """Any length, and heads with slow and fast decays in one batch."""
    case = DeltaCase(LONG["lengths"], heads, dims, by_channel, rate=rate)
    for remembering in (True, False):
        (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f], remembering) for f in ("chunks", "reference"))
        close(y, expected)
        close(blocks, expected_blocks)
        if remembering:
            case.check_blocks(blocks)


@GATES
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 200])
def test_one_request_of_any_length(length, by_channel):
    for context in (length, length + 5):
        case = DeltaCase(([length], [context]), (1, 3), (10, 12), by_channel, rate=2.0)
        (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f]) for f in ("chunks", "reference"))
        close(y, expected)
        close(blocks, expected_blocks)


@GATES
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_cut_equals_the_whole(form, by_channel, data):
    cuts = [data.draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 20, 65]), min_size=1, max_size=5)) for _ in range(3)]
    cuts = [cut if any(cut) else [1] for cut in cuts]
    lengths = [sum(cut) for cut in cuts]
    case = DeltaCase((lengths, lengths), (1, 2), (9, 4), by_channel, rate=1.0)
    whole, whole_blocks = case.run(reference.delta_rule)
    y, blocks = pieces(case, FORMS[form], cuts)
    close(y, whole)
    close(blocks, whole_blocks)
    case.check_blocks(blocks)


@GATES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", BATCHES)
def test_results_are_rounded_once(batch, dtype, by_channel):
    case = DeltaCase(BATCHES[batch], (2, 4), (16, 24), by_channel, dtype=dtype)
    (y, blocks), (expected, expected_blocks) = (case.run(FORMS[f]) for f in ("fast", "reference"))
    x_fp32, _ = case.run(reference.delta_rule, **{n: x.float() for n, x in case.operands.items()})
    assert same(expected, x_fp32.to(dtype))
    close(y, expected, 1e-5, ulps=1)
    close(blocks, expected_blocks)


@GATES
@pytest.mark.parametrize("form", FORMS)
def test_zero_keys_and_queries(form, by_channel):
    case = DeltaCase(BATCHES["mixed"], (2, 2), (8, 8), by_channel)
    tokens = torch.arange(case.batch.num_tokens)
    q, k = (case.operands[name].masked_fill((tokens % 3 == 0)[:, None, None], 0.0) for name in "qk")
    y, blocks = case.run(FORMS[form], q=q, k=k)
    expected, expected_blocks = case.run(reference.delta_rule, q=q, k=k)
    assert (y[::3] == 0).all()
    close(y, expected)
    close(blocks, expected_blocks)


@GATES
@pytest.mark.parametrize("form", FORMS)
def test_a_head_that_forgets_at_once_or_never(form, by_channel):
    """exp(a_log) of nearly 0 and of 1e30: no decay, and full decay."""
    case = DeltaCase(([70, 70], [70, 90]), (1, 2), (8, 6), by_channel)
    y, blocks = case.run(FORMS[form], a_log=torch.tensor([-80.0, 70.0]))
    expected, expected_blocks = case.run(reference.delta_rule, a_log=torch.tensor([-80.0, 70.0]))
    close(y, expected)
    close(blocks, expected_blocks)
    alone, _ = case.run(reference.delta_rule, a_log=torch.full((2,), -80.0))
    close(y[:, 0], alone[:, 0])


@GATES
def test_a_request_does_not_depend_on_others_in_the_batch(by_channel):
    """A decode's bits are the same with a prompt or with other decodes in the batch."""
    case = DeltaCase(BATCHES["mixed"], (2, 4), (16, 8), by_channel)
    y, blocks = case.run(delta_rule)
    few = DeltaCase(([1, 1], [7, 1]), (2, 4), (16, 8), by_channel)
    few.slots, few.blocks = case.slots[:2], case.blocks
    few.operands = {n: x if n in ("a_log", "dt_bias") else x[:2] for n, x in case.operands.items()}
    alone, alone_blocks = few.run(delta_rule)
    assert torch.equal(y[:2], alone)
    assert torch.equal(blocks[few.slots, few.span], alone_blocks[few.slots, few.span])


def test_out_is_where_the_result_goes():
    case = DeltaCase(BATCHES["mixed"], (1, 2), (8, 8), False)
    expected, _ = case.run(delta_rule)
    out = torch.empty_like(expected)
    y, _ = case.run(lambda **operands: delta_rule(**operands, out=out))
    assert y is out and torch.equal(out, expected)


def test_a_request_without_a_new_token_keeps_its_state():
    """Steps padded to a fixed number of requests contain such requests."""
    case = DeltaCase(([5, 2], [9, 2]), (1, 2), (8, 8), False)
    y, blocks = case.run(cpu.delta_rule)
    batch = case.batch
    case.batch = replace(
        batch,
        query_start_loc=torch.tensor([0, 5, 7, 7], dtype=torch.int32),
        seq_lens=torch.tensor([9, 2, 0], dtype=torch.int32),
        num_decodes=0,
    )
    case.slots = torch.cat((case.slots, torch.tensor([0])))
    for form in FORMS.values():
        padded, padded_blocks = case.run(form)
        close(padded, y)
        close(padded_blocks[1:], blocks[1:])
