"""Our product of some rows against the reference, with every way of sharing the inputs, and who is sent to it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lamella.distributed.sharding import Split
from lamella.layers.block_input import BlockInput
from lamella.layers.linear import Linear
from lamella.layers.norm import RMSNorm
from lamella.ops import linear as ops
from lamella.ops.linear import reference
from lamella.ops.linear import triton_rows as fast
from lamella.ops.linear.triton_rows import Settings
from lamella.ops.swiglu.reference import swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # rows, inputs, outputs
    (3, 24, 8),
    (5, 1000, 40),
    (16, 8, 1),
    (17, 2048, 24),
    (64, 1000, 200),
    (100, 264, 1000),
    (129, 128, 64),
    (256, 520, 72),
]
SETTINGS = [
    Settings(16, 64, 64, 1, 4, 3),
    Settings(32, 128, 32, 2, 4, 2),
    Settings(64, 64, 128, 3, 8, 2),
    Settings(128, 64, 64, 8, 4, 3),
    Settings(256, 128, 16, 4, 8, 2),
]


def operands(rows, size, outputs, dtype=torch.bfloat16, seed=0):
    """x, weight and bias, each amid NaN."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, around, scale=1.0):
        values = torch.full([n + 2 * more for n, more in zip(shape, around, strict=True)], torch.nan, dtype=dtype)
        inside = values[tuple(slice(more, more + n) for n, more in zip(shape, around, strict=True))]
        inside.copy_(torch.randn(*shape, generator=generator) * scale)
        return values.to(DEVICE)[tuple(slice(more, more + n) for n, more in zip(shape, around, strict=True))]

    x = random(rows, size, around=(2, 8))
    return x, random(outputs, size, around=(8, 0), scale=size**-0.5), random(outputs, around=(5,))


def close(ours, expected, dtype):
    eps = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-5}[dtype]
    torch.testing.assert_close(ours.float(), expected.float(), rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_product(shape, dtype, with_bias):
    x, weight, bias = operands(*shape, dtype)
    bias = bias if with_bias else None
    before = x.clone(), weight.clone()
    assert fast.serves(x, weight) and not x.is_contiguous()
    ours = fast.linear(x, weight, bias)
    assert ours.dtype == dtype and ours.is_contiguous()
    close(ours, reference.linear(x, weight, bias), dtype)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_before_a_gate(shape, with_bias):
    rows, size, outputs = shape
    x, weight, bias = operands(rows, size, 2 * outputs)
    bias = bias if with_bias else None
    ours = fast.linear(x, weight, bias, gated=True)
    # The composition rounds the product, the kernel does not.
    expected = swiglu(reference.linear(x.float(), weight.float(), None if bias is None else bias.float()))
    assert ours.shape == (rows, outputs)
    close(ours, expected, torch.bfloat16)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(5, 1000, 40), (70, 264, 200), (140, 136, 72)])
def test_any_settings(settings, gated, shape):
    rows, size, outputs = shape
    x, weight, bias = operands(rows, size, 2 * outputs if gated else outputs)
    first, second = (fast.linear(x, weight, bias, wide=True, gated=gated, settings=settings) for _ in range(2))
    expected = reference.linear(x.float(), weight.float(), bias.float())
    assert first.dtype == torch.float32
    close(first, swiglu(expected) if gated else expected, torch.float32)
    assert torch.equal(first, second), "not the same bits twice"


@pytest.mark.parametrize("settings", [None, *SETTINGS])
def test_a_row_does_not_depend_on_what_the_others_hold(settings):
    x, weight, bias = operands(70, 264, 50)
    together = fast.linear(x, weight, bias, settings=settings)
    others = x.clone()
    others[:33], others[34:] = torch.nan, torch.inf
    assert torch.equal(fast.linear(others, weight, bias, settings=settings)[33], together[33])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [5, 64, 200])
