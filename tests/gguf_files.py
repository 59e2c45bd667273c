"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
    "feed_forward.router": "ffn_gate_inp",
    "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
    "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
    "feed_forward.shared_expert.down_proj": "ffn_down_shexp",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of queries or keys in llama.cpp's order: (head, half, channel) becomes (head, channel, half)."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(state: Mapping[str, torch.Tensor], config: Any, architecture: str) -> dict[str, torch.Tensor]:
    """The tensors of a state dict under GGUF's names, in llama.cpp's orders."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        base, _, kind = name.rpartition(".")
        if base in TOP:
            if name != "lm_head.weight" or not config.tie_word_embeddings:
                found[f"{TOP[base]}.{kind}"] = tensor
            continue
        _, _, rest = name.partition("model.layers.")
        index, _, part = rest.partition(".")
        if part == "feed_forward.experts.gate_up_proj":  # (E, hidden, 2 x intermediate)
            gate, up = tensor.transpose(1, 2).chunk(2, dim=1)
            found[f"blk.{index}.ffn_gate_exps.weight"], found[f"blk.{index}.ffn_up_exps.weight"] = gate, up
            continue
        if part == "feed_forward.experts.down_proj":
            found[f"blk.{index}.ffn_down_exps.weight"] = tensor.transpose(1, 2)
            continue
        own = LAYER[part.rpartition(".")[0]]
        if architecture == "llama" and own in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if own == "attn_q" else config.num_key_value_heads
            tensor = interleaved(tensor, heads)
        found[f"blk.{index}.{own}.{kind}"] = tensor
    return found


def write(
    path: Path,
    config: Any,
    state: Mapping[str, torch.Tensor],
    architecture: str = "llama",
    *,
    kind: str = "F32",
    metadata: Mapping[str, Any] | None = None,
    more: Mapping[str, torch.Tensor] | None = None,
    shards: int = 1,
    tokens: Sequence[str] | None = None,
) -> Path:
    """Write a model; matrices are quantized as `kind`. With several shards, returns the first file."""
    tensors = {**tensors_of(state, config, architecture), **(more or {})}
    names = sorted(tensors)
    files = []
    for shard in range(shards):
        file = path if shards == 1 else path.with_name(f"{path.stem}-{shard + 1:05d}-of-{shards:05d}.gguf")
        writer = gguf.GGUFWriter(str(file), architecture)
        if shard == 0:
            _metadata(writer, config, architecture, tokens)
            for key, value in (metadata or {}).items():
                _add(writer, key, value)
        if shards > 1:
            writer.add_uint16("split.no", shard)
            writer.add_uint16("split.count", shards)
            writer.add_int32("split.tensors.count", len(tensors))
        for name in names[shard::shards]:
            array = tensors[name].detach().float().contiguous().numpy()
            quantized = gguf.GGMLQuantizationType[kind] if array.ndim > 1 else gguf.GGMLQuantizationType.F32
            data = array if quantized.name == "F32" else gguf.quants.quantize(array, quantized)
            writer.add_tensor(name, data, raw_dtype=quantized)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        files.append(file)
    return files[0]


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    (add.get(type(value)) or writer.add_array)(key, value)


def _metadata(writer: gguf.GGUFWriter, config: Any, architecture: str, tokens: Sequence[str] | None) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size_mlp", config.intermediate_size))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    parameters = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(parameters.get("rope_theta", 10000.0)))
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if tokens is not None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(list(tokens))


def random_state(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """A model's state dict, filled with values that quantization can show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    return dict(model.state_dict())


def dequantized(state: Mapping[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The matrices of a state dict after quantization, which is of whole rows, so that their order does not matter."""
    quantized = gguf.GGMLQuantizationType[kind]

    def again(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() < 2 or kind == "F32":
            return tensor
        array = tensor.float().contiguous().numpy()
        return torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(array, quantized), quantized)))

    return {name: again(tensor) for name, tensor in state.items()}
