"""Llama 4's language model: chunked attention layers with RoPE, full attention layers without RoPE, and experts.

Math and keys: transformers' `models/llama4`. The language model of `Llama4ForConditionalGeneration` checkpoints is
supported too: their `text_config` and the tensors of the language model are read.

Older and newer files express the same values in different ways, so numbers and booleans are parsed tolerantly, as the
released checkpoints require. Defaults (which layers have experts, RoPE or chunks) and explicit lists are read like in
transformers.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace

from torch import Tensor

from lamella.config import (
    AttentionConfig,
    LayerConfig,
    Llama3Scaling,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    TemperatureConfig,
)
from lamella.config.feed_forward import FeedForwardConfig
from lamella.config.hf_config import HFConfig
from lamella.config.hf_layers import read_head_dim, read_model
from lamella.config.hf_rope import read_rope
from lamella.errors import ConfigError
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM
from lamella.models.names import LLAMA_NAMES
from lamella.models.rope_order import permute_heads, rope_order

logger = logging.getLogger("lamella")

CHUNKED, FULL = "chunked_attention", "full_attention"
# transformers' defaults for missing keys; null is not a missing key.
_SIZES = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 16,
    "attention_chunk_size": 8192,
    "max_position_embeddings": 131072,
}
_OUTER = "language_model."
_OTHERS = ("vision_model.", "multi_modal_projector.")
# Keys for training and for the file's origin, and keys for images: the language model does not use them.
_NOT_COMPUTED = ("router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "for_llm_compressor")
_IMAGES = ("vision_config", "boi_token_index", "eoi_token_index", "image_token_index")


def own_name(name: str) -> str | None:
    """Return a tensor's name in the language model; None for tensors of the vision encoder."""
    return None if name.startswith(_OTHERS) else name.removeprefix(_OUTER)


