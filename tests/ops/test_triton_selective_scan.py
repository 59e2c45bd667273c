"""Triton's selective scan against the reference, token by token and in chunks."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from recurrences import ScanCase, close, pieces, same

from lamella.ops.selective_scan import reference

pytest.importorskip("triton")

from covering import covering
from lamella.ops.selective_scan import triton as kernels
from lamella.ops.selective_scan.triton import selective_scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = {
    "decode": ([1, 1, 1], [1, 2, 40]),
    "mixed": ([1, 1, 2, 9, 1, 16], [7, 1, 3, 9, 2, 30]),
    "one": ([11], [14]),
}


@pytest.fixture(params=[False, True], ids=["tokens", "chunks"])
def scan(request, monkeypatch):
    """Run the scan of prompts token by token, or in chunks."""
    monkeypatch.setattr(kernels, "CHUNK", 8)
    return partial(selective_scan, chunked=request.param)


def check(scan, case, tolerance=2e-5, **changes):
    ulps = 1 if case.dtype != torch.float32 else 0
    for remembering in (True, False):
        y, blocks = case.run(scan, remembering, **changes)
        expected, expected_blocks = case.run(reference.selective_scan, remembering, **changes)
        close(y, expected, tolerance, ulps)
        close(blocks, expected_blocks, tolerance)
        if remembering:
            case.check_blocks(blocks)


@covering(
    {
        "heads,dims,bias": [((2, 3, 6), (5, 7), True), ((1, 1, 1), (1, 2), False), ((2, 1, 2), (16, 20), True)],
        "batch": list(BATCHES),
        "dtype": [torch.float32, torch.bfloat16],
        "scan": [False, True],
    },
    indirect=["scan"],
)
def test_selective_scan(scan, batch, heads, dims, bias, dtype):
    check(scan, ScanCase(BATCHES[batch], heads, dims, bias=bias, device=DEVICE, dtype=dtype))


@pytest.mark.parametrize("rate", [4.0, 10.0])
def test_a_channel_that_forgets_fast(scan, rate):
    check(scan, ScanCase(([1, 20], [3, 20]), (1, 2, 4), (8, 8), rate=rate, device=DEVICE))


@pytest.mark.parametrize("width", [100, 256])
def test_wide_states(scan, width):
    check(scan, ScanCase(([1, 9], [3, 12]), (1, 1, 1), (9, width), device=DEVICE, dtype=torch.bfloat16))


@pytest.mark.parametrize("lengths", [[7], [8], [9], [8, 1, 17, 1], [1, 2, 3] * 2])
def test_chunks_of_any_requests(scan, lengths):
    """Chunk numbers belong to the right requests for any start and end."""
    case = ScanCase((lengths, [n + r % 3 for r, n in enumerate(lengths)]), (1, 1, 1), (3, 4), device=DEVICE)
    case.batch = replace(case.batch, num_decodes=0)
    check(scan, case)


def test_any_cut_equals_the_whole(scan):
    case = ScanCase(([30, 17], [30, 17]), (1, 2, 2), (9, 4), device=DEVICE)
    whole, whole_blocks = case.run(reference.selective_scan)
    for cuts in ([[1, 9, 20], [3, 0, 1, 2, 11]], [[2, 1, 8, 19], [17]]):
        y, blocks = pieces(case, scan, cuts)
        close(y, whole, 2e-5)
        close(blocks, whole_blocks, 2e-5)


def test_a_request_does_not_depend_on_others_in_the_batch(scan):
    """A decode's bits are the same with a prompt or with other decodes in the batch."""
    case = ScanCase(BATCHES["mixed"], (1, 2, 2), (16, 8), device=DEVICE, dtype=torch.bfloat16)
    y, blocks = case.run(scan)
    few = ScanCase(([1, 1], [7, 1]), (1, 2, 2), (16, 8), device=DEVICE, dtype=torch.bfloat16)
    few.slots, few.blocks = case.slots[:2], case.blocks
    few.operands = {n: x if n in ("a_log", "dt_bias", "d") else x[:2] for n, x in case.operands.items()}
    alone, alone_blocks = few.run(scan)
    assert torch.equal(y[:2], alone)
    assert torch.equal(blocks[few.slots, few.span], alone_blocks[few.slots, few.span])


def test_padding_rows_may_share_a_slot():
    """Padding rows write slot 0 in any order without affecting other rows."""
    case = ScanCase(([1, 1, 1, 1], [5, 2, 3, 4]), (1, 2, 2), (8, 8), device=DEVICE)
    y, blocks = case.run(selective_scan)
    case.slots = torch.cat((case.slots[:2], torch.zeros_like(case.slots[:2])))
    case.blocks[0] = 1.0
    padded, padded_blocks = case.run(selective_scan)
    assert torch.equal(padded[:2], y[:2])
    assert same(padded_blocks[case.slots[:2]], blocks[case.slots[:2]])


def test_a_request_without_a_new_token_keeps_its_state(scan):
    case = ScanCase(([5, 12], [9, 12]), (1, 2, 2), (8, 8), device=DEVICE)
    y, blocks = case.run(scan)
    bounds = torch.tensor([0, 5, 17, 17], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([9, 12, 0], dtype=torch.int32, device=DEVICE)
    case.batch = replace(case.batch, query_start_loc=bounds, seq_lens=lengths, num_decodes=0)
    case.slots = torch.cat((case.slots, torch.zeros_like(case.slots[:1])))
    padded, padded_blocks = case.run(scan)
    assert torch.equal(padded, y) and same(padded_blocks, blocks)


def test_few_long_prompts_are_split_into_chunks(monkeypatch):
    chosen = []
    monkeypatch.setattr(kernels, "_scan", Recorder(chosen, "tokens"))
    monkeypatch.setattr(kernels, "_chunk", Recorder(chosen, "chunks"))
    monkeypatch.setattr(kernels, "_between_chunks", Recorder(chosen, "between"))
    for lengths, names in (
        ([1, 200], ["tokens", "chunks", "between", "chunks"]),
        ([100, 20], ["tokens"]),
        ([200] * kernels.PROGRAMS, ["tokens"]),
    ):
        chosen.clear()
        ScanCase((lengths, lengths), (1, 1, 1), (2, 2), device=DEVICE).run(selective_scan)
        assert chosen == names


class Recorder:
    """Kernel that only records its launches."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.log.append(self.name)
