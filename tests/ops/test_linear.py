"""The dispatched product against the reference, at the sizes around which it changes its path."""

from __future__ import annotations

import pytest
import torch

from lamella.ops.linear import linear, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65])
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
