"""Apriel2 (ServiceNow): a pre-norm decoder whose layers have different mixers, or several mixers to choose from.

The mixers are attention, sliding-window attention, Mamba, gated delta nets and Kimi delta attention. A layer with
several mixers belongs to a supernet, whose placement selects one.

Three programs write these files and two read them, with different defaults. Contradictions are resolved by the
checkpoint's tensors first, and then by what the training code does:

* the tensors decide whether a projection has a bias, and whether a feed-forward is gated;
* the norms of a block use the block's own epsilon (the published Hugging Face class uses the head's);
* `state_size` and `d_state` are the same number;
* the sampling of supernets in training has no effect here;
* a context length of 2048 is a default that no exporter sets, so it is not a limit.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, cast

from lamella.config import (
    AttentionConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LayerConfig,
    Llama3Scaling,
    MambaConfig,
    MixerConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    Placement,
    RopeConfig,
    RopeScaling,
    SingleMixerConfig,
    StochasticConfig,
    YarnScaling,
)
from lamella.config.hf_config import HFConfig
from lamella.config.hf_layers import read_model
from lamella.errors import ConfigError
from lamella.models.architecture import Architecture
from lamella.models.base import CausalLM
from lamella.models.names import LLAMA_NAMES, PACKED_MODULES

logger = logging.getLogger("lamella")

_OF_LAYER = re.compile(r"model\.decoder\.blocks\.(\d+)\.")
_OF_MIXER = re.compile(r"model\.decoder\.blocks\.(\d+)\.mixer\.mixers\.[^.]+\.")
# Activations that Fast-LLM trains.
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "identity")
_NO_LENGTH = 2048  # written by the config class by default


def own_name(name: str) -> str | None:
    """Return a tensor's name; None for tensors of the vision encoder."""
    return None if name.startswith("model.vision_encoder.") else name


def leftovers(names: Collection[str], expected: Collection[str]) -> set[str]:
    """Return the tensors of mixers that pruning tools removed from the config but left in the files."""
    kept = {match[0] for name in expected if (match := _OF_MIXER.match(name))}
    layers = {match[1] for name in expected if (match := _OF_LAYER.match(name))}
    found = ((name, match) for name in names if (match := _OF_MIXER.match(name)))
    return {name for name, match in found if match[1] in layers and match[0] not in kept}


def read_config(config: HFConfig) -> ModelConfig:
    """Return the layers of an Apriel2 `config.json`."""
    hidden_size = config.int("hidden_size", 4096)
    head = _section(config, "head", {"normalization": {"type": "rms_norm", "epsilon": 1e-5}})
    norm = _read_norm(head, "normalization", 1e-5)
    if norm.kind != "rms":
        raise head.error("normalization", "layer_norm", "rms_norm for the head")
    head.finish(harmless=("type",))
    embeddings = _section(config, "embeddings", {})
    # vLLM reads the length from the top level of the file, so some files have it there.
    length = embeddings.int("max_position_embeddings", config.int("max_position_embeddings", _NO_LENGTH))
    embeddings.finish(harmless=("type",))
    blocks = _read_decoder(config, hidden_size)
    reader = _BlockReader(config, hidden_size, norm.eps)
    layers = [reader.layer(index, name, block) for index, (name, block) in enumerate(blocks)]
    return read_model(
        config,
        "Apriel2ForCausalLM",
        layers,
        norm.eps,
        length,
        defaults={"vocab_size": 32000, "hidden_size": hidden_size, "bos_token_id": 1, "eos_token_id": 2},
        length_is_known=length != _NO_LENGTH,
        harmless=("vision_encoder", "image_token_index", "projector_hidden_act", "vision_config"),
    )


