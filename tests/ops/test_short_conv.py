"""Short convolution against torch's own, for any split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import ring

from lamella.ops.operands import ConvState, ConvWeights
from lamella.ops.ragged import RaggedBatch
from lamella.ops.short_conv import reference, short_conv


def full(x, weight, bias, activation, residual):
    """Compute one request without history by torch's convolution in fp64."""
    width = weight.shape[1]
    padded = torch.nn.functional.pad(x.double().T[None], (width - 1, 0))
    bias = None if bias is None else bias.double()
    out = torch.nn.functional.conv1d(padded, weight.double()[:, None], bias, groups=x.shape[1])[0].T
    out = torch.nn.functional.silu(out) if activation else out
    return out + x.double() if residual else out


def cuts_of(length: int, draw) -> list[int]:
    cuts = []
    while sum(cuts) < length:
        cuts.append(min(draw(st.integers(1, 7)), length - sum(cuts)))
    return cuts


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(1, 20), min_size=1, max_size=4))
    return {
        "cuts": [cuts_of(n, draw) for n in lengths],
        "width": draw(st.integers(2, 6)),
        "channels": draw(st.integers(1, 70)),
        "bias": draw(st.booleans()),
        "activation": draw(st.booleans()),
        "residual": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**31)),
    }


@pytest.mark.parametrize("implementation", [reference.short_conv, short_conv], ids=["reference", "fast"])
@settings(max_examples=60, deadline=None)
@given(case=cases())
@torch.inference_mode()
def test_any_cut_equals_the_whole(implementation, case):
    generator = torch.Generator().manual_seed(case["seed"])
    channels, width = case["channels"], case["width"]
    weight = torch.randn(channels, width, generator=generator)
    bias = torch.randn(channels, generator=generator) if case["bias"] else None
    inputs = [torch.randn(sum(cuts), channels, generator=generator) for cuts in case["cuts"]]
    options = {"activation": case["activation"], "residual": case["residual"]}
    # A slice of a wider slot tensor, as the convolutions of a layer share one, full of what must never be seen.
    slots = torch.randperm(len(inputs) + 2, generator=generator)[: len(inputs)]
    shared = torch.full((len(inputs) + 2, width - 1, channels + 5), torch.nan)
    history = shared[:, :, 2 : 2 + channels]
    done = [0] * len(inputs)
    outputs: list[list[torch.Tensor]] = [[] for _ in inputs]
    for turn in range(max(map(len, case["cuts"]))):
        active = [r for r in range(len(inputs)) if turn < len(case["cuts"][r])]
        counts = [case["cuts"][r][turn] for r in active]
        x = torch.cat([inputs[r][done[r] : done[r] + n] for r, n in zip(active, counts, strict=True)])
        before = x.clone()
        batch = RaggedBatch.from_lengths(counts, [done[r] + n for r, n in zip(active, counts, strict=True)])
        y = implementation(x, ConvWeights(weight, bias, **options), batch, ConvState(history, slots[active]))
        assert torch.equal(x, before)
        for r, n, part in zip(active, counts, y.split(counts), strict=True):
            outputs[r].append(part)
            done[r] += n
    for r, parts in enumerate(outputs):
        torch.testing.assert_close(
            torch.cat(parts), full(inputs[r], weight, bias, **options).float(), rtol=1e-5, atol=1e-5
        )
        assert torch.equal(history[slots[r]], ring(inputs[r], width))
    untouched = torch.ones(len(inputs) + 2, dtype=torch.bool)
    untouched[slots] = False
    assert shared[untouched].isnan().all()
    assert shared[:, :, :2].isnan().all()
    assert shared[:, :, 2 + channels :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_history_every_request_starts_from_nothing(dtype):
    torch.manual_seed(0)
    lengths, weight = [3, 1, 9], torch.randn(40, 4).to(dtype)
    x = torch.randn(sum(lengths), 40).to(dtype)
    batch = RaggedBatch.from_lengths(lengths, lengths)
    with torch.inference_mode():
        y = short_conv(x, ConvWeights(weight, residual=True), batch)
    expected = torch.cat([full(part, weight, None, False, True) for part in x.split(lengths)])
    torch.testing.assert_close(y, expected.to(dtype), rtol=1.6e-2 if dtype != torch.float32 else 1e-5, atol=1e-5)