def read_config(config: HFConfig) -> ModelConfig:
    """Return the layers of a Llama 4 `config.json`, of a text model or of the text part of an image model."""
    if "text_config" not in config.values:
        return _read_text(config)
    text = config.mapping("text_config")
    for key in _IMAGES:
        config.get(key, None)
    # Keys of the outer config are defaults for the text config.
    for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id"):
        outer = config.get(key, None)
        if outer is not None and key == "tie_word_embeddings" and text.setdefault(key, outer) != outer:
            raise ConfigError(f"{config.source}: {key}={outer!r} contradicts text_config: {key}={text[key]!r}")
        if outer is not None:
            text.setdefault(key, outer)
    # A null in the file is not a missing key.
    given = config.raw_mapping("text_config").items()
    text |= {key: None for key, value in given if value is None and key not in text}
    model = _read_text(config.section("text_config", text))
    for key in ("is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        config.choice(key, (False, {}), False)
    config.finish()
    return model


def _read_text(config: HFConfig) -> ModelConfig:
    for key, size in _SIZES.items():
        config.values.setdefault(key, size)
    heads, head_dim = config.int("num_attention_heads"), read_head_dim(config)
    num_layers, max_positions = config.int("num_hidden_layers"), config.int("max_position_embeddings")
    config.choice("hidden_act", ("silu", "swish"), "silu")
    bias = config.bool("attention_bias", False)
    norm = NormConfig(eps=config.float("rms_norm_eps", 1e-5))
    rope = _read_rope(config, head_dim, max_positions)
    use_qk_norm = config.bool("use_qk_norm", True)
    temperature = _read_temperature(config)
    for key in _NOT_COMPUTED:
        config.get(key, None)
    rotates = _read_rotating_layers(config, num_layers)
    chunks = _read_chunks(config, rotates)
    feed_forwards = _read_feed_forwards(config, num_layers)
    layers = [
        LayerConfig(
            mixer=AttentionConfig(
                num_heads=heads,
                num_kv_heads=config.int("num_key_value_heads", heads),
                head_dim=head_dim,
                scale=head_dim**-0.5,
                qkv_bias=bias,
                output_bias=bias,
                qk_norm=norm if is_rotating and use_qk_norm else None,
                qk_norm_weight=False,
                rope=rope if is_rotating else None,
                temperature=None if is_rotating else temperature,
                chunk=chunk,
            ),
            feed_forward=feed_forward,
            norm=norm,
        )
        for is_rotating, chunk, feed_forward in zip(rotates, chunks, feed_forwards, strict=True)
    ]
    return read_model(config, "Llama4ForCausalLM", layers, norm.eps, max_positions)


def _read_rope(config: HFConfig, head_dim: int, max_positions: int) -> RopeConfig:
    """Return the RoPE config; pairs are adjacent channels, because the files keep the channel order of training."""
    rope = read_rope(config, head_dim, max_positions, interleaved=True, default_theta=500000.0)
    if rope is None or rope.dim != head_dim:
        raise config.error("partial_rotary_factor", config.get("partial_rotary_factor", None), "1")
    scaling = rope.scaling
    if isinstance(scaling, Llama3Scaling) and scaling.factor == 8 and config.get("num_local_experts", 0) == 16:
        logger.warning(
            "%s: a rope factor of 8 for 16 experts: Scout was trained with 16 (and low and high factors of 1); early "
            "conversions may have this wrong; the file's value is used",
            config.source,
        )
    return rope


def _read_temperature(config: HFConfig) -> TemperatureConfig | None:
    """Return the query temperature of layers without RoPE; on by default, None if the file turns it off.

    vLLM turns it on or off by the context length, which changes the results from position `floor_scale - 1` on. Here
    the file decides; the engine option `hf_overrides` can change it.
    """
    given = config.get("attn_temperature_tuning", None)
    if given is not None and not isinstance(given, bool | int | float):
        raise config.error("attn_temperature_tuning", given, "true or false")
    temperature = TemperatureConfig(scale=config.float("attn_scale", 0.1), floor_scale=config.int("floor_scale", 8192))
    on = True if given is None else bool(given)
    logger.info(
        "attention temperature tuning is %s (%s)",
        "on" if on else "off",
        "the default" if given is None else f"attn_temperature_tuning={given!r}",
    )
    return temperature if on else None


def _read_rotating_layers(config: HFConfig, num_layers: int) -> list[bool]:
    """Return whether each layer has RoPE: a 1 in `no_rope_layers` means RoPE; an empty list means the default."""
    given, interval = config.list("no_rope_layers"), config.int("no_rope_layer_interval", 4, minimum=0)
    if not given:
        if interval == 0:
            raise config.error("no_rope_layer_interval", interval, "at least 1 where no_rope_layers says nothing")
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if len(given) < num_layers or any(value not in (0, 1) for value in given):
        raise config.error("no_rope_layers", given, f"a 0 or 1 for each of num_hidden_layers={num_layers}")
    return [bool(value) for value in given[:num_layers]]


def _read_chunks(config: HFConfig, rotates: list[bool]) -> list[int | None]:
    """Return the attention chunk of each layer, None for full attention; by default layers with RoPE are chunked."""
    given = config.list("layer_types")
    chunk = config.int("attention_chunk_size", None)  # null: there are no chunks
    if given is None:
        return [chunk if is_rotating else None for is_rotating in rotates]
    if len(given) != len(rotates) or any(kind not in (CHUNKED, FULL) for kind in given):
        raise config.error("layer_types", given, f"{CHUNKED} or {FULL} for each of num_hidden_layers={len(rotates)}")
    if CHUNKED in given and chunk is None:
        raise ConfigError(f"{config.source}: layer_types has {CHUNKED}, which attention_chunk_size=null contradicts")
    return [chunk if kind == CHUNKED else None for kind in given]


def _read_feed_forwards(config: HFConfig, num_layers: int) -> list[FeedForwardConfig]:
    """Return the feed-forwards: experts in `moe_layers`, or by default in every `interleave_moe_layer_step`-th layer.

    A step of 0 means no experts.
    """
    step = config.int("interleave_moe_layer_step", 1, minimum=0)
    given = config.list("moe_layers")
    if given is None:
        with_experts = set(range(step - 1, num_layers, step)) if step else set()
    else:
        with_experts = {i for i in given if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers}
        if len(with_experts) != len(given):
            raise config.error("moe_layers", given, f"different layers below num_hidden_layers={num_layers}")
    width, count = config.int("intermediate_size"), config.int("num_local_experts", 0, minimum=0)
    top_k = config.int("num_experts_per_tok", 1, minimum=0)
    dense = MLPConfig(intermediate_size=config.int("intermediate_size_mlp"))
    if not with_experts:
        return [dense] * num_layers
    if not 1 <= top_k <= count:
        raise config.error("num_experts_per_tok", top_k, f"1 to num_local_experts={count}")
    experts = MoEConfig(num_experts=count, top_k=top_k, intermediate_size=width, shared_size=width)
    return [experts if index in with_experts else dense for index in range(num_layers)]


LLAMA4 = Architecture(
    "Llama4ForCausalLM",
    read_config,
    checkpoint_names={ours: theirs for ours, theirs in LLAMA_NAMES.items() if ours != "feed_forward"},
    outer_prefix=_OUTER,
    has_slot_state=False,
    own_name=own_name,
)
LLAMA4_WITH_IMAGES = replace(
    LLAMA4, name="Llama4ForConditionalGeneration", image_model="lamella.vision.llama4_model:Llama4ImageModel"
)


class Llama4ForCausalLM(CausalLM, description=LLAMA4):
    """Llama 4's language model."""

    def permute_qk_weight_for_rotary(self, name: str, weight: Tensor) -> tuple[str, Tensor]:
        """Reorder query and key rows for engines whose RoPE pairs are (i, i + head_dim / 2).

        lamella does not need it, because it rotates adjacent channels.

        Args:
            name: name of the tensor. Tensors other than query and key projections are returned unchanged.
            weight: (channels, ...), one row per channel: weights, biases or per-channel scales.

        Returns:
            The name and the reordered tensor.
        """
        if not re.search(r"\.self_attn\.[qk]_proj\.", name):
            return name, weight
        mixer = self.config.layers[0].mixer
        assert isinstance(mixer, AttentionConfig)
        head_dim = mixer.head_dim
        return name, permute_heads(weight, rope_order(head_dim, head_dim, "huggingface"))


class Llama4ForConditionalGeneration(Llama4ForCausalLM, description=LLAMA4_WITH_IMAGES):
    """Llama 4's language model; an engine loads the vision encoder in addition."""
