"""Quantized files: dequantization on every rank and in pieces of any size, and errors."""

from __future__ import annotations

import json
import logging
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import Llama4TextConfig

from checkpoint.test_llama4_files import EXPERTS, TEXT, same, separate_experts, write
from helpers import canon_checkpoint, hf_checkpoint
from lamella import LLM
from lamella.checkpoint import load_model, loader, open_checkpoint
from lamella.checkpoint.convert import convert
from lamella.errors import CheckpointError, ConfigError
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition
from lamella.parity import compare

FP8 = torch.float8_e4m3fn
PROJECTION = re.compile(r"(self_attn|shared_expert|experts\.\d+|feed_forward)\.\w+_proj\.weight$")
FUSED = re.compile(r"experts\.(gate_up|down)_proj$")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return tensors by name and config values of a text checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    hf_checkpoint(folder, Llama4TextConfig(**TEXT))
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def narrow(weight, scale, dtype, offset=0.0):
    """Return the quantized numbers of a weight, and the dequantized weight."""
    value = weight / scale + offset
    number = value.clamp(-448, 448).to(FP8) if dtype == FP8 else value.round().clamp(-128, 127).to(torch.int8)
    return number, (number.float() - offset) * scale


def blocks(weight, rows, columns):
    """Return one scale per block (rows, columns) of a matrix, in the file's shape and in the shape of the weight."""
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    scale = torch.rand(counts) / 100 + 0.01
    return scale, scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]


def compressed(form="float-quantized", **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


def by_channel(name, weight):
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    number, value = narrow(weight, scale.float(), FP8)
    return value, {name: number, f"{name}_scale": scale, f"{name.removesuffix('weight')}input_scale": torch.ones(1)}


def by_tensor(name, weight):
    scale = weight.abs().amax() / 448
    number, value = narrow(weight, scale, FP8)
    more = {f"{name[:-13]}.{kind}_scale": torch.ones(()) for kind in "kv" if name.endswith(f"{kind}_proj.weight")}
    return value, {name: number, f"{name}_scale": scale[None], **more}


def with_offsets(name, weight):
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 255
    offset = (-128 - weight.amin(1, keepdim=True) / scale).round()
    number, value = narrow(weight, scale, torch.int8, offset)
    return value, {name: number, f"{name}_scale": scale, f"{name}_zero_point": offset.to(torch.int8)}


def in_blocks(rows, columns, suffix):
    def quantize(name, weight):
        scale, spread = blocks(weight, rows, columns)
        number, value = narrow(weight, spread, FP8)
        return value, {name: number, name + suffix: scale}

    return quantize


def fbgemm(name, weight):
    if weight.dim() == 2:
        value, tensors = by_channel(name, weight)
        tensors[f"{name.removesuffix('weight')}input_scale_ub"] = tensors.pop(
            f"{name.removesuffix('weight')}input_scale"
        )
        return value, tensors
    scale = weight.abs().amax(1, keepdim=True) / 448  # of outputs: (E, 1, out)
    number, value = narrow(weight, scale, FP8)
    return value, {name: number, f"{name}_scale": scale.transpose(1, 2) if "down" in name else scale}


def modelopt(name, weight):
    scale = weight.abs().amax() / 448
    number, value = narrow(weight, scale, FP8)
    stem = name.removesuffix(".weight") + ("." if name.endswith(".weight") else "_")
    return value, {name: number, f"{stem}weight_scale": scale, f"{stem}input_scale": torch.ones(())}


OWN_FILE = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
FORMS = {
    "channels": (compressed(strategy="channel"), by_channel),
    "tensors": (compressed("naive-quantized", strategy="tensor"), by_tensor),
    "offsets": (compressed("int-quantized", strategy="channel", symmetric=False), with_offsets),
    "blocks": (compressed(strategy="block", block_structure=[5, 7]), in_blocks(5, 7, "_scale")),
    "groups": (compressed(strategy="group", group_size=4), in_blocks(1, 4, "_scale")),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [7, 7]}, in_blocks(7, 7, "_scale_inv")),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fbgemm),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, modelopt),
    "modelopt's file": (OWN_FILE, modelopt),
}


def quantized(original, form):
    """Return the tensors of a quantized file, the dequantized tensors, and the config."""
    torch.manual_seed(0)
    stated, quantize = FORMS[form]
    fused = quantize in (fbgemm, modelopt)
    tensors = original[0] if fused else separate_experts(original[0])
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        if PROJECTION.search(name) or (fused and FUSED.search(name)):
            dequantized[name], parts = quantize(name, tensor.contiguous())
            stored |= parts
        else:
            dequantized[name] = stored[name] = tensor
    values = original[1] if stated is OWN_FILE else original[1] | {"quantization_config": stated}
    return stored, dequantized, values


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_model_equals_dequantized_weights(original, form, size, tmp_path, monkeypatch, caplog):
    stored, dequantized, values = quantized(original, form)
    if FORMS[form][0] is OWN_FILE:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(OWN_FILE))
    (tmp_path / "dequantized").mkdir()
    expected = open_checkpoint(write(tmp_path / "dequantized", dequantized, original[1]))
    monkeypatch.setattr(loader, "_PIECE_BYTES", 3000)  # pieces of a few experts, or of less than one
    with caplog.at_level(logging.INFO, "lamella"):
        checkpoint = open_checkpoint(write(tmp_path, stored, values))
        for rank in range(size):
            group = Group(Partition(rank, size))
            assert same(load_model(checkpoint, group=group), load_model(expected, group=group))
    (line,) = (record.message for record in caplog.records if "dequantised" in record.message)
    scales = sum(name.endswith(("weight_scale", "_scale_inv", "_proj_scale")) for name in stored)
    unread = len(stored) - len(dequantized) - scales - sum("zero_point" in name for name in stored)
    assert f"{scales} tensors (" in line and f"{unread} scales" in line


