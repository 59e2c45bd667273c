"""LlamaCanon (PhysicsLM4, arXiv 2512.17351): Llama with up to four short convolutions (canons) per layer.

Canon A is before the mixer, B on [q | k | v] after the query/key norm and before the rotation, C before the
feed-forward, D on [gate | up]. The optional query/key norm spans all heads. The rotation may cover only some channels
of a head, and `rope_version` "lingua" rotates adjacent channels. A `rope_dim` of 0 means no rotation.
"""

from __future__ import annotations

from dataclasses import replace

from lamella.config import AttentionConfig, CanonConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from lamella.config.hf_config import HFConfig
from lamella.config.hf_layers import read_activation, read_head_dim, read_model, read_output_bias, read_windows
from lamella.config.hf_rope import read_rope
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM
from lamella.models.names import LLAMA_NAMES


def read_config(config: HFConfig) -> ModelConfig:
    """Return the layers of a LlamaCanon `config.json`."""
    hidden_size, heads, head_dim = (
        config.int("hidden_size"),
        config.int("num_attention_heads"),
        read_head_dim(config),
    )
    max_positions = config.int("max_position_embeddings", 2048)
    activation = read_activation(config)
    attention_bias, mlp_bias = config.bool("attention_bias", False), config.bool("mlp_bias", False)
    norm = NormConfig(eps=config.float("rms_norm_eps", 1e-6))
    canons = _read_canons(config)
    num_layers, window = config.int("num_hidden_layers"), config.int("sliding_window", None)
    windows = read_windows(config, num_layers, window, first=num_layers)
    if window is not None and not any(windows):
        raise config.error("sliding_window", window, "absent, or with layer_types that say which layers slide")
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=config.int("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        qkv_bias=attention_bias,
        output_bias=read_output_bias(config, attention_bias),
        qk_norm=norm if config.bool("qk_norm", False) else None,
        qk_norm_scope="full",
        rope=_read_rope(config, head_dim, max_positions),
        canon=canons["B"],
    )
    layer = LayerConfig(
        mixer=attention,
        feed_forward=MLPConfig(
            # The published config class has two defaults: one for a missing key, one for null.
            intermediate_size=config.int(
                "intermediate_size", hidden_size * 8 // 3 if "intermediate_size" in config.values else 11008
            ),
            activation=activation,
            gate_up_bias=mlp_bias,
            down_bias=mlp_bias,
            canon=canons["D"],
        ),
        norm=norm,
        mixer_canon=canons["A"],
        feed_forward_canon=canons["C"],
    )
    layers = [replace(layer, mixer=replace(attention, window=window)) for window in windows]
    return read_model(config, "LlamaCanonForCausalLM", layers, norm.eps, max_positions)


def _read_canons(config: HFConfig) -> dict[str, CanonConfig | None]:
    letters = config.get("canon_set", "")
    if not isinstance(letters, str):
        raise config.error("canon_set", letters, "a text of the letters A, B, C and D")
    if others := sorted(set(letters) - set("ABCD")):
        # The published class ignores other letters too.
        config.say(f"canon_set={letters!r}: ignored letters: {', '.join(others)}")
    canon = CanonConfig(
        kernel=config.int("canon_kernel", 4),
        bias=config.bool("canon_bias", False),
        activation=config.bool("canon_activation", False),
        residual=config.bool("canon_residual", True),
    )
    return {letter: canon if letter in letters else None for letter in "ABCD"}


def _read_rope(config: HFConfig, head_dim: int, max_positions: int) -> RopeConfig | None:
    """Return the RoPE config; `rope_dim` is the number of rotated channels, which files also give as a factor."""
    interleaved = config.choice("rope_version", ("huggingface", "lingua"), "huggingface") == "lingua"
    dim, factor = config.int("rope_dim", None, minimum=0), config.float("partial_rotary_factor", None)
    if dim is not None and factor is not None and abs(factor * head_dim - dim) >= 1:
        raise config.error("partial_rotary_factor", factor, f"rope_dim / head_dim = {dim} / {head_dim}")
    return read_rope(
        config,
        head_dim,
        max_positions,
        interleaved=interleaved,
        dim=None if dim is None else min(dim, head_dim),
    )


LLAMA_CANON = Architecture(
    "LlamaCanonForCausalLM",
    read_config,
    checkpoint_names={
        **LLAMA_NAMES,
        "mixer_canon": "canonA",
        "mixer.canon": "self_attn.canonB",
        "feed_forward_canon": "canonC",
        "feed_forward.canon": "mlp.canonD",
    },
)


class LlamaCanonForCausalLM(CausalLM, description=LLAMA_CANON):
    """LlamaCanon: Llama with canon convolutions."""
