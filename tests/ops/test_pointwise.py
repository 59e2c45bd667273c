"""Norm, rotation and gate, all backends, against their formulas in fp64, without changing inputs."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from lamella.ops.backend import portable_only
from lamella.ops.operands import ResidualNorm, Rope
from lamella.ops.rms_norm import add_rms_norm, rms_norm
from lamella.ops.rms_norm import reference as norm_reference
from lamella.ops.rotary import angles, rotate, temperature
from lamella.ops.rotary import reference as rotary_reference
from lamella.ops.swiglu import reference as swiglu_reference
from lamella.ops.swiglu import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (3, 7), (5, 64), (2, 129)]


def close(actual, expected, dtype):
    """Check equality within the rounding of one operation in `dtype`."""
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=torch.finfo(dtype).eps * 4, atol=1e-6)


def strided(*shape, dtype):
    """Return a random tensor with strided rows and NaN between them."""
    base = torch.full((*shape[:-1], shape[-1] + 3), torch.nan)
    base[..., : shape[-1]] = torch.randn(shape)
    return base.to(dtype)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@torch.inference_mode()
def test_rms_norm(dtype, rows, width):
    x, weight = strided(rows, width, dtype=dtype), torch.rand(width) + 0.5
    x_fp32 = x.double()
    expected = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + 1e-5) * weight.double()
    before = x.clone()
    for function in (rms_norm, norm_reference.rms_norm):
        close(function(x, weight, 1e-5), expected, dtype)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "width"), SIZES)
@torch.inference_mode()
def test_a_norm_that_rounds_twice_has_the_bits_of_transformers(dtype, rows, width):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    theirs = LlamaRMSNorm(width, 1e-5).to(dtype)
    theirs.weight.uniform_(0.5, 1.5)
    x = strided(rows, width, dtype=dtype)
    assert torch.equal(rms_norm(x, theirs.weight.float(), 1e-5, twice=True), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
@torch.inference_mode()
def test_rms_norm_of_heads(dtype):
    x, weight = strided(5, 3 * 32, dtype=dtype)[:, :64].unflatten(-1, (2, 32)), torch.rand(32) + 0.5
    x_fp32 = x.double()
    expected = x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + 1e-6) * weight.double()
    close(rms_norm(x, weight, 1e-6), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@torch.inference_mode()
def test_add_rms_norm(dtype, rows, width):
    x, residual = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)
    weight = torch.rand(width) + 0.5
    total = (x.float() + residual.float()).to(dtype)
    before = x.clone(), residual.clone()
    for function in (add_rms_norm, norm_reference.add_rms_norm):
        normed, kept = function(x, ResidualNorm(residual, weight, 1e-5))
        assert torch.equal(kept, total)
        x_fp32 = total.double()
        close(normed, x_fp32 * torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + 1e-5) * weight.double(), dtype)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 8])
@torch.inference_mode()
def test_rotate(dtype, interleaved, pairs):
    qkv = torch.randn(6, (3 + 2 + 2) * 16).to(dtype)
    q, k, _ = (part.unflatten(-1, (-1, 16)) for part in qkv.split((48, 32, 32), dim=-1))
    angles = torch.rand(6, pairs) * 6
    before = qkv.clone()
    rope = Rope(angles.cos(), angles.sin(), interleaved)
    turned, plain = rotate(q, k, rope), rotary_reference.rotate_heads(q, k, rope)
    for result in (turned, plain):
        for x, y in zip((q, k), result, strict=True):
            first = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
            second = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
            complex_in = torch.complex(x[..., first].double(), x[..., second].double())
            complex_out = complex_in * torch.polar(torch.ones(6, pairs).double(), angles.double())[:, None]
            torch.testing.assert_close(
                torch.complex(y[..., first].double(), y[..., second].double()),
                complex_out,
                rtol=torch.finfo(dtype).eps * 4,
                atol=torch.finfo(dtype).eps * 4,
            )
            assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
@torch.inference_mode()
def test_swiglu(dtype, rows, width):
    x = strided(rows, 2 * width, dtype=dtype)
    gate, up = x.double().chunk(2, -1)
    for function in (swiglu, swiglu_reference.swiglu):
        close(function(x), gate * torch.sigmoid(gate) * up, dtype)


def test_compiled_layers_share_the_angles_and_temperatures_of_a_step():
    """Compiled layers do not recompute sines or logarithms per head and layer."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def layers(positions, frequencies, q, k):
        cos, sin = angles(positions, frequencies, 1.5, 7)
        for _ in range(2):
            q, k = rotate(q, k, Rope(cos, sin, interleaved=False))
            q = q * temperature(positions, 0.1, 4)[:, None, None]
        return q, k

    inputs = torch.arange(9), torch.rand(4), torch.randn(9, 2, 8), torch.randn(9, 1, 8)
    with torch.inference_mode():
        compiled = torch.compile(layers, backend=aot_autograd(fw_compiler=backend), fullgraph=True)(*inputs)
        with portable_only():
            torch.testing.assert_close(compiled, layers(*inputs), rtol=0, atol=0)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count("lamella.angles.default") == 1 and called.count("lamella.temperature.default") == 2
    assert not [name for name in called if any(function in name for function in ("sin", "cos", "log"))]


def test_operations_on_positions_match_their_schema():
    """Check the schema, meta tensors, and that outputs do not share memory."""
    positions = torch.arange(5)
    torch.library.opcheck(torch.ops.lamella.angles.default, (positions, torch.rand(3), 1.5, 4))
    torch.library.opcheck(torch.ops.lamella.temperature.default, (positions, 0.1, 4))
    cos, sin = angles(positions, torch.rand(3), 1.5)
    assert cos.untyped_storage().data_ptr() != sin.untyped_storage().data_ptr()