def test_engine_with_quantized_checkpoint(original, tmp_path):
    stored, dequantized, values = quantized(original, "channels")
    (tmp_path / "dequantized").mkdir()
    write(tmp_path / "dequantized", dequantized, original[1])
    write(tmp_path, stored, values)

    def tokens(folder):
        llm = LLM(folder, device="cpu", dtype="float32", num_blocks=8)
        return llm.generate({"prompt_token_ids": [3, 4, 5]}, use_tqdm=False)[0].outputs[0].token_ids

    assert tokens(tmp_path) == tokens(tmp_path / "dequantized")


def test_parity_uses_the_own_reference(original, tmp_path):
    """The reference gets dequantized weights; transformers would compute something else."""
    stored, _, values = quantized(original, "channels")
    write(tmp_path, stored, values)
    result = compare(tmp_path, dtype="bfloat16", device="cpu", prompts="random", count=2, prompt_len=12, decode_len=4)
    assert result.noise_floor_ratio < 2
    with pytest.raises(ConfigError, match="hf: transformers computes a quantised checkpoint in another way"):
        compare(tmp_path, reference="hf", device="cpu", prompts="random", count=2)


def test_convert_rejects_quantized_files(tmp_path):
    folder = canon_checkpoint(tmp_path / "from")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(CheckpointError, match=r"quantised files are not converted$"):
        convert(folder, tmp_path / "to")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("gptq", r"quantization_config='gptq': must be a mapping"),
        ({"quant_method": "gptq"}, r"quant_method='gptq': weights are dequantised of compressed-tensors"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, r"quant_algo='NVFP4'"),
        (compressed("pack-quantized"), r"format='pack-quantized'"),
        (compressed() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config=.*: is not undone"),
        (compressed() | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config=.*: is not undone"),
        ({"quant_method": "modelopt", "quantization": "FP8"}, r"quantization='FP8': must be a mapping$"),
        ({"quant_method": "fp8", "weight_block_size": "128x128"}, r"weight_block_size='128x128': must be positive int"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]: must be positive int"),
        (compressed(block_structure=[5, "7"]), r"block_structure=\[5, '7'\]: must be positive integers$"),
        (compressed(group_size=0), r"group_size=0: must be positive integers$"),
        (compressed() | {"config_groups": ["group_0"]}, r"config_groups=\['group_0'\]: must be a mapping$"),
        (compressed() | {"config_groups": {"group_0": 8}}, r"group_0=8: must be a mapping$"),
    ],
)
def test_unsupported_quantization_raises(original, config, message, tmp_path):
    tensors, values = original
    with pytest.raises(ConfigError, match=message) as caught:
        open_checkpoint(write(tmp_path, tensors, values | {"quantization_config": config}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(f"{n}_scale"), r"down_proj\.weight is torch\.float8_e4m3fn, and no scale of it is known;"),
        (lambda t, n: t.pop(n), r"missing: .*down_proj\.weight; unexpected: .*down_proj\.weight_scale$"),
        (
            lambda t, n: t.update({n: t[n].float()}),
            r"is torch\.float32, which is not quantized, and has a scale .*weight_scale",
        ),
        (lambda t, n: t.update({n: t[n].view(torch.uint8)}), r"torch\.uint8: packed weights are not supported"),
        (
            lambda t, n: t.update({f"{n}_scale": torch.ones(3, 1)}),
            r"weight_scale has shape \(3, 1\), and .* \(32, 24\)$",
        ),
        (lambda t, n: t.update({f"{n}_scale_inv": torch.ones(1)}), r"several scales: .*_scale, .*_scale_inv$"),
        (lambda t, n: t.update({f"{n}_g_idx": torch.ones(24)}), r"unexpected: .*weight_g_idx$"),
    ],
)
def test_misfitting_tensors_are_named(original, change, message, tmp_path):
    stored, _, values = quantized(original, "channels")
    change(stored, f"{EXPERTS}.0.down_proj.weight")
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(open_checkpoint(write(tmp_path, stored, values)))
    assert "\n" not in str(caught.value)


def test_missing_dtype_of_quantized_files_raises(original, tmp_path):
    stored, _, values = quantized(original, "channels")
    values = {key: value for key, value in values.items() if key not in ("dtype", "torch_dtype")}
    with pytest.raises(ConfigError, match="dtype='auto': the weights are quantised"):
        load_model(open_checkpoint(write(tmp_path, stored, values)))
    assert load_model(open_checkpoint(tmp_path), "bfloat16").lm_head.weight.dtype == torch.bfloat16


def test_ambiguous_block_sizes_raise(original, tmp_path):
    stored, _, values = quantized(original, "blocks")
    values["quantization_config"]["config_groups"]["group_1"] = {
        "weights": {"strategy": "block", "block_structure": [6, 6]}
    }
    with pytest.raises(CheckpointError, match=r"_scale has shape"):
        load_model(open_checkpoint(write(tmp_path, stored, values)))
