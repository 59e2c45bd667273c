"""Triton's product of few rows against the reference, alone and fused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella.ops.linear import reference
from lamella.ops.linear import triton as fast
from lamella.ops.operands import ConvState, ConvStep, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import add_rms_norm
from lamella.ops.short_conv.reference import short_conv
from lamella.ops.swiglu.reference import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 8, 1), (2, 64, 37), (2, 104, 64), (1, 264, 19), (1, 4104, 5)]


def operands(rows, size, outputs, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)

    fp32_out = random(rows, size + 8)
    fp32_out[:, size:] = torch.nan  # what lies between the rows must not matter
    return fp32_out[:, :size], random(outputs, size, scale=size**-0.5), random(outputs)


def close(ours, expected, dtype):
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}[dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product(shape, dtype, with_bias):
    x, weight, bias = operands(*shape, dtype)
    before = x.clone(), weight.clone()
    assert fast.serves(x, weight)
    ours = fast.linear(x, weight, bias if with_bias else None)
    close(ours, reference.linear(x, weight, bias if with_bias else None), dtype)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
    fp32_out = fast.fp32_linear(x, weight)
    assert fp32_out.dtype == torch.float32
    close(fp32_out, reference.fp32_linear(x, weight), torch.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_behind_a_norm(shape, with_bias):
    rows, size, outputs = shape
    x, weight, bias = operands(rows, size, 2 * outputs, torch.bfloat16)
    residual, _, _ = operands(rows, size, 1, torch.bfloat16, seed=1)
    norm = ResidualNorm(residual, torch.rand(size, device=DEVICE) + 0.5, 1e-5)
    bias = bias if with_bias else None
    normed, total = add_rms_norm(x, norm)
    expected = reference.linear(normed.float(), weight, None if bias is None else bias.float())
    ours, ours_total = fast.fused_linear(x, weight, bias, norm=norm)
    assert torch.equal(ours_total, total)
    # The composition rounds the norm, the kernel does not.
    torch.testing.assert_close(ours.float(), expected, rtol=2**-7, atol=2**-6)
    ours, ours_total = fast.fused_linear(x, weight, bias, gated=True, norm=norm)
    assert torch.equal(ours_total, total) and ours.shape == (rows, outputs)
    torch.testing.assert_close(ours.float(), swiglu(expected), rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("options", [(False, True, None), (True, False, 1.0)])
def test_before_a_convolution(shape, gated, options):
    """Several consecutive steps, over a history with NaN in other slots."""
    rows, size, outputs = shape
    activation, skip, scale = options
    generator = torch.Generator().manual_seed(1)
    channels = 2 * outputs
    taps = torch.randn(3, channels, generator=generator).to(DEVICE, torch.bfloat16).T
    conv_bias = None if scale is None else torch.randn(channels, generator=generator).to(DEVICE, torch.bfloat16)
    shared = torch.full((rows + 2, 2, channels + 7), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    slots = torch.randperm(rows + 2, generator=generator)[:rows].to(DEVICE)
    histories = [shared.clone(), shared.clone()]
    for position in range(4):
        x, weight, bias = operands(rows, size, channels, torch.bfloat16, seed=position)
        conv, positions = ConvWeights(taps, conv_bias, activation, skip), torch.full((rows,), position, device=DEVICE)
        steps = [ConvStep(conv, ConvState(some[:, :, 3 : 3 + channels], slots), positions) for some in histories]
        ours, _ = fast.fused_linear(x, weight, bias, gated=gated, conv=steps[0])
        batch = RaggedBatch.from_lengths([1] * rows, [position + 1] * rows, DEVICE)
        product = fast.linear(x, weight, bias)
        close(product, reference.linear(x, weight, bias), torch.bfloat16)
        expected = short_conv(product, conv, batch, steps[1].state)
        close(ours, swiglu(expected) if gated else expected, torch.bfloat16)
        assert torch.equal(histories[0].view(torch.int16), histories[1].view(torch.int16))


def test_a_row_does_not_depend_on_the_others():
    x, weight, _ = operands(2, 264, 50, torch.bfloat16)
    together = fast.linear(x, weight, None)
    for row in range(2):
        assert torch.equal(fast.linear(x[row : row + 1], weight, None)[0], together[row])


def test_unsupported_products_are_not_served():
    x, weight, _ = operands(2, 264, 50, torch.bfloat16)
    assert not fast.serves(torch.cat([x, x]), weight)
    assert not fast.serves(x.float(), weight.float())
    assert not fast.serves(x[:, :260], weight[:, :260].contiguous())
    assert not fast.serves(x, weight.T.contiguous().T)
