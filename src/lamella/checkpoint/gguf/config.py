"""Conversion of a GGUF file's metadata to `config.json` values, and of its tensor names to Hugging Face's.

Source of keys and names: llama.cpp's `gguf-py` (constants, tensor mapping) and its converter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lamella.checkpoint.gguf.file import GgufFile, GgufTensor, dequantize
from lamella.errors import CheckpointError, ConfigError

_LAYER = "model.layers.{}."
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_LLAMA4 = {
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    "ffn_gate_shexp": "feed_forward.shared_expert.gate_proj",
    "ffn_up_shexp": "feed_forward.shared_expert.up_proj",
    "ffn_down_shexp": "feed_forward.shared_expert.down_proj",
}
_EXPERTS = {"ffn_gate_exps": "gate_proj", "ffn_up_exps": "up_proj", "ffn_down_exps": "down_proj"}
# Tensors with numbers that follow from the config.
_TABLES = ("rope_freqs",)


@dataclass(frozen=True)
class GgufArchitecture:
    """Mapping of an architecture of llama.cpp to Hugging Face.

    Attributes:
        name: architecture of Hugging Face.
        model_type: `model_type` of Hugging Face.
        layer_names: names of a layer's modules in Hugging Face, by their names in GGUF.
        interleaves: True if llama.cpp interleaves the rows of query and key projections.
    """

    name: str
    model_type: str
    layer_names: Mapping[str, str]
    interleaves: bool = False


ARCHITECTURES = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", {**_ATTENTION, **_MLP}, interleaves=True),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", {**_ATTENTION, **_MLP}),
    "llama4": GgufArchitecture("Llama4ForCausalLM", "llama4_text", {**_ATTENTION, **_LLAMA4}),
}
# Constants of llama.cpp for Llama 4, which no file contains.
_LLAMA4_CHUNK, _LLAMA4_NO_ROPE, _LLAMA4_SCALE, _LLAMA4_FLOOR = 8192, 4, 0.1, 8192


def architecture_of(file: GgufFile) -> GgufArchitecture:
    """Return the architecture of a file.

    Raises:
        ConfigError: the architecture is not supported.
    """
    name = file.require("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"{file.path}: general.architecture={name!r} is not supported: GGUF is read for "
            f"{', '.join(ARCHITECTURES)}; give the original safetensors folder, if lamella has the architecture"
        )
    return ARCHITECTURES[name]


def read_values(file: GgufFile) -> dict[str, Any]:
    """Return the values of a `config.json` for a GGUF file.

    Raises:
        CheckpointError: metadata is missing or has the wrong type.
        ConfigError: the architecture or a value is not supported.
    """
    architecture, prefix = architecture_of(file), file.require("general.architecture", str)

    def need(key: str, kind: type) -> Any:
        return file.require(f"{prefix}.{key}", kind)

    def get(key: str, kind: type, default: Any = None) -> Any:
        return file.get(f"{prefix}.{key}", kind, default)

    heads = need("attention.head_count", int)
    hidden = need("embedding_length", int)
    head_dim = get("attention.key_length", int, hidden // heads)
    if get("attention.value_length", int, head_dim) != head_dim:
        raise ConfigError(f"{file.path}: {prefix}.attention.value_length differs from key_length: not supported")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path}: token_embd.weight is missing: not a whole model")
    values: dict[str, Any] = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length", int),
        "num_hidden_layers": need("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": int(embedding.shape[1]),
        "max_position_embeddings": need("context_length", int),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon", float),
        "hidden_act": "silu",
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": str(file.stored_dtype()).removeprefix("torch."),
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": end_tokens(file) or None,
        "rope_theta": get("rope.freq_base", float, 10000.0),
    }
    rotated = get("rope.dimension_count", int, head_dim)
    if rotated != head_dim:
        values["partial_rotary_factor"] = rotated / head_dim
    scaling = _scaling(file, prefix, values, rotated)
    if scaling is not None:
        values["rope_scaling"] = scaling
    values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture.name == "LlamaForCausalLM":
        values["mlp_bias"] = "blk.0.ffn_gate.bias" in file.tensors
    if architecture.name == "Llama4ForCausalLM":
        del values["attention_bias"]
        values |= _llama4(file, get, values)
    elif get("expert_count", int, 0):
        raise ConfigError(
            f"{file.path}: {prefix}.expert_count={get('expert_count', int)}: experts are not supported for this "
            "architecture"
        )
    if get("attention.sliding_window", int, 0):
        raise ConfigError(f"{file.path}: {prefix}.attention.sliding_window is not supported for this architecture")
    return {key: value for key, value in values.items() if value is not None}


def _llama4(file: GgufFile, get: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    layers, step = values["num_hidden_layers"], get("interleave_moe_layer_step", int, 1)
    return {
        "intermediate_size": get("expert_feed_forward_length", int, values["intermediate_size"]),
        "intermediate_size_mlp": values["intermediate_size"],
        "num_local_experts": get("expert_count", int, 1),
        "num_experts_per_tok": get("expert_used_count", int, 1),
        "interleave_moe_layer_step": step,
        "moe_layers": [index for index in range(layers) if f"blk.{index}.ffn_gate_inp.weight" in file.tensors],
        "attention_chunk_size": _LLAMA4_CHUNK,
        "no_rope_layers": [int((index + 1) % _LLAMA4_NO_ROPE != 0) for index in range(layers)],
        "attn_temperature_tuning": True,
        "attn_scale": _LLAMA4_SCALE,
        "floor_scale": _LLAMA4_FLOOR,
        "use_qk_norm": get("expert_count", int, 1) != 128,
    }


def _scaling(file: GgufFile, prefix: str, values: Mapping[str, Any], rotated: int) -> dict[str, Any] | None:
    """Return `rope_scaling`, from the metadata, or from the table of factors that llama.cpp writes for Llama 3."""

    def get(key: str, kind: type, default: Any = None) -> Any:
        return file.get(f"{prefix}.rope.scaling.{key}", kind, default)

    kind, original = get("type", str, "none"), get("original_context_length", int)
    if "rope_freqs.weight" in file.tensors:
        if kind not in ("none", "linear") or (kind == "linear" and get("factor", float, 1.0) != 1.0):
            raise ConfigError(f"{file.path}: rope_freqs.weight beside rope.scaling.type={kind!r}: not supported")
        return _scaling_from_factors(file, values, rotated)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.require(f"{prefix}.rope.scaling.factor", float)}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": file.require(f"{prefix}.rope.scaling.factor", float)}
        if original is not None:
            scaling["original_max_position_embeddings"] = original
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if (value := get(key, float)) is not None:
                scaling[name] = value
        if get("attn_factor", float, 1.0) != 1.0 or get("yarn_log_multiplier", float, 0.0) != 0.0:
            raise ConfigError(f"{file.path}: rope.scaling.attn_factor and yarn_log_multiplier are not supported")
        return scaling
    raise ConfigError(f"{file.path}: rope.scaling.type={kind!r} is not supported: none, linear or yarn are")


def _scaling_from_factors(file: GgufFile, values: Mapping[str, Any], rotated: int) -> dict[str, Any]:
    """Return Llama 3's scaling if the table of factors matches it; else a LongRoPE scaling with the table itself."""
    tensor = file.tensors["rope_freqs.weight"]
    count = int(tensor.n_elements)
    if count != rotated // 2:
        raise CheckpointError(f"{file.path}: rope_freqs.weight has {count} factors, {rotated // 2} are needed")
    factors = dequantize(file.path, tensor.name, tensor.data, tensor.tensor_type, np.arange(count), ()).double()
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    wavelengths = 2 * math.pi * values["rope_theta"] ** (torch.arange(count).double() * 2 / rotated)
    smooth = (original / wavelengths - low) / (high - low)
    blended = 1 / ((1 - smooth) / factor + smooth)
    expected = torch.where(wavelengths < original / high, torch.ones_like(blended), blended)
    expected = torch.where(wavelengths > original / low, torch.full_like(blended, factor), expected)
    if torch.allclose(expected, factors, rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": original,
        }
    table = [float(f) for f in factors]
    return {"rope_type": "longrope", "short_factor": table, "long_factor": table, "attention_factor": 1.0}


