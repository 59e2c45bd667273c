"""Triton's convolution, alone and fused, against the reference over splits, batches and histories."""

from __future__ import annotations

import pytest
import torch
from recurrences import ring

from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.short_conv import reference

pytest.importorskip("triton")

from covering import covering
from lamella.ops.rms_norm.triton import add_rms_norm
from lamella.ops.short_conv import triton as kernels
from lamella.ops.short_conv.triton import norm_short_conv, short_conv, short_conv_swiglu
from lamella.ops.swiglu.triton import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# New tokens and tokens in all of each request: steps of one token, starts, chunks shorter and longer than a block.
BATCHES = {
    "decode": ([1, 1, 1, 1], [1, 2, 3, 40]),
    "mixed": ([1, 2, 3, 9, 1], [7, 9, 3, 27, 2]),
    "one": ([11], [11]),
}
LONG = {"long": ([1, 33, 2, 40], [8, 33, 9, 90])}  # more than the most tokens of a program


def rows_apart(values, gap):
    """Return the same values in rows of a wider tensor of NaN."""
    width = values.shape[1]
    base = torch.full((values.shape[0], width + gap), torch.nan, dtype=values.dtype, device=values.device)
    base[:, gap // 2 : gap // 2 + width] = values
    return base[:, gap // 2 : gap // 2 + width]


class Case:
    """Random arguments of a convolution with row gaps `gap`; the history is a slice of the slots `shared`."""

    def __init__(self, batch, channels, width, dtype, bias=False, transposed=False, gap=6):
        generator = torch.Generator().manual_seed(channels + width)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(DEVICE, dtype)

        self.batch = RaggedBatch.from_lengths(*(BATCHES | LONG)[batch], DEVICE)
        self.x = rows_apart(random(self.batch.num_tokens, channels), gap)
        self.weight = random(width, channels).T if transposed else random(channels, width)
        self.bias = random(channels) if bias else None
        count = self.batch.num_requests
        self.slots = torch.randperm(count + 3, generator=generator)[:count].to(DEVICE)
        self.shared = random(count + 3, width - 1, channels + 5)
        # What no request has seen yet: before a position 0, and beside the slice.
        for slot, new, total in zip(self.slots, self.batch.query_lens, self.batch.context_lens, strict=True):
            self.shared[slot, total - new :] = torch.nan
        self.shared[:, :, :2] = self.shared[:, :, 2 + channels :] = torch.nan

    def history(self):
        """Return a copy of the slot tensor, and its slice."""
        shared = self.shared.clone()
        return shared, shared[:, :, 2 : 2 + self.x.shape[1]]


def same(a, b):
    """Return True for bitwise equality; NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def close(actual, expected):
    eps = torch.finfo(actual.dtype).eps
    atol = 4e-6 if actual.dtype == torch.float32 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=20 * eps if actual.dtype == torch.float32 else eps, atol=atol)


@covering(
    {
        "channels,width,activation,residual": [
            (70, 4, False, True),
            (1, 2, True, False),
            (530, 3, True, True),
            (33, 8, False, False),
        ],
        "batch": list(BATCHES),
        "dtype": DTYPES,
    }
)
def test_short_conv(dtype, batch, channels, width, activation, residual):
    case = Case(batch, channels, width, dtype, bias=activation, transposed=residual)
    options = {"activation": activation, "residual": residual}
    before = case.x.clone()
    for remembering in (True, False):
        (shared, history), (expected_shared, expected_history) = case.history(), case.history()
        y, expected = (
            function(
                case.x,
                ConvWeights(case.weight, case.bias, **options),
                case.batch,
                ConvState(past, case.slots) if remembering else None,
            )
            for function, past in ((short_conv, history), (reference.short_conv, expected_history))
        )
        close(y, expected)
        assert same(shared, expected_shared)
        assert torch.equal(case.x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_splitting_a_request_gives_the_same_bits(dtype):
    """A request has the same bits in one piece, with other requests, and in several pieces."""
    width, channels, length = 4, 40, 13
    x, weight = (torch.randn(n, channels, device=DEVICE).to(dtype) for n in (length, width))
    stranger = torch.randn(9, channels, device=DEVICE).to(dtype)
    options = {"activation": True, "residual": True}
    conv = ConvWeights(weight.T, **options)
    whole = short_conv(x, conv, RaggedBatch.from_lengths([length], [length], DEVICE))
    for cuts in ([1] * length, [2, 1, 3, 7], [12, 1]):
        history = torch.full((4, width - 1, channels), torch.nan, device=DEVICE, dtype=dtype)
        done, parts = 0, []
        for count in cuts:
            batch = RaggedBatch.from_lengths([count, 9], [done + count, 9], DEVICE)
            joined = torch.cat((x[done : done + count], stranger))
            y = short_conv(joined, conv, batch, ConvState(history, torch.tensor([3, 1], device=DEVICE)))
            parts.append(y[:count])
            done += count
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(history[3], ring(x, width))


@covering({"batch": list(BATCHES), "channels,width,activation": [(64, 4, False), (1022, 3, True)], "dtype": DTYPES})
def test_swiglu_of_the_convolution(dtype, batch, channels, width, activation):
    case = Case(batch, channels, width, dtype, bias=activation)
    conv = ConvWeights(case.weight, case.bias, activation, True)
    (shared, history), (expected_shared, expected_history) = case.history(), case.history()
    y = short_conv_swiglu(case.x, conv, case.batch, ConvState(history, case.slots))
    convolved = short_conv(case.x, conv, case.batch, ConvState(expected_history, case.slots))
    assert torch.equal(y, swiglu(convolved))
    assert same(shared, expected_shared)


@covering(
    {
        "channels,remembering,gap": [(64, True, 6), (544, True, 32), (544, True, 6), (528, False, 32)],
        "batch": list(BATCHES),
        "dtype": DTYPES,
    }
)
def test_convolution_of_the_norm(dtype, batch, channels, remembering, gap):
    """Narrow rows, wide aligned rows (one launch), wide unaligned rows, and no history."""
    case = Case(batch, channels, 4, dtype, gap=gap)
    residual = torch.randn(case.x.shape, device=DEVICE).to(dtype)
    norm = ResidualNorm(residual, torch.rand(channels, device=DEVICE) + 0.5, 1e-5)
    (shared, history), (expected_shared, expected_history) = case.history(), case.history()
    state, expected_state = (
        ConvState(some, case.slots) if remembering else None for some in (history, expected_history)
    )
    conv = ConvWeights(case.weight, None, activation=True, residual=True)
    y, total = norm_short_conv(case.x, norm, conv, case.batch, state)
    normed, expected_total = add_rms_norm(case.x, norm)
    expected = short_conv(normed, conv, case.batch, expected_state)
    assert torch.equal(total, expected_total)
    assert torch.equal(y, expected)
    assert same(shared, expected_shared)


@covering({"block_tokens": [8, 16, 32], "width": [2, 8], "dtype": DTYPES})
def test_tokens_per_program_do_not_change_the_bits(dtype, width, block_tokens, monkeypatch):
    case = Case("long", 36, width, dtype, bias=True)
    (shared, history), (expected_shared, expected_history) = case.history(), case.history()
    conv = ConvWeights(case.weight, case.bias)
    expected = reference.short_conv(case.x, conv, case.batch, ConvState(expected_history, case.slots))
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setattr(kernels, "MAX_TOKENS", block_tokens)
    close(short_conv(case.x, conv, case.batch, ConvState(history, case.slots)), expected)
    assert same(shared, expected_shared)


def test_padding_rows_may_share_a_slot():
    """Padding rows write slot 0 in any order without affecting other rows."""
    case = Case("decode", 40, 4, torch.bfloat16)
    case.slots[2:] = 0
    case.slots[:2] = torch.tensor([5, 2])
    results = []
    for rows in (4, 2):
        _, history = case.history()
        batch = RaggedBatch.from_lengths([1] * rows, BATCHES["decode"][1][:rows], DEVICE)
        conv = ConvWeights(case.weight, residual=True)
        y = short_conv(case.x[:rows], conv, batch, ConvState(history, case.slots[:rows]))
        results.append((y[:2], history[1:]))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