def with_placement(values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """Return a supernet's config values with the main mixers of a placement, as a pattern of blocks if they differ."""
    decoder = values["decoder"]
    is_fixed = (decoder.get("type") or "fixed") == "fixed"
    blocks = {"block": decoder["block"]} if is_fixed else decoder["blocks"]
    pattern = ["block"] if is_fixed else decoder["pattern"]
    written: dict[str, Any] = {}
    made: dict[tuple[str, str | None], str] = {}
    names = []
    for index, main in enumerate(placement):
        block = pattern[index % len(pattern)]
        if (block, main) not in made:
            name, mixer = block, blocks[block]["mixer"]
            if main is not None:
                name, mixer = f"{block}_{main}", {**mixer, "main_mixer_name": main}
                while name in blocks or name in written:
                    name += "_"
            made[block, main], written[name] = name, {**blocks[block], "mixer": mixer}
        names.append(made[block, main])
    new: dict[str, Any] = {"type": "pattern", "num_blocks": len(names), "pattern": names, "blocks": written}
    if len(written) == 1:
        new = {"type": "fixed", "num_blocks": len(names), "block": written[names[0]]}
    return {**values, "decoder": new}


def _section(config: HFConfig, key: str, default: Mapping[str, Any]) -> HFConfig:
    """Return a nested section; the default if it is missing or empty."""
    return config.section(key, config.mapping(key) or default)


def _read_norm(config: HFConfig, key: str, eps: float) -> NormConfig:
    section = _section(config, key, {"type": "rms_norm"})
    kind = section.choice("type", ("rms_norm", "layer_norm"), "rms_norm")
    norm = NormConfig(eps=section.float("epsilon", eps), kind="rms" if kind == "rms_norm" else "layer")
    section.finish()
    return norm


def _read_decoder(config: HFConfig, hidden_size: int) -> list[tuple[str, HFConfig]]:
    """Return the name and the section of each layer's block."""
    default = {"type": "fixed", "num_blocks": 32, "block": _default_block(hidden_size)}
    decoder = _section(config, "decoder", default)
    kind = decoder.choice("type", ("fixed", "pattern"), "fixed")
    count = decoder.int("num_blocks", 32)
    if kind == "fixed":
        block = _section(decoder, "block", _default_block(hidden_size))
        decoder.finish()
        return [("block", block)] * count
    pattern, blocks = decoder.get("pattern"), _section(decoder, "blocks", {})
    if not isinstance(pattern, list) or not pattern or not all(isinstance(name, str) for name in pattern):
        raise decoder.error("pattern", pattern, "a list of names of blocks")
    for name in pattern:
        if name not in blocks.values:
            raise decoder.error("pattern", name, f"one of blocks: {', '.join(blocks.values)}")
    decoder.finish()
    # Blocks that no layer uses are not read.
    sections = {name: _section(blocks, name, {}) for name in dict.fromkeys(pattern)}
    names = [pattern[index % len(pattern)] for index in range(count)]
    return [(name, sections[name]) for name in names]


def _default_block(hidden_size: int) -> dict[str, Any]:
    rotary = {"type": "default", "theta": 10000}
    attention = {"type": "attention", "heads": 32, "head_groups": 32, "head_size": hidden_size // 32, "rotary": rotary}
    mlp = {"type": "mlp", "intermediate_size": 4 * hidden_size, "activation": "silu", "gated": True}
    return {"mixer": attention, "mlp": mlp, "normalization": {"type": "rms_norm", "epsilon": 1e-5}}


class _BlockReader:
    """Reader of the blocks of one file."""

    def __init__(self, config: HFConfig, hidden_size: int, eps: float) -> None:
        self.config, self.hidden_size, self.eps = config, hidden_size, eps
        self.tensors = config.list_tensors()
        self._warned: set[str] = set()

    def layer(self, index: int, name: str, block: HFConfig) -> LayerConfig:
        """Return the config of layer `index`, described by `block`."""
        path = f"model.decoder.blocks.{index}"
        norm = _read_norm(block, "normalization", self.eps)
        if norm.eps != self.eps:
            self._warn_once(
                "%s: block %s norms with its own epsilon, as in training; the published class takes the head's",
                self.config.source,
                name,
            )
        layer = LayerConfig(
            mixer=self._mixer(_section(block, "mixer", {"type": "attention"}), f"{path}.mixer"),
            feed_forward=self._mlp(_section(block, "mlp", {"type": "mlp"}), f"{path}.mlp"),
            norm=norm,
        )
        block.finish()
        return layer

    def _mixer(self, mixer: HFConfig, path: str) -> MixerConfig:
        kind = mixer.choice("type", (*self._readers, "stochastic"), "attention")
        return self._stochastic(mixer, path) if kind == "stochastic" else self._single(mixer, path)

    def _single(self, mixer: HFConfig, path: str) -> SingleMixerConfig:
        config = self._readers[mixer.choice("type", tuple(self._readers), "attention")](self, mixer, path)
        mixer.finish(harmless=("init", "lr_scale"))
        return config

    def _stochastic(self, mixer: HFConfig, path: str) -> StochasticConfig:
        mixers = _section(mixer, "mixers", {})
        names = [name for name, values in mixers.values.items() if values is not None]
        for name in names:
            if not name or "." in name:
                raise mixer.error("mixers", name, "names without a dot, which separates the parts of tensors' names")
            if not isinstance(mixers.values[name], Mapping):
                raise mixers.error(name, mixers.values[name], "a mapping")
        main = mixer.get("main_mixer_name", names[0] if names else "")
        # The sampling of training has no effect here.
        harmless = ("sampling_strategy", "sampling_weights", "predefined_layouts", "predefined_layout_probabilities")
        subs = [(name, self._single(_section(mixers, name, {}), f"{path}.mixers.{name}")) for name in names]
        mixer.finish(harmless=(*harmless, "init", "lr_scale", "seed_shift"))
        try:
            return StochasticConfig(mixers=tuple(subs), main=cast(str, main))  # checked by StochasticConfig
        except ConfigError as error:
            raise ConfigError(f"{mixer.source}: {error}") from error

    def _attention(self, mixer: HFConfig, path: str) -> AttentionConfig:
        heads, head_dim = mixer.int("heads"), mixer.int("head_size")
        mixer.choice("causal", (True,), True)
        mixer.bool("cross_document_attention", True)
        linear_bias = mixer.bool("add_linear_biases", False)
        biased = {}
        for layer, name in zip(("query", "key", "value", "dense"), "qkvo", strict=True):
            stated = self._read_bias(mixer, f"{layer}_layer", linear_bias)
            biased[name] = self._has_bias(f"{path}.{name}_proj", stated)
        parts = tuple(f"{name}_proj" for name in "qkv" if biased[name])
        window = mixer.int("window_size", None)
        if mixer.get("type", "attention") == "sliding_window" and window is None:
            raise ConfigError(f"{mixer.source}: window_size is missing")
        return AttentionConfig(
            num_heads=heads,
            num_kv_heads=mixer.int("head_groups", heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            qkv_bias=parts if 0 < len(parts) < 3 else bool(parts),
            output_bias=biased["o"],
            rope=self._rotary(mixer, head_dim),
            window=window,
        )

    @staticmethod
    def _rotary(mixer: HFConfig, head_dim: int) -> RopeConfig | None:
        rotary = _section(mixer, "rotary", {})
        kind = rotary.choice("type", ("mistral_1d", "default", "llama3", "yarn", "none"), "mistral_1d")
        if kind == "none":
            rotary.finish(harmless=("theta",))
            return None
        theta = rotary.float("theta")
        scaling: RopeScaling | None = None
        if kind == "llama3":
            scaling = Llama3Scaling(
                factor=rotary.float("scale_factor", 8.0),
                low_freq_factor=rotary.float("low_frequency_factor", 1.0),
                high_freq_factor=rotary.float("high_frequency_factor", 4.0),
                original_length=rotary.int("original_context_length", 8192),
            )
        elif kind == "yarn":
            factor = rotary.float("scale_factor", 8.0)
            scaling = YarnScaling(
                factor=factor,
                original_length=rotary.int("original_context_length", 8192),
                attention_factor=rotary.float("attention_factor", 0.1 * math.log(factor) + 1.0),
                beta_fast=rotary.float("beta_fast", 32.0),
                beta_slow=rotary.float("beta_slow", 1.0),
            )
        rotary.finish()
        return RopeConfig(dim=head_dim, theta=theta, scaling=scaling)

    def _mamba(self, mixer: HFConfig, path: str) -> MambaConfig:
        stated = (mixer.int(key, None) for key in ("state_size", "d_state"))
        sizes = {size for size in stated if size is not None}
        if len(sizes) > 1:
            raise ConfigError(f"{mixer.source}: state_size and d_state contradict each other: {sorted(sizes)}")
        rank, expand = mixer.get("dt_rank", "auto"), mixer.int("expand", 2)
        linear_bias = mixer.bool("add_linear_biases", False)
        for key in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "activation_type"):
            mixer.get(key, None)  # used only to initialize training
        return MambaConfig(
            state_size=sizes.pop() if sizes else 16,
            inner_size=mixer.int("d_inner", expand * self.hidden_size),
            kv_size=mixer.int("d_xb", self.hidden_size),
            dt_rank=-(-self.hidden_size // 16) if rank == "auto" else mixer.int("dt_rank"),
            kernel=mixer.int("d_conv", 4, minimum=2),
            repeat_before_conv=mixer.bool("repeat_kv_before_conv", True),
            conv_bias=self._read_required_bias(f"{path}.conv1d.bias", mixer, "conv_bias"),
            dt_bias=self._read_required_bias(f"{path}.dt_proj.bias", mixer, "dt_proj_bias"),
            linear_bias=self._has_bias(f"{path}.in_proj", linear_bias),
        )

    def _gdn(self, mixer: HFConfig, path: str) -> GatedDeltaNetConfig:
        return GatedDeltaNetConfig(
            value_heads=mixer.int("value_heads", 32),
            key_heads=mixer.int("key_heads", 8),
            key_head_dim=mixer.int("key_head_dim", 64),
            value_head_dim=mixer.int("value_head_dim", 64),
            kernel=self._kernel(mixer),
            norm=NormConfig(eps=mixer.float("norm_eps", 1e-5)),
        )

    def _kda(self, mixer: HFConfig, path: str) -> KimiDeltaConfig:
        norm = _section(mixer, "normalization", {})
        norm.choice("type", ("rms_norm", "gated_rms_norm"), "rms_norm")
        config = KimiDeltaConfig(
            num_heads=mixer.int("heads", 32),
            head_dim=mixer.int("head_dim", 64),
            kernel=self._kernel(mixer, 4),
            norm=NormConfig(eps=norm.float("epsilon", 1e-5)),
            gate=norm.choice("activation", ("silu", "sigmoid"), "silu"),
        )
        norm.finish()
        return config

    @staticmethod
    def _kernel(mixer: HFConfig, default: int | None = None) -> int:
        section = _section(mixer, "convolution_layer", {})
        kernel = section.int("kernel_size", default, minimum=2)
        if kernel is None:
            raise ConfigError(f"{section.source}: kernel_size is missing")
        section.choice("activation", ("silu",), "silu")
        section.finish(harmless=("init", "bias"))
        return kernel

    def _mlp(self, mlp: HFConfig, path: str) -> MLPConfig:
        mlp.choice("type", ("mlp",), "mlp")
        linear_bias, gated = mlp.bool("add_linear_biases", False), mlp.bool("gated", None)
        first = self._read_bias(mlp, "layer_1", linear_bias)
        second = self._read_bias(mlp, "layer_2", linear_bias)
        config = MLPConfig(
            intermediate_size=mlp.int("intermediate_size"),
            gated=self._is_required(f"{path}.gate_proj.weight", gated),
            activation=mlp.choice("activation", _ACTIVATIONS, "silu"),
            gate_up_bias=self._has_bias(f"{path}.up_proj", first),
            down_bias=self._has_bias(f"{path}.down_proj", second),
        )
        mlp.finish(harmless=("init", "lr_scale"))
        return config

    @staticmethod
    def _read_bias(part: HFConfig, key: str, inherited: bool) -> bool:
        """Return whether a projection's own section enables its bias."""
        layer = _section(part, key, {})
        bias = _section(layer, "bias", {})
        enabled = bias.bool("enabled", inherited)
        bias.finish(harmless=("init", "lr_scale"))
        layer.finish(harmless=("init", "weight", "lr_scale", "apply_peft"))
        return enabled

    def _has_bias(self, projection: str, stated: bool) -> bool:
        """Return True if a projection has a bias; the published readers disagree, so the tensors decide."""
        return self._has_tensor(f"{projection}.bias", stated)

    def _read_required_bias(self, tensor: str, part: HFConfig, key: str) -> bool:
        """Return True if a bias tensor exists that the config must declare.

        Raises:
            ConfigError: the config does not declare it and the checkpoint's tensors are unknown.
        """
        stated = part.bool(key, None)
        if stated is None and self.tensors is None:
            raise ConfigError(f"{part.source}: {key} is missing")
        return self._is_required(tensor, stated)

    def _is_required(self, tensor: str, stated: bool | None) -> bool:
        """Like `_has_tensor`, but a tensor that the config declares is required; if it is missing, loading fails."""
        return stated is True or self._has_tensor(tensor, stated)

    def _has_tensor(self, tensor: str, stated: bool | None) -> bool:
        """Return True if the checkpoint has the tensor; if its tensors are unknown, what the config declares."""
        if self.tensors is None:
            return bool(stated)
        there = tensor in self.tensors
        if stated is not None and there != stated:
            self._warn_once(
                "%s: the config says %s of %s, the tensors say %s, which counts",
                self.config.source,
                stated,
                tensor.rpartition(".blocks.")[2].partition(".")[2],
                there,
            )
        return there

    def _warn_once(self, message: str, *values: Any) -> None:
        """Log a warning, once for all layers with the same text."""
        text = message % values
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)

    _readers: ClassVar[Mapping[str, Callable[[_BlockReader, HFConfig, str], SingleMixerConfig]]] = {
        "attention": _attention,
        "sliding_window": _attention,
        "mamba": _mamba,
        "gdn": _gdn,
        "kda": _kda,
    }


APRIEL2 = Architecture(
    "Apriel2ForCausalLM",
    read_config,
    checkpoint_names={**LLAMA_NAMES, "layers": "decoder.blocks", "mixer": "mixer", "step_bias": "dt_proj.bias"},
    packed_modules={
        **PACKED_MODULES,
        "qkvzba_proj": ["in_proj_qkvz", "in_proj_ba"],
        "qkvb_proj": ["q_proj", "k_proj", "v_proj", "beta_proj"],
        "low_proj": ["f_a_proj", "g_a_proj"],
    },
    own_name=own_name,
    leftovers=leftovers,
    with_placement=with_placement,
)


class Apriel2ForCausalLM(CausalLM, description=APRIEL2):
    """Apriel2's language model."""
