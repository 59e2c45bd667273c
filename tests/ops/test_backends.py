"""Tables of backends: their choices, a reference at the end of each, and each backend against its reference."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lamella.cli.main import main
from lamella.ops import backend, catalogue
from lamella.ops.attention.paged import AttentionPlan, AttentionSpace
from lamella.ops.backend import PORTABLE, BackendTable, portable_only, separate_operations, use_fused
from lamella.ops.operands import (
    ConvState,
    ConvStep,
    ConvWeights,
    HeadNorms,
    HeadSizes,
    PagedCache,
    QKVSteps,
    RecurrentState,
    ResidualNorm,
    Rope,
)
from lamella.ops.ragged import RaggedBatch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TABLES = {table.name: table for table in catalogue.tables()}
BACKENDS = [(name, each.name) for name, table in TABLES.items() for each in (*table.backends[:-1], *table.parts)]
Arguments = tuple[object, ...]


class Inputs:
    """Random arguments of each operation, equal at every call, in fresh memory for each backend."""

    def __init__(self, dtype: torch.dtype, decodes: bool, backend: str) -> None:
        flashinfer, self.native = backend == "flashinfer", backend == "native"
        self.device = torch.device("cpu") if self.native else DEVICE
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(0)
        self.flashinfer, self.dim = flashinfer, 64 if flashinfer else 16
        self.lengths = ([1, 1, 1], [5, 1, 9]) if decodes else ([1, 1, 7], [5, 1, 9])
        self.batch = RaggedBatch.from_lengths(*self.lengths, self.device)
        self.slots = torch.tensor([2, 0, 3], device=self.device)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def draw_fp32(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def conv(self, channels: int) -> tuple[Tensor, ConvWeights, RaggedBatch, ConvState]:
        state = ConvState(self.random(4, 3, channels), self.slots)
        weights = ConvWeights(self.random(channels, 4), self.random(channels), activation=True, residual=True)
        return self.random(self.batch.num_tokens, channels), weights, self.batch, state

    def norm(self, width: int) -> ResidualNorm:
        return ResidualNorm(self.random(self.batch.num_tokens, width), self.draw_fp32(width), 1e-5)

    def cache(self) -> PagedCache:
        table = torch.tensor([[3, 1, 5], [2, 0, 0], [4, 6, 7]], dtype=torch.int32, device=self.device)
        blocks = table[self.batch.token_request, self.batch.positions // 4].long()
        return PagedCache(
            self.random(8, 4, 2, 16), self.random(8, 4, 2, 16), table, blocks * 4 + self.batch.positions % 4
        )

    def steps(self) -> QKVSteps:
        tokens = self.batch.num_tokens
        norms = HeadNorms(self.draw_fp32(16), self.draw_fp32(16), 1e-5)
        return QKVSteps(HeadSizes(4, 2, 16), norms, Rope(self.draw_fp32(tokens, 8), self.draw_fp32(tokens, 8), False))

    def plan(self) -> AttentionPlan | None:
        if self.native:
            return None
        pytest.importorskip("triton")
        space = AttentionSpace(3, 12, self.device)
        listed = torch.tensor([4, 6, 7], dtype=torch.int32, device=self.device)
        listed = listed[: 0 if self.batch.num_decodes == 3 else 3]
        return AttentionPlan(space, self.batch, listed, 4, 2, self.dim, 4, self.dtype, 0.25, None, self.flashinfer)

    def arguments(self, op: str) -> Arguments:
        """Return fresh arguments of an operation."""
        return getattr(self, f"of_{op}")()

    def of_swiglu(self) -> Arguments:
        return (self.random(3, 40),)

    def of_rms_norm(self) -> Arguments:
        return self.random(3, 40), self.draw_fp32(40), 1e-5

    def of_add_rms_norm(self) -> Arguments:
        return self.random(self.batch.num_tokens, 40), self.norm(40)

    def of_gated_rms_norm(self) -> Arguments:
        return self.random(3, 2, 16), self.random(3, 2, 16), self.draw_fp32(16), 1e-5, "sigmoid"

    def of_rotate(self) -> Arguments:
        return (
            self.random(3, 4, 16),
            self.random(3, 2, 16),
            Rope(self.draw_fp32(3, 6), self.draw_fp32(3, 6), True),
        )

    def of_angles(self) -> Arguments:
        return torch.arange(9, device=self.device), self.draw_fp32(5), 1.5, 4

    def of_temperature(self) -> Arguments:
        return torch.arange(9, device=self.device), 0.5, 2

    def of_short_conv(self) -> Arguments:
        return self.conv(40)

    def of_short_conv_swiglu(self) -> Arguments:
        return self.conv(40)

    def of_norm_short_conv(self) -> Arguments:
        x, *rest = self.conv(40)
        return x, self.norm(40), *rest

    def of_prepare_qkv(self) -> Arguments:
        return self.random(self.batch.num_tokens, 8 * 16), self.steps(), self.cache()

    def of_linear(self) -> Arguments:
        return self.random(2, 64), self.random(24, 64) / 8, self.random(24)

    def of_fp32_linear(self) -> Arguments:
        return self.random(2, 64), self.random(24, 64) / 8

    def of_fused_linear(self) -> Arguments:
        norm = ResidualNorm(self.random(2, 64), self.draw_fp32(64), 1e-5)
        conv = ConvWeights(self.random(24, 4), None, activation=False, residual=True)
        state = ConvState(self.random(4, 3, 24), self.slots[:2])
        step = ConvStep(conv, state, torch.tensor([4, 0], device=self.device))
        return self.random(2, 64), self.random(24, 64) / 8, self.random(24), True, norm, step

    def of_delta_rule(self) -> Arguments:
        tokens, random, draw_fp32 = self.batch.num_tokens, self.random, self.draw_fp32
        operands = random(tokens, 2, 16), random(tokens, 2, 16), random(tokens, 4, 8), random(tokens, 4)
        state = RecurrentState(draw_fp32(4, 4, 16, 8), self.slots)
        return *operands, random(tokens, 4), draw_fp32(4), draw_fp32(4), self.batch, state

    def of_selective_scan(self) -> Arguments:
        tokens, random, draw_fp32 = self.batch.num_tokens, self.random, self.draw_fp32
        inputs = random(tokens, 2, 16), random(tokens, 4, 16), random(tokens, 2, 8), random(tokens, 4, 8)
        constants = draw_fp32(4, 16, 8), draw_fp32(4, 16), draw_fp32(4, 16)
        return (
            *inputs,
            random(tokens, 4, 16),
            *constants,
            self.batch,
            RecurrentState(draw_fp32(4, 4, 16, 8), self.slots),
        )

    def of_experts(self) -> Arguments:
        gate_up, down = self.random(5, 32, 16) / 4, self.random(5, 16, 16) / 4
        return self.random(6, 16), self.draw_fp32(6, 5), 2, gate_up, down, self.random(6, 16)

    def of_causal_attention(self) -> Arguments:
        batch = RaggedBatch.from_lengths([2, 7], [2, 7], self.device)
        return self.random(9, 4, 16), self.random(9, 2, 16), self.random(9, 2, 16), batch, 0.25, 3

    def of_write_kv(self) -> Arguments:
        tokens = self.batch.num_tokens
        return self.random(tokens, 2, 16), self.random(tokens, 2, 16), self.cache()

    def of_paged_attention(self) -> Arguments:
        return self.random(self.batch.num_tokens, 4, self.dim), self.cache(), self.batch, 0.25, None, None, self.plan()

    def of_decode_prepared(self) -> Arguments:
        qkv = self.random(self.batch.num_tokens, 8 * 16)
        return qkv, self.steps(), self.cache(), self.batch, 0.25, None, None, self.plan()

    def of_placeholder_tokens(self) -> Arguments:
        return torch.tensor([5, -1, 7, -3, -2], device=self.device), torch.tensor([8, 9, -1], device=self.device)


def tensors(value: object) -> Iterator[Tensor]:
    """Yield all tensors of nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors(each)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_ends_with_a_reference_that_serves_everything(name):
    last = TABLES[name].backends[-1]
    assert last.name == "reference" and last.limits is None and last.within is None
    assert set(last.platforms) == {"triton", "native", PORTABLE}
    assert [each.name for each in TABLES[name].backends].count("reference") == 1


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_every_backend_takes_the_declared_arguments(op, name):
    """Parameters have equal names, order and defaults."""
    table = TABLES[op]
    declared = inspect.signature(table.declared).parameters.values()
    own = inspect.signature(table.get(name)).parameters.values()
    expected = [(each.name, each.default) for each in declared]
    found = [(each.name, each.default) for each in own if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [default for _, default in found if default is not inspect.Parameter.empty] == [
        default for _, default in expected if default is not inspect.Parameter.empty
    ]


@pytest.mark.parametrize(("op", "name"), BACKENDS)
def test_every_backend_computes_what_its_reference_computes(op, name):
    """Compare results and everything that is written, in fp32, or in bf16 if a kernel does not support fp32."""
    if name == "triton":
        pytest.importorskip("triton")
    missing = catalogue.why_missing(name)
    if missing is not None and name != "triton":  # Triton's kernels run in its interpreter
        pytest.skip(missing)
    narrow = name in ("fla", "flashinfer") or (name == "triton" and "linear" in op)
    dtype, decodes = torch.bfloat16 if narrow else torch.float32, op == "decode_prepared"
    results = []
    for run in (TABLES[op].get(name), TABLES[op].reference):
        arguments = Inputs(dtype, decodes, name).arguments(op)
        with torch.inference_mode():
            results.append((run(*arguments), [each for each in arguments if not isinstance(each, AttentionPlan)]))
    ours, expected = (list(tensors(result)) for result in results)
    assert len(ours) == len(expected) > 0
    for actual, wanted in zip(ours, expected, strict=True):
        assert actual.dtype == wanted.dtype and actual.shape == wanted.shape
        bound = (3e-2 if narrow else 1e-4) * float(wanted.float().abs().max().clamp(min=1.0))
        torch.testing.assert_close(actual.float(), wanted.float(), rtol=bound, atol=bound, equal_nan=True)


def choices(table: BackendTable, key: tuple[object, ...], platform: str, monkeypatch) -> str:
    monkeypatch.setattr(backend, "platform", lambda x: platform)
    chosen = table.choose(*key)
    return next(each.name for each in table.backends if each.run is chosen)


X, WIDE = torch.zeros(2, 64, dtype=torch.bfloat16), torch.zeros(1, 20000)


@pytest.mark.parametrize(
    ("op", "key", "platform", "expected"),
    [
        ("swiglu", (X,), "triton", "triton"),
        ("swiglu", (X,), "native", "native"),
        ("swiglu", (X,), PORTABLE, "reference"),
        ("rms_norm", (X, False), "native", "native"),
        ("rms_norm", (X, True), "native", "reference"),  # the C++ kernel rounds once
        ("rms_norm", (X, True), "triton", "triton"),
        ("rms_norm", (WIDE, False), "triton", "reference"),  # more than a program holds
        ("gated_rms_norm", (X,), "native", "reference"),
        ("paged_attention", (X, None), "triton", "torch"),  # without a plan
        ("paged_attention", (X, object()), "triton", "triton"),
        ("paged_attention", (X, None), "native", "native"),
        ("delta_rule", (X, torch.zeros(1, 1, 257)), "triton", "torch"),
        ("delta_rule", (X, torch.zeros(1, 1, 256)), "triton", "triton"),
        ("selective_scan", (X, torch.zeros(1, 1, 257)), "triton", "torch"),
        ("selective_scan", (X, torch.zeros(1, 1, 257)), "native", "native"),
        ("experts", (X,), "native", "torch"),
        ("norm_short_conv", (X,), "native", "composed"),
        ("fp32_linear", (X.float(), X), "native", "torch"),  # fp32 is not widened
        ("fp32_linear", (X[:0], X), "native", "torch"),
        ("fp32_linear", (X, X), "native", "native"),
        ("linear", (X[:0], X), "native", "torch"),
        ("linear", (torch.zeros(3, 64, dtype=torch.bfloat16), X), "triton", "torch"),  # more rows than the kernel takes
    ],
)
def test_the_table_chooses_by_platform_and_limits(op, key, platform, expected, monkeypatch):
    pytest.importorskip("triton")
    assert choices(TABLES[op], key, platform, monkeypatch) == expected


def test_the_platform_follows_device_dtype_gradients_and_context(monkeypatch):
    monkeypatch.setattr(backend.native, "available", lambda: True)
    narrow, half = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.float16)
    assert backend.platform(narrow) == PORTABLE  # under autograd
    with torch.inference_mode():
        assert backend.platform(narrow) == "native" and backend.platform(half) == PORTABLE
        assert backend.platform(torch.zeros(1, device="meta")) == PORTABLE
        with portable_only():
            assert backend.platform(narrow) == PORTABLE
        monkeypatch.setattr(backend.native, "available", lambda: False)
        assert backend.platform(narrow) == PORTABLE
        monkeypatch.setattr(backend, "platform", lambda x: "triton")
        assert use_fused(narrow)
        with separate_operations():
            assert not use_fused(narrow)


def test_an_operation_without_a_backend_for_its_inputs_says_so(monkeypatch):
    monkeypatch.setattr(backend, "TABLES", [])
    table = BackendTable("nothing", __name__)

    @table.backend("native")
    def run(x: Tensor) -> Tensor:
        return x

    monkeypatch.setattr(backend, "platform", lambda x: PORTABLE)
    with pytest.raises(AssertionError, match=r"^nothing: no backend serves torch\.float32 on cpu$"):
        table.choose(torch.zeros(1))


def test_doctor_prints_every_backend(capsys):
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["operations"]
    for name, table in TABLES.items():
        names = [line.partition(" (")[0] for line in printed[name]]
        assert names == [each.name for each in (*table.backends, *table.parts)]
    assert any("(" in line for lines in printed.values() for line in lines) or torch.cuda.is_available()


def test_the_catalogue_imports_every_package_with_a_table():
    from lamella.ops.catalogue import _PACKAGES

    assert {table.module for table in TABLES.values()} == {f"lamella.ops.{name}" for name in _PACKAGES}
    assert all(callable(table.declared) for table in TABLES.values())
