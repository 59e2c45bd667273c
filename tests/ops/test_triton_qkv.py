"""Triton's `prepare_qkv` against the composition of the references and of the separate kernels."""

from __future__ import annotations

import pytest
import torch

from lamella.ops.operands import (
    ConvState,
    ConvStep,
    ConvWeights,
    HeadNorms,
    HeadSizes,
    PagedCache,
    QKVSteps,
    Rope,
)
from lamella.ops.qkv import reference
from lamella.ops.ragged import RaggedBatch

pytest.importorskip("triton")

from covering import covering
from lamella.ops.qkv.triton import prepare_qkv
from lamella.ops.rms_norm.triton import rms_norm
from lamella.ops.short_conv.triton import short_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# Heads, key/value heads, channels of a head, rotated pairs of them.
SHAPES = [(4, 2, 16, 8), (3, 1, 80, 16), (5, 5, 24, 12), (2, 1, 256, 128), (8, 2, 32, 3), (4, 2, 64, 0)]


class Case:
    """Random arguments; `step` makes fresh copies of operands that are changed in place."""

    def __init__(self, shape, tokens, dtype, norm=True, caches=True, interleaved=False):
        self.heads, self.kv_heads, self.dim, pairs = shape
        self.dtype, self.caches = dtype, caches
        self.channels = (self.heads + 2 * self.kv_heads) * self.dim
        # Strided rows, each aligned: the order of a norm's sum follows from that.
        x_fp32 = torch.full((tokens, (self.channels + 47) // 16 * 16), torch.nan, device=DEVICE, dtype=dtype)
        self.qkv = x_fp32[:, 16 : 16 + self.channels]
        self.qkv.copy_(torch.randn(tokens, self.channels))
        self.steps = QKVSteps(HeadSizes(self.heads, self.kv_heads, self.dim))
        if norm:
            weights = [torch.rand(self.dim, device=DEVICE) + 0.5 for _ in "qk"]
            self.steps = self.steps._replace(norms=HeadNorms(*weights, 1e-5))
        if pairs:
            angles = torch.rand(tokens, pairs, device=DEVICE) * 6
            self.steps = self.steps._replace(rope=Rope(angles.cos(), angles.sin(), interleaved))
        self.rows = torch.randperm(5 * 4)[:tokens].to(DEVICE)
        self.positions = torch.arange(tokens, device=DEVICE) % 5
        self.slots = torch.randperm(tokens + 2)[:tokens].to(DEVICE)
        self.shared = torch.randn(tokens + 2, 3, self.channels + 32).to(DEVICE, dtype)
        for slot, position in zip(self.slots, self.positions, strict=True):
            self.shared[slot, int(position) :] = torch.nan
        self.weight = torch.randn(self.channels, 4).to(DEVICE, dtype)
        self.bias = torch.randn(self.channels).to(DEVICE, dtype)

    def canon(self):
        shared = self.shared.clone()
        history = shared[:, :, 16 : 16 + self.channels]
        conv = ConvWeights(self.weight, self.bias, True, True)
        return shared, ConvStep(conv, ConvState(history, self.slots), self.positions)

    def run(self, function, qkv=None, token=slice(None), canon=None, **steps):
        """Return (q, k, v); k and v as whole caches if there are any."""
        steps = self.steps._replace(**steps)
        if (rope := steps.rope) is not None:
            cos, sin = (side[token].contiguous() for side in rope[:2])
            steps = steps._replace(rope=rope._replace(cos=cos, sin=sin))
        cache = None
        if self.caches:
            # Heads of a cache row are strided, as if keys and values share an allocation.
            both = torch.full((5, 4, self.kv_heads, 2, self.dim), torch.nan, device=DEVICE, dtype=self.dtype)
            cache = PagedCache(both[..., 0, :], both[..., 1, :], torch.empty(0), self.rows[token])
        qkv = self.qkv if qkv is None else qkv
        q, k, v = function(qkv[token], steps, cache, canon)
        assert q.is_contiguous()
        if self.caches:
            assert k is None and v is None
            k, v = both.unbind(3)
        return q, k, v


def close(actual, expected, steps=1):
    eps = torch.finfo(actual.dtype).eps
    tolerance = 40 * eps if actual.dtype == torch.float32 else steps * eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def same(a, b):
    """Return True for bitwise equality; NaN equals NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@covering(
    {
        "shape": SHAPES,
        "norm,caches,interleaved": [(True, True, False), (False, True, True), (True, False, True)],
        "dtype": DTYPES,
    }
)
def test_prepare(dtype, shape, norm, caches, interleaved):
    case = Case(shape, 7, dtype, norm, caches, interleaved)
    before = case.qkv.clone()
    results = case.run(prepare_qkv)
    # A norm that is rounded the other way moves the rotation's result by a step of its larger part.
    for actual, expected in zip(results, case.run(reference.prepare_qkv), strict=True):
        close(actual, expected, steps=2 if norm else 1)
    assert torch.equal(case.qkv, before)
    alone = case.run(prepare_qkv, token=slice(3, 4))
    assert torch.equal(alone[0], results[0][3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_is_that_of_its_own_kernel(dtype, shape):
    case = Case((*shape[:3], 0), 5, dtype, caches=False)
    parts = case.qkv.unflatten(-1, (-1, case.dim)).split((case.heads, case.kv_heads, case.kv_heads), dim=1)
    q, k, v = case.run(prepare_qkv)
    assert torch.equal(q, rms_norm(parts[0], case.steps.norms.q, 1e-5))
    assert torch.equal(k, rms_norm(parts[1], case.steps.norms.k, 1e-5))
    assert torch.equal(v, parts[2])


@covering({"shape": SHAPES, "dtype": DTYPES, "interleaved": [False, True]})
def test_canon(dtype, shape, interleaved):
    """Bitwise equal to norm, convolution and rotation in sequence; near the reference."""
    case = Case(shape, 6, dtype, interleaved=interleaved)
    shared, canon = case.canon()
    results = case.run(prepare_qkv, canon=canon)

    expected_shared, step = case.canon()
    batch = RaggedBatch.from_lengths([1] * 6, [int(p) + 1 for p in case.positions], DEVICE)
    q, k, v = case.qkv.unflatten(-1, (-1, case.dim)).split((case.heads, case.kv_heads, case.kv_heads), dim=1)
    q, k = rms_norm(q, case.steps.norms.q, 1e-5), rms_norm(k, case.steps.norms.k, 1e-5)
    joined = short_conv(torch.cat((q, k, v), dim=1).flatten(1), step.weights, batch, step.state)
    composed = case.run(prepare_qkv, qkv=joined, norms=None)
    assert all(same(fused, plain) for fused, plain in zip(results, composed, strict=True))
    assert same(shared, expected_shared)

    expected_shared, step = case.canon()
    expected = case.run(reference.prepare_qkv, canon=step)
    for actual, wanted in zip(results, expected, strict=True):
        close(actual, wanted, steps=8)
    close(shared, expected_shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "interleaved"), [((4, 2, 64, 0), False), ((3, 1, 80, 16), False), (SHAPES[0], True)])
def test_the_factor_of_a_token_applies_to_queries_only(dtype, shape, interleaved):
    case = Case(shape, 7, dtype, norm=interleaved, interleaved=interleaved)
    factor = torch.rand(7, device=DEVICE) + 1
    results = case.run(prepare_qkv, q_scale=factor)
    for actual, expected in zip(results, case.run(reference.prepare_qkv, q_scale=factor), strict=True):
        close(actual, expected, steps=3)
    plain = case.run(prepare_qkv)
    assert torch.equal(results[0], (plain[0].float() * factor[:, None, None]).to(dtype))
    assert all(same(ours, theirs) for ours, theirs in zip(results[1:], plain[1:], strict=True))
