"""Linear methods in a file's own format: choice, loading, sharding, and fused kernels."""

from __future__ import annotations

import copy
import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from checkpoint.test_quantized_files import compressed, narrow
from helpers import canon_checkpoint, hf_checkpoint, plain_logits, random_prompts
from lamella import LLM, SamplingParams
from lamella.bench.ops import time_ops
from lamella.checkpoint import linear_methods, load_model, open_checkpoint
from lamella.checkpoint.linear_methods import register_linear_method
from lamella.errors import CheckpointError
from lamella.layers import sublayer_input
from lamella.layers.linear import DENSE, DenseMethod, Linear, MergedLinear
from lamella.layers.norm import RMSNorm
from lamella.layers.parameters import ParameterLayout
from lamella.layers.sublayer_input import SublayerInput
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition, Split
from lamella.parity import compare

CPU = torch.device("cpu")
PROJECTION = re.compile(r"(self_attn|mlp)\.\w+_proj\.weight$")


class Int8Rows:
    """Linear method with int8 weights and one scale per output channel, as in the file."""

    def create(self, shape):
        numbers = torch.empty(shape.outputs.size, shape.inputs.size, dtype=torch.int8, device=shape.device)
        scales = torch.empty(shape.outputs.size, 1, dtype=torch.float32, device=shape.device)
        return {
            "weight": (nn.Parameter(numbers, False), ParameterLayout((shape.outputs, shape.inputs), shape.parts)),
            "weight_scale": (nn.Parameter(scales, False), ParameterLayout((shape.outputs,), shape.parts)),
        }

    def load(self, name, place, splits, tensors):
        place.copy_(tensors.load(name, splits))

    def apply(self, linear, x, bias):
        weight = linear.weight.float() * linear.weight_scale
        return nn.functional.linear(x, weight.to(x.dtype), bias)


def int8_rows(quantization, tensors, names):
    """Return `Int8Rows` for weights with one scale per row and no zero points."""
    whole = all(tensors.shape(f"{name}_scale") == (tensors.shape(name)[0], 1) for name in names)
    symmetric = not any(f"{name}_zero_point" in tensors.names() for name in names)
    return Int8Rows() if quantization.method == "compressed-tensors" and whole and symmetric else None


