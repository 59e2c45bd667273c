"""Config values of the models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hybrid_parts.sizes import Sizes

Values = dict[str, Any]


def mixers(sizes: Sizes) -> dict[str, Values]:
    """Return the config of each mixer by its name."""
    heads, groups, dim = sizes.heads
    plain_heads, plain_groups, plain_dim = sizes.plain_heads
    key_heads, value_heads, size = sizes.gdn
    kda_heads, kda_size = sizes.kda
    state, inner, narrow, rank = sizes.mamba
    rotary = {"type": "mistral_1d", "theta": 10000.0}
    attention = {"type": "attention", "heads": heads, "head_groups": groups, "head_size": dim, "rotary": rotary}
    return {
        "attention": attention,
        "sliding_window": {**attention, "type": "sliding_window", "window_size": sizes.window},
        "plain_attention": {
            "type": "attention",
            "heads": plain_heads,
            "head_groups": plain_groups,
            "head_size": plain_dim,
            "rotary": {"type": "none"},
        },
        "gdn": {
            "type": "gdn",
            "value_heads": value_heads,
            "key_heads": key_heads,
            "key_head_dim": size,
            "value_head_dim": size,
            "convolution_layer": {"kernel_size": 4},
        },
        "kda": {
            "type": "kda",
            "heads": kda_heads,
            "head_dim": kda_size,
            "convolution_layer": {"kernel_size": 4},
            "normalization": {"epsilon": 1e-5, "activation": "sigmoid"},
        },
        "mamba": {
            "type": "mamba",
            "state_size": state,
            "d_inner": inner,
            "d_xb": narrow,
            "dt_rank": rank,
            "d_conv": 4,
            "conv_bias": True,
            "dt_proj_bias": True,
        },
    }


def apriel2(sizes: Sizes, blocks: dict[str, Values], pattern: Sequence[str]) -> Values:
    """Return the config of a model whose layers have the mixers of `pattern` in turn."""
    mlp = {"type": "mlp", "intermediate_size": sizes.intermediate, "activation": "silu", "gated": True}
    norm = {"type": "rms_norm", "epsilon": 1e-5}
    named = {name: {"mixer": blocks[name], "mlp": mlp, "normalization": norm} for name in pattern}
    return {
        "architectures": ["Apriel2ForCausalLM"],
        "model_type": "apriel2_text",
        "hidden_size": sizes.hidden,
        "vocab_size": sizes.vocab,
        "decoder": {"type": "pattern", "num_blocks": sizes.layers, "pattern": list(pattern), "blocks": named},
        "embeddings": {"max_position_embeddings": 8192},
        "head": {"normalization": norm},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def scout(sizes: Sizes) -> Values:
    """Return the config of a Llama 4 with few layers."""
    heads, groups, dim = sizes.heads
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "intermediate_size_mlp": 2 * sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": sizes.window,
        "no_rope_layers": [1, 1, 1, 0] * (sizes.layers // 4),
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rope_theta": 500000.0,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def model(run: str, sizes: Sizes) -> Values:
    """Return the config of a run's model."""
    return scout(sizes) if run == "scout" else hybrid(run, sizes)


def hybrid(run: str, sizes: Sizes) -> Values:
    """Return the config of a hybrid: three layers with the mixer `run` and one with attention in turn."""
    attention = "plain_attention" if run == "kda" else "attention"
    return apriel2(sizes, mixers(sizes), [run] * 3 + [attention])


def supernet(sizes: Sizes) -> Values:
    """Return the config of a supernet with four mixers in each layer."""
    known = mixers(sizes)
    choices = {name: known[name] for name in ("attention", "sliding_window", "gdn", "kda")}
    mixer = {"type": "stochastic", "main_mixer_name": "attention", "mixers": choices}
    return apriel2(sizes, {"any": mixer}, ["any"])


def placements(sizes: Sizes) -> tuple[list[str], list[str]]:
    """Return two placements that differ in every layer. The first is the hybrid with gdn."""
    count = sizes.layers // 4
    return ["gdn", "gdn", "gdn", "attention"] * count, ["kda", "kda", "kda", "sliding_window"] * count


def vllm_values(run: str, sizes: Sizes) -> Values:
    """Return the config of the nearest model that vLLM implements itself."""
    common = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if run == "scout":
        return scout(sizes)
    if run == "gdn":
        heads, groups, dim = sizes.heads
        key_heads, value_heads, size = sizes.gdn
        return common | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": dim,
            "partial_rotary_factor": 1.0,
            "attn_output_gate": False,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": size,
            "linear_value_head_dim": size,
            "linear_conv_kernel_dim": 4,
            "num_experts": 0,
        }
    rank, plain, rotated, values = sizes.latent
    kda_heads, kda_size = sizes.kda
    full = [layer for layer in range(1, sizes.layers + 1) if layer % 4 == 0]
    return common | {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "num_attention_heads": kda_heads,
        "num_key_value_heads": kda_heads,
        "model_max_length": 8192,
        "kv_lora_rank": rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotated,
        "v_head_dim": values,
        "mla_use_nope": True,
        "num_experts": None,
        "linear_attn_config": {
            "kda_layers": [layer for layer in range(1, sizes.layers + 1) if layer not in full],
            "full_attn_layers": full,
            "num_heads": kda_heads,
            "head_dim": kda_size,
            "short_conv_kernel_size": 4,
        },
    }
