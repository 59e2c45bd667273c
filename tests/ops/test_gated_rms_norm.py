"""Gated norm and its Triton kernel against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from recurrences import close, rows_apart

from lamella.ops.gated_rms_norm import gated_rms_norm, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def operands(tokens, heads, width, dtype, device):
    generator = torch.Generator().manual_seed(width)
    x, gate = (torch.randn(tokens, heads, width, generator=generator).to(device, dtype) for _ in range(2))
    x[0, 0] = 0
    return rows_apart(x, 8), rows_apart(gate, 16), (torch.rand(width, generator=generator) + 0.5).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(dtype, activation):
    x, gate, weight = operands(5, 3, 20, dtype, "cpu")
    before = x.clone(), gate.clone()
    with torch.inference_mode():
        y = gated_rms_norm(x, gate, weight, 1e-5, activation)
    x_fp32, opened = x.double(), 1 / (1 + (-gate.double()).exp())
    expected = x_fp32 / (x_fp32.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() * opened
    close(y, (expected * gate.double() if activation == "silu" else expected).to(dtype), 1e-6, ulps=1)
    assert torch.equal(x, before[0]) and torch.equal(gate, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(5, 3, 20), (1, 1, 1), (3, 2, 128), (2, 1, 300), (37, 5, 64)])
def test_triton_kernel(tokens, heads, width, activation, dtype):
    pytest.importorskip("triton")
    from lamella.ops.gated_rms_norm import triton

    x, gate, weight = operands(tokens, heads, width, dtype, DEVICE)
    y = triton.gated_rms_norm(x, gate, weight, 1e-5, activation)
    assert y.is_contiguous()
    close(y, reference.gated_rms_norm(x, gate, weight, 1e-5, activation), 1e-6, ulps=1)
    # Heads may be strided too, and a head's result does not depend on the others.
    alone = triton.gated_rms_norm(x[:, -1:], gate[:, -1:], weight, 1e-5, activation)
    assert torch.equal(alone, y[:, -1:])