def quantize(folder, only=PROJECTION):
    """Replace the projections of a checkpoint by int8 numbers and scales."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if only.search(name)]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name], _ = narrow(tensors[name], scale, torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    values = json.loads((folder / "config.json").read_text())
    stated = {"quantization_config": compressed("int-quantized", strategy="channel"), "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(values | stated))
    return folder


@pytest.fixture
def folder(tmp_path):
    return quantize(canon_checkpoint(tmp_path, qk_norm=True, attention_bias=True))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(linear_methods, "_factories", [])
    register_linear_method(int8_rows)


def linears(model):
    return {path: module for path, module in model.named_modules() if isinstance(module, Linear)}


@torch.no_grad()
@pytest.mark.parametrize("rank", [None, 0, 1])
def test_method_equals_dequantized_weights(folder, registered, rank, monkeypatch):
    group = None if rank is None else Group(Partition(rank, 2))
    model = load_model(open_checkpoint(folder), group=group)
    kept = {path for path, module in linears(model).items() if isinstance(module.method, Int8Rows)}
    assert len(kept) == 2 * 4 and all(path.endswith("_proj") for path in kept)
    monkeypatch.setattr(linear_methods, "_factories", [])
    dense = load_model(open_checkpoint(folder), group=group)
    for path, module in linears(dense).items():
        other = linears(model)[path]
        x = torch.randn(3, module.weight.shape[1])
        torch.testing.assert_close(other(x), module(x), atol=1e-5, rtol=1e-5)
        assert path not in kept or (other.weight.dtype, module.weight.dtype) == (torch.int8, torch.float32)
    if rank is None:
        ids = torch.arange(40)[None]
        torch.testing.assert_close(plain_logits(model, ids), plain_logits(dense, ids), atol=1e-5, rtol=1e-5)


def test_engine_tokens_equal_the_dequantized_model(folder, registered, monkeypatch):
    def tokens():
        llm = LLM(folder, device="cpu", max_num_batched_tokens=8, num_blocks=20)
        outputs = llm.generate(random_prompts([3, 20]), SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
        return llm.engine.model, [output.outputs[0].token_ids for output in outputs]

    model, kept = tokens()
    assert any(parameter.dtype == torch.int8 for parameter in model.parameters())
    monkeypatch.setattr(linear_methods, "_factories", [])
    model, dequantized = tokens()
    assert kept == dequantized and all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_parity_reference_uses_dequantized_weights(folder, registered):
    result = compare(folder, device="cpu", prompts="random", count=2, prompt_len=12, decode_len=4)
    assert result.engine.rms < 1e-5


def test_bench_ops_without_dense_weights(folder, registered):
    llm = LLM(folder, device="cpu", num_blocks=20)
    timed = {timing.op.rpartition(".")[2]: timing for timing in time_ops(llm, 2, 8, 10.0)}
    assert {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} <= set(timed)
    assert all(timing.error < 1e-4 for timing in timed.values())


def test_dequantization_is_logged(folder, monkeypatch, caplog):
    monkeypatch.setattr(linear_methods, "_factories", [])
    for factories, expected in (([], "14 tensors (compressed-tensors) are"), ([int8_rows], "0 tensors (compressed-")):
        linear_methods._factories[:] = factories
        caplog.clear()
        with caplog.at_level(logging.INFO, "lamella"):
            load_model(open_checkpoint(folder))
        (line,) = (record.message for record in caplog.records if "dequantised" in record.message)
        assert expected in line and ("14 are kept in their format" in line) == bool(factories)


def test_partly_quantized_module_is_dequantized(tmp_path, registered):
    """A method for the whole module would use quantized numbers as weights."""
    folder = quantize(canon_checkpoint(tmp_path), re.compile(r"(q_proj|k_proj|o_proj)\.weight$"))
    model = load_model(open_checkpoint(folder))
    methods = {path.rpartition(".")[2]: type(module.method) for path, module in linears(model).items()}
    assert methods["o_proj"] is Int8Rows and issubclass(methods["qkv_proj"], DenseMethod)
    weight = model.model.layers[0].mixer.qkv_proj.weight
    stored = load_file(folder / "model.safetensors")
    rows = [stored[f"model.layers.0.self_attn.{part}_proj.weight"].float() for part in "qkv"]
    scales = [stored[f"model.layers.0.self_attn.{part}_proj.weight_scale"] for part in "qk"]
    assert torch.equal(weight, torch.cat((rows[0] * scales[0], rows[1] * scales[1], rows[2])))


def test_missing_scale_is_named(folder, registered):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight_scale"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight is torch\.int8, and no scale"):
        load_model(open_checkpoint(folder))


def test_last_registered_method_has_precedence(folder, registered):
    asked = []
    register_linear_method(lambda quantization, tensors, names: asked.append(tuple(names)))
    model = load_model(open_checkpoint(folder))
    assert ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight") in asked
    assert any(isinstance(module.method, Int8Rows) for module in linears(model).values())


@torch.no_grad()
def test_fused_kernels_do_not_read_quantized_weights(monkeypatch):
    """Fused kernels read `weight` of the module, which here contains numbers without their scale."""
    monkeypatch.setattr(sublayer_input, "fuses", lambda x, weight: True)
    monkeypatch.setattr(sublayer_input, "fused_linear", lambda *args, **options: pytest.fail("read the weight"))
    norm = RMSNorm(6, 1e-5, CPU)
    norm.weight.fill_(1.0)
    linear = MergedLinear(
        Split.whole(6), {"a": Split.whole(2), "b": Split.whole(2)}, True, torch.float32, CPU, Int8Rows()
    )
    linear.weight.copy_(torch.randint(-9, 9, (4, 6)))
    linear.weight_scale.fill_(0.25)
    linear.bias.fill_(1.0)
    hidden, residual = torch.randn(3, 6), torch.randn(3, 6)
    entry = SublayerInput(hidden, residual, norm, None)
    assert not entry.fuses(linear)
    expected = nn.functional.linear(norm(hidden + residual), linear.weight.float() * 0.25, linear.bias)
    torch.testing.assert_close(entry.project(linear), expected)
    dense = MergedLinear(Split.whole(6), {"a": Split.whole(4)}, False, torch.float32, CPU)
    assert SublayerInput(hidden, residual, norm, None).fuses(dense)


class Doubled(DenseMethod):
    """Dense method with an additional operation after the product, like an adapter."""

    def apply(self, linear, x, bias):
        return super().apply(linear, 2 * x, bias)


def test_wrapped_dense_method_disables_fused_kernels():
    arguments = Split.whole(3), Split.whole(2), False, torch.float32, CPU
    assert Linear(*arguments, Doubled()).dense_weight is None
    linear = Linear(*arguments)
    assert linear.method is DENSE and linear.dense_weight is linear.weight
    assert copy.deepcopy(linear).dense_weight is not None


def test_files_that_are_not_quantized_have_dense_methods(tmp_path, registered):
    from transformers import LlamaConfig

    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    hf_checkpoint(tmp_path, LlamaConfig(**sizes))
    assert all(module.method is DENSE for module in linears(load_model(open_checkpoint(tmp_path))).values())
