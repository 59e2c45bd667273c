"""Interfaces for small vLLM-like engines: `packed_module_mapping`, `weight_loader`, `MODEL_REGISTRY`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, Qwen3Config

from helpers import canon_checkpoint, hf_checkpoint
from lamella.checkpoint import load_model, open_checkpoint
from lamella.errors import CheckpointError, ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.models import MODEL_REGISTRY, LlamaForCausalLM, architectures
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition

SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def load_by_loop(model, tensors) -> None:
    """Load weights with the loop of MinivLLM and nano-vLLM."""
    mapping = model.packed_module_mapping
    for name, tensor in tensors.items():
        part = next((part for part in mapping if f".{part}." in name), None)
        if part is None:
            parameter = model.get_parameter(name)
            parameter.weight_loader(parameter, tensor)
        else:
            merged, shard = mapping[part]
            parameter = model.get_parameter(name.replace(part, merged))
            parameter.weight_loader(parameter, tensor, shard)


@pytest.fixture(scope="module", params=["llama", "qwen3", "canon"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "canon":
        return canon_checkpoint(folder, qk_norm=True, attention_bias=True)
    config = (LlamaConfig if request.param == "llama" else Qwen3Config)(**SIZE, num_key_value_heads=2, head_dim=8)
    hf_checkpoint(folder, config)
    return folder


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_a_loading_loop_fills_the_model_as_the_loader_does(folder, rank):
    checkpoint = open_checkpoint(folder)
    group = None if rank is None else Group(Partition(rank, 2))
    model = checkpoint.allocate(checkpoint.read_config(), LocalKit(torch.float32, group=group))
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    load_by_loop(model, load_file(folder / "model.safetensors"))
    for path, expected in load_model(checkpoint, group=group).named_parameters():
        assert torch.equal(model.get_parameter(path), expected), path


def test_mapping_names_the_shards():
    mapping = LlamaForCausalLM.packed_module_mapping
    assert mapping["q_proj"] == ("qkv_proj", "q") and mapping["up_proj"] == ("gate_up_proj", 1)
    assert set(mapping) == {name for parts in LlamaForCausalLM.packed_modules_mapping.values() for name in parts}


def test_shards_by_name_letter_number_and_all_at_once():
    model = LlamaForCausalLM(64, 32, 8, 4, 2, num_layers=1, intermediate_size=48, rope_scaling=None)
    parameter = model.model.layers[0].mixer.qkv_proj.weight
    whole = torch.randn(parameter.shape)
    parameter.weight_loader(parameter, whole)
    assert torch.equal(parameter, whole)
    for shard in ("k", "k_proj", 1, "1"):
        part = torch.randn(16, 32)
        parameter.weight_loader(parameter, part, shard)
        assert torch.equal(parameter[32:48], part) and torch.equal(parameter[:32], whole[:32])
    with pytest.raises(CheckpointError, match=r"shard_id='x': there are q_proj, k_proj, v_proj"):
        parameter.weight_loader(parameter, whole, "x")
    with pytest.raises(CheckpointError, match=r"shape \(16, 32\), and the parameter takes \(32, 32\), of q_proj"):
        parameter.weight_loader(parameter, whole[:16], "q")
    with pytest.raises(CheckpointError, match=r"takes 64 rows"):
        parameter.weight_loader(parameter, whole[:16])
    with pytest.raises(AttributeError):
        model.get_parameter("model.layers.0.absent.weight")


def test_models_can_be_copied():
    model = LlamaForCausalLM(64, 32, 8, 4, 2, num_layers=1, intermediate_size=48, rope_scaling=None)
    parameter = model.lm_head.weight
    assert pickle.loads(pickle.dumps(parameter.weight_loader)) == parameter.weight_loader
    assert torch.equal(copy.deepcopy(model).lm_head.weight, parameter)


def test_the_registry_is_a_mapping():
    assert MODEL_REGISTRY["LlamaForCausalLM"] is LlamaForCausalLM and "Qwen3ForCausalLM" in MODEL_REGISTRY
    assert list(MODEL_REGISTRY) == architectures() and len(MODEL_REGISTRY) == len(architectures())
    assert "GPT2LMHeadModel" not in MODEL_REGISTRY
    with pytest.raises(KeyError, match="GPT2LMHeadModel"):
        MODEL_REGISTRY["GPT2LMHeadModel"]
    MODEL_REGISTRY["LlamaForCausalLM"] = LlamaForCausalLM  # the same again is harmless
    with pytest.raises(ConfigError, match="registered already"):
        MODEL_REGISTRY["Qwen3ForCausalLM"] = LlamaForCausalLM