def test_one_behind_the_other_in_a_graph(rows):
    """Kernels that start before their predecessor has ended read what it gives, and nothing sooner."""
    sizes = [(1024, 2048), (2048, 1024)] * 6
    weights = [operands(3, *size, seed=seed)[1] for seed, size in enumerate(sizes)]
    start = operands(rows, 1024, 1)[0]

    def run(between):
        x = start
        for weight in weights:
            x = fast.linear(x, weight, None, gated=weight is weights[-1])
            between()
        return x

    expected = run(torch.cuda.synchronize)
    assert expected.isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = run(lambda: None)
    for _ in range(5):
        ours.zero_()
        graph.replay()
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("rows", [3, 16, 64, 128, 256])
@pytest.mark.parametrize("shape", [(64, 8), (1024, 4096), (3072, 1024), (8192, 2048), (4096, 28672)])
def test_the_settings_chosen_are_possible(rows, gated, shape):
    size, outputs = shape
    settings = fast.choose(rows, outputs, size, gated)
    assert settings.rows >= min(rows, 128) and settings.num_stages >= 2
    assert settings.splits == 1 or settings.splits * 256 <= size


def test_what_it_does_not_serve(monkeypatch):
    x, weight, _ = operands(5, 264, 50)
    assert fast.serves(x, weight)
    assert not fast.serves(x[:2], weight)
    assert not fast.serves(x[:1].expand(257, -1), weight)
    assert not fast.serves(x.float(), weight.float())
    assert not fast.serves(x[:, :260], weight[:, :260].contiguous())
    assert not fast.serves(x, weight.T.contiguous().T)
    assert not fast.serves(x[:, :256], weight.flatten()[4 : 4 + 50 * 256].view(50, 256))
    monkeypatch.setattr(fast, "_LARGE", weight.numel())
    assert not fast.serves(x, weight)


@pytest.fixture
def called(monkeypatch):
    """The names of our kernels that are called from here on, also where there is no GPU."""
    calls = []
    if DEVICE == "cpu":
        for name in ("use_triton", "use_fused"):
            monkeypatch.setattr(ops, name, lambda x: True)
        monkeypatch.setattr(ops, "use_native", lambda x: False)
    kernel = fast.linear

    def watched(*args, **kwargs):
        calls.append("gated" if kwargs.get("gated") else "plain")
        return kernel(*args, **kwargs)

    monkeypatch.setattr(fast, "linear", watched)
    return calls


@torch.inference_mode()
def test_products_are_sent_to_it(called):
    x, weight, bias = operands(20, 264, 50)
    close(ops.linear(x, weight, bias), reference.linear(x, weight, bias), torch.bfloat16)
    wide = ops.wide_linear(x, weight)
    assert wide.dtype == torch.float32
    close(wide, reference.wide_linear(x, weight), torch.float32)
    assert called == ["plain", "plain"]
    close(ops.linear(x[:2], weight, bias), reference.linear(x[:2], weight, bias), torch.bfloat16)
    assert called == ["plain", "plain"]
    assert ops.fuses(x, weight, {"gated"}) and not ops.fuses(x, weight, {"gated", "norm"})
    assert ops.fuses(x[:2], weight, {"gated", "norm", "conv"})


@torch.inference_mode()
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_block_has_its_gate_in_the_product(called, with_bias):
    hidden, weight, bias = operands(20, 264, 100)
    residual, _, _ = operands(20, 264, 1, seed=1)
    device = torch.device(DEVICE)
    projection = Linear(Split.whole(264), Split.whole(100), with_bias, torch.bfloat16, device)
    projection.weight.copy_(weight)
    if with_bias:
        projection.bias.copy_(bias)
    norm = RMSNorm(264, 1e-5, device)
    norm.weight.uniform_(0.5, 1.5)
    normed, total = norm(hidden, residual)
    expected = reference.linear(normed.float(), weight.float(), bias.float() if with_bias else None)
    entry = BlockInput(hidden, residual, norm, None)
    close(entry.project(projection, gated=True), swiglu(expected), torch.bfloat16)
    assert torch.equal(entry.residual, total)
    close(BlockInput(hidden, residual, norm, None).project(projection), expected, torch.bfloat16)
    assert called == ["gated", "plain"]
