"""Llama 2 and 3 (and Mistral-like files under that name): pre-norm attention with RoPE, SwiGLU.

Math and keys: transformers' `models/llama`. Llama files may also carry vLLM's `bias` and `qkv_bias`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamella.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig
from lamella.config.config_keys import way_out
from lamella.config.hf_config import HFConfig
from lamella.config.hf_layers import read_activation, read_head_dim, read_model, read_output_bias, read_windows
from lamella.config.hf_rope import read_rope
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM

# RoPE scaling of Llama 3.2, the default of the constructor.
LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def read_config(config: HFConfig) -> ModelConfig:
    """Return the layers of a Llama `config.json`."""
    heads, head_dim = config.int("num_attention_heads"), read_head_dim(config)
    num_layers, max_positions = config.int("num_hidden_layers"), config.int("max_position_embeddings", 2048)
    activation = read_activation(config)
    config.choice("is_causal", (True,), True)
    config.choice("logit_scale", (1, 1.0), 1)
    attention_bias = config.bool("attention_bias", False) or config.bool("bias", False)
    mlp_bias = config.bool("mlp_bias", False)
    output_bias = read_output_bias(config, attention_bias)
    norm = NormConfig(eps=config.float("rms_norm_eps", 1e-6))
    rope = read_rope(config, head_dim, max_positions)

    def layer(window: int | None) -> LayerConfig:
        return LayerConfig(
            mixer=AttentionConfig(
                num_heads=heads,
                num_kv_heads=config.int("num_key_value_heads", heads),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=config.bool("qkv_bias", attention_bias),
                output_bias=output_bias,
                rope=rope,
                window=window,
            ),
            feed_forward=MLPConfig(
                intermediate_size=config.int("intermediate_size"),
                activation=activation,
                gate_up_bias=mlp_bias,
                down_bias=mlp_bias,
            ),
            norm=norm,
        )

    window = config.int("sliding_window", None)
    if window is not None and config.get("layer_types", None) is None:
        # Qwen models saved as Llama keep a window that is turned off. A window of max_positions has no effect.
        if config.get("use_sliding_window", None) is not False and window < max_positions:
            raise config.error(
                "sliding_window",
                window,
                "absent, or with layer_types that say which layers slide; to compute without it: "
                + way_out([config.path_of("sliding_window")]),
            )
        config.ignore("sliding_window", "use_sliding_window")
        window = None
    layers = [layer(window) for window in read_windows(config, num_layers, window, first=num_layers)]
    return read_model(config, "LlamaForCausalLM", layers, norm.eps, max_positions)


LLAMA = Architecture("LlamaForCausalLM", read_config, has_slot_state=False)


class LlamaForCausalLM(CausalLM, description=LLAMA):
    """Llama. The defaults of the keyword constructor are those of Llama 3.2 1B."""

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 2048,
        head_dim: int = 64,
        num_qo_heads: int = 32,
        num_kv_heads: int = 8,
        has_attn_bias: bool = False,
        rms_norm_epsilon: float = 1e-5,
        rope_base: float = 500000,
        max_position_embeddings: int = 131072,
        intermediate_size: int = 8192,
        ffn_bias: bool = False,
        num_layers: int = 16,
        block_size: int = 256,
        tie_word_embeddings: bool = True,
        rope_scaling: Mapping[str, Any] | None = LLAMA_3_2_ROPE,
    ) -> None:
        """Build a model with random weights.

        Args:
            vocab_size: tokens in the vocabulary.
            hidden_size: width of the residual stream.
            head_dim: channels of a head.
            num_qo_heads: query heads.
            num_kv_heads: key/value heads.
            has_attn_bias: whether the attention projections have biases.
            rms_norm_epsilon: epsilon of the norms.
            rope_base: base of the RoPE frequencies.
            max_position_embeddings: longest supported sequence, in tokens.
            intermediate_size: width of the feed-forward.
            ffn_bias: whether the feed-forward projections have biases.
            num_layers: number of layers.
            block_size: kept as an attribute for callers that set it; a forward without an engine has no blocks.
            tie_word_embeddings: whether the head uses the embedding's weight.
            rope_scaling: as in Hugging Face configs; None for unscaled RoPE.
        """
        config = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "head_dim": head_dim,
            "num_attention_heads": num_qo_heads,
            "num_key_value_heads": num_kv_heads,
            "attention_bias": has_attn_bias,
            "rms_norm_eps": rms_norm_epsilon,
            "rope_theta": rope_base,
            "rope_scaling": rope_scaling,
            "max_position_embeddings": max_position_embeddings,
            "intermediate_size": intermediate_size,
            "mlp_bias": ffn_bias,
            "num_hidden_layers": num_layers,
            "tie_word_embeddings": tie_word_embeddings,
        }
        self.block_size = block_size
        super().__init__(read_config(HFConfig(config, "LlamaForCausalLM")))
