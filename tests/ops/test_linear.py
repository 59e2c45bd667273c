"""Product against the reference, at the sizes around which the backend changes."""

from __future__ import annotations

import pytest
import torch

from lamella.ops.linear import fp32_linear, linear, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 32, 47, 64, 256, 257])
@pytest.mark.parametrize(("width", "outputs", "bias"), [(64, 48, True), (33, 17, False), (96, 1, True)])
@torch.inference_mode()
def test_linear(dtype, rows, width, outputs, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, width).to(dtype), torch.randn(outputs, width).to(dtype)
    offset = torch.randn(outputs).to(dtype) if bias else None
    expected = reference.linear(x, weight, offset)
    actual = linear(x, weight, offset)
    assert actual.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps * width**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 64), (300, 64), (2, 33)])
@torch.inference_mode()
def test_fp32_linear_keeps_the_sums(dtype, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(50, shape[-1]).to(dtype)
    actual = fp32_linear(x, weight)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, reference.fp32_linear(x, weight), rtol=1e-5, atol=1e-4)


def test_fp32_linear_has_gradients():
    x, weight = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 8, dtype=torch.bfloat16)
    fp32_linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 8), rtol=2e-2, atol=2e-2)
