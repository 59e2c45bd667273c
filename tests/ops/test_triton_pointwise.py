"""Triton's norm and gate against their references."""

from __future__ import annotations

import pytest
import torch

from lamella.ops.operands import ResidualNorm
from lamella.ops.rms_norm import reference as norm_reference
from lamella.ops.rotary import reference as rotary_reference
from lamella.ops.swiglu import reference as swiglu_reference

pytest.importorskip("triton")

from lamella.ops.rms_norm.triton import add_rms_norm, rms_norm
from lamella.ops.rotary import triton as rotary
from lamella.ops.swiglu.triton import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (40, 64), (2, 129), (3, 2048), (2, 3000)]


def strided(values: torch.Tensor) -> torch.Tensor:
    """Return the same values with strided rows and NaN between them."""
    base = torch.full((*values.shape[:-1], values.shape[-1] + 5), torch.nan, dtype=values.dtype, device=values.device)
    base[..., : values.shape[-1]] = values
    return base[..., : values.shape[-1]]


def random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_rounds_alike(actual, expected):
    """Check equality within one unit in the last place of the dtype, and a few in fp32."""
    assert actual.dtype == expected.dtype and actual.is_contiguous()
    eps = torch.finfo(actual.dtype).eps
    rtol = 20 * eps if actual.dtype == torch.float32 else eps
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_rms_norm(dtype, rows, width):
    x, weight = strided(random(rows, width, dtype=dtype)), torch.rand(width, device=DEVICE) + 0.5
    before = x.clone()
    y = rms_norm(x, weight, 1e-2)
    assert_rounds_alike(y, norm_reference.rms_norm(x, weight, 1e-2))
    assert torch.equal(x, before)
    assert torch.equal(rms_norm(strided(x[-1:]), weight, 1e-2), y[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 80, 128])
def test_rms_norm_of_heads(dtype, width):
    """Some of the heads in a row, with NaN between them."""
    heads, weight = random(9, 7, width, dtype=dtype), torch.rand(width, device=DEVICE) + 0.5
    heads[:, 0::2] = torch.nan
    x = heads[:, 1::2]
    y = rms_norm(x, weight, 1e-5)
    assert_rounds_alike(y, norm_reference.rms_norm(x, weight, 1e-5))
    # Of one head, as rows of two dimensions: the same bits.
    assert torch.equal(rms_norm(x[:, 1], weight, 1e-5), y[:, 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_add_rms_norm(dtype, rows, width):
    # Of large and nearly opposite parts: the norm of the sum before it is rounded would be another.
    x = strided(random(rows, width, dtype=dtype) * 100)
    residual = (random(rows, width, dtype=torch.float32) - x.float()).to(dtype)
    weight = torch.rand(width, device=DEVICE) + 0.5
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, ResidualNorm(residual, weight, 1e-5))
    expected, kept = norm_reference.add_rms_norm(x, ResidualNorm(residual, weight, 1e-5))
    assert torch.equal(total, kept)
    assert_rounds_alike(normed, expected)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    alone = add_rms_norm(strided(x[-1:]), ResidualNorm(residual[-1:].clone(), weight, 1e-5))
    assert torch.equal(alone[0], normed[-1:])
    # The norm of what was kept has the same bits by itself.
    assert torch.equal(rms_norm(strided(total), weight, 1e-5), normed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_a_norm_that_rounds_twice(dtype, rows, width):
    x, residual = strided(random(rows, width, dtype=dtype)), random(rows, width, dtype=dtype)
    weight = (torch.rand(width, device=DEVICE) + 0.5).to(dtype).float()
    normed, total = add_rms_norm(x, ResidualNorm(residual, weight, 1e-5), twice=True)
    expected, kept = norm_reference.add_rms_norm(x, ResidualNorm(residual, weight, 1e-5), twice=True)
    assert torch.equal(total, kept)
    torch.testing.assert_close(normed, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(rms_norm(strided(total), weight, 1e-5, twice=True), normed)
    # The second rounding is one of a product of two numbers of the dtype.
    assert torch.equal(rms_norm(total, torch.ones_like(weight), 1e-5) * weight.to(dtype), normed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_swiglu(dtype, rows, width):
    x = strided(random(rows, 2 * width, dtype=dtype) * 4)
    before = x.clone()
    y = swiglu(x)
    assert_rounds_alike(y, swiglu_reference.swiglu(x))
    assert torch.equal(x, before)
    assert torch.equal(swiglu(strided(x[-1:])), y[-1:])


@pytest.mark.parametrize("period", [None, 1, 7, 8192])
def test_angles(period):
    positions = torch.tensor([0, 1, 6, 7, 8191, 8192, 10_000_000], device=DEVICE)
    frequencies = torch.rand(5, device=DEVICE)
    ours, theirs = (part.angles(positions, frequencies, 1.5, period) for part in (rotary, rotary_reference))
    # Of large angles the cosine's own error grows.
    near = slice(0, 6 if period is None else 7)
    torch.testing.assert_close(torch.stack(ours)[:, near], torch.stack(theirs)[:, near], rtol=1e-4, atol=1e-4)


def test_temperature():
    positions = torch.tensor([0, 8190, 8191, 16382, 16383, 10_485_759], device=DEVICE)
    ours, theirs = (part.temperature(positions, 0.1, 8192) for part in (rotary, rotary_reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    expected = [1, 1, 1.06931, 1.06931, 1.10986, 1.71555]
    torch.testing.assert_close(theirs.cpu(), torch.tensor(expected), rtol=1e-5, atol=1e-5)