def end_tokens(file: GgufFile) -> list[int]:
    """Return the tokens that end a text, a chat turn or a message."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [file.get(f"tokenizer.ggml.{key}", int) for key in keys]
    return list(dict.fromkeys(token for token in found if token is not None))


def tensor_names(file: GgufFile) -> dict[str, GgufTensor]:
    """Return the source of each tensor of the model, by its Hugging Face name.

    Raises:
        CheckpointError: a tensor does not belong to the architecture.
    """
    architecture, prefix = architecture_of(file), file.require("general.architecture", str)
    heads = file.require(f"{prefix}.attention.head_count", int)
    kv_heads = file.get(f"{prefix}.attention.head_count_kv", int, heads)
    found: dict[str, GgufTensor] = {}
    unknown = []
    for name, tensor in file.tensors.items():
        base, _, kind = name.rpartition(".")
        if base in _TOP:
            found[f"{_TOP[base]}.{kind}"] = GgufTensor(name)
            continue
        if base in _TABLES or base.rpartition(".")[2] in _TABLES:
            continue
        _, _, suffix = base.partition("blk.")
        index, _, module = suffix.partition(".")
        if module in architecture.layer_names:
            interleaved = {"attn_q": heads, "attn_k": kv_heads} if architecture.interleaves else {}
            found[_LAYER.format(index) + f"{architecture.layer_names[module]}.{kind}"] = GgufTensor(
                name, heads=interleaved.get(module)
            )
        elif module in _EXPERTS and architecture.name == "Llama4ForCausalLM":
            for expert in range(int(tensor.shape[-1])):
                target = f"feed_forward.experts.{expert}.{_EXPERTS[module]}.{kind}"
                found[_LAYER.format(index) + target] = GgufTensor(name, expert=expert)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"{file.path}: {len(unknown)} tensors have no place in {architecture.name} ({unknown[0]}): take the model "
            "as safetensors, or another file"
        )
    return found
