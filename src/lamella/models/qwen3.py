"""Qwen3: Llama with a norm over each query and key head, a free head size, and optional sliding-window layers.

Math and keys: transformers' `models/qwen3`.
"""

from __future__ import annotations

from lamella.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig
from lamella.config.hf_config import HFConfig
from lamella.config.hf_layers import read_activation, read_model, read_output_bias, read_windows
from lamella.config.hf_rope import read_rope
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM


def read_config(config: HFConfig) -> ModelConfig:
    """Return the layers of a Qwen3 `config.json`."""
    heads, num_layers = config.int("num_attention_heads"), config.int("num_hidden_layers")
    # Not derived from hidden_size: several released sizes have heads * head_dim != hidden_size.
    head_dim = config.int("head_dim", 128)
    activation = read_activation(config)
    bias = config.bool("attention_bias", False)
    output_bias = read_output_bias(config, bias)
    norm = NormConfig(eps=config.float("rms_norm_eps", 1e-6))
    max_positions = config.int("max_position_embeddings", 32768)
    rope = read_rope(config, head_dim, max_positions)

    def layer(window: int | None) -> LayerConfig:
        return LayerConfig(
            mixer=AttentionConfig(
                num_heads=heads,
                num_kv_heads=config.int("num_key_value_heads", heads),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=bias,
                output_bias=output_bias,
                qk_norm=norm,
                rope=rope,
                window=window,
            ),
            feed_forward=MLPConfig(intermediate_size=config.int("intermediate_size"), activation=activation),
            norm=norm,
        )

    # A missing key means transformers' default; null means no window.
    window = config.int("sliding_window", None if "sliding_window" in config.values else 4096)
    first = config.int("max_window_layers", 28, minimum=0)
    if not config.bool("use_sliding_window", False):
        window = None
    windows = read_windows(config, num_layers, window, first)
    layers = [layer(window) for window in windows]
    return read_model(config, "Qwen3ForCausalLM", layers, norm.eps, max_positions)


QWEN3 = Architecture("Qwen3ForCausalLM", read_config, has_slot_state=False)


class Qwen3ForCausalLM(CausalLM, description=QWEN3):
    """Qwen3, with a keyword constructor."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        scale: float = 1.0,
        num_kv_heads: int | None = None,
        rms_norm_epsilon: float = 1e-5,
        qkv_bias: bool = False,
        base: float = 10000,
        max_position: int = 16384,
        intermediate_size: int = 4096,
        ffn_bias: bool = True,
        num_layers: int = 12,
        tie_word_embeddings: bool = False,
        block_size: int = 256,
    ) -> None:
        """Build a model with random weights.

        The defaults are not those of a released Qwen3, which has base 1e6, eps 1e-6 and no feed-forward biases. Pass
        the real values, or use `from_config`.

        Args:
            vocab_size: tokens in the vocabulary.
            hidden_size: width of the residual stream.
            num_heads: query heads.
            head_dim: channels of a head; None for `hidden_size / num_heads`.
            scale: the attention scale is `scale / sqrt(head_dim)`.
            num_kv_heads: key/value heads; None for `num_heads`.
            rms_norm_epsilon: epsilon of the norms, including the query/key norm.
            qkv_bias: whether the query, key and value projections have biases.
            base: base of the RoPE frequencies.
            max_position: longest supported sequence, in tokens.
            intermediate_size: width of the feed-forward.
            ffn_bias: whether the feed-forward projections have biases.
            num_layers: number of layers.
            tie_word_embeddings: whether the head uses the embedding's weight.
            block_size: kept as an attribute for callers that set it; a forward without an engine has no blocks.
        """
        head_dim = head_dim or hidden_size // num_heads
        norm = NormConfig(eps=rms_norm_epsilon)
        rope_config = HFConfig({"rope_theta": base}, "Qwen3ForCausalLM")
        layer = LayerConfig(
            mixer=AttentionConfig(
                num_heads=num_heads,
                num_kv_heads=num_kv_heads or num_heads,
                head_dim=head_dim,
                scale=scale * head_dim**-0.5,
                qkv_bias=qkv_bias,
                qk_norm=norm,
                rope=read_rope(rope_config, head_dim, max_position),
            ),
            feed_forward=MLPConfig(intermediate_size=intermediate_size, gate_up_bias=ffn_bias, down_bias=ffn_bias),
            norm=norm,
        )
        self.block_size = block_size
        super().__init__(
            ModelConfig(
                architecture="Qwen3ForCausalLM",
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                layers=(layer,) * num_layers,
                norm=norm,
                tie_word_embeddings=tie_word_embeddings,
                max_position_embeddings=max_position,
            )
        )
