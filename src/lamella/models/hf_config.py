"""Strict reading of Hugging Face `config.json` files, and the keys that Llama-shaped architectures share.

A key that nobody read is an error, since it may change what the model computes; what is known to be harmless is
listed here. Numbers are accepted as int or float where that loses nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lamella.config import (
    DynamicScaling,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NormConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from lamella.errors import ConfigError

# Training, bookkeeping and generation keys: none changes what a forward computes.
HARMLESS = frozenset(
    """
    architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens
    cache_implementation chunk_size_feed_forward diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id hidden_dropout id2label initializer_range is_decoder keys_to_ignore_at_inference label2id
    length_penalty max_length min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams
    num_labels num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    pretraining_tp problem_type remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)

_MISSING: Any = object()

# Beyond these a file is damaged; what is listed once a layer would take all memory before anything else notices.
_LAYER_COUNTS = frozenset({"num_hidden_layers", "num_blocks", "n_layers"})
_MOST_LAYERS, _MOST = 4096, 2**53


class HFConfig:
    """The values of a config file, each marked as read when asked for.

    `source` names the file in errors; `max_length` is the context length that an engine will use, where one is known,
    and `list_tensors` lists what the checkpoint holds, None where there is nothing to look at.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str = "config.json",
        max_length: int | None = None,
        list_tensors: Callable[[], Collection[str] | None] = lambda: None,
    ) -> None:
        self.values, self.source, self.max_length = dict(values), source, max_length
        self.list_tensors = list_tensors
        self._read: set[str] = set()

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The raw value; a missing or null key gives the default, or an error where there is none."""
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self.source}: {key} is missing")
            return default
        return value

    def int(self, key: str, default: Any = _MISSING, minimum: int = 1) -> Any:
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
            raise self.error(key, value, "a whole number")
        if value < minimum:
            raise self.error(key, value, f"at least {minimum}")
        most = _MOST_LAYERS if key in _LAYER_COUNTS else _MOST
        if value > most:
            raise self.error(key, value, f"at most {most}")
        return int(value)

    def float(self, key: str, default: Any = _MISSING) -> Any:
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(key, value, "a number")
        return float(value)

    def bool(self, key: str, default: Any = _MISSING) -> Any:
        value = self.get(key, default)
        if value is not None and value not in (0, 1):
            raise self.error(key, value, "true or false")
        return None if value is None else bool(value)

    def choice(self, key: str, allowed: Iterable[Any], default: Any = _MISSING) -> Any:
        allowed = tuple(allowed)
        value = self.get(key, default)
        if value not in allowed:
            raise self.error(key, value, f"one of {', '.join(map(repr, allowed))}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A nested mapping without its nulls; empty where there is none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a mapping")
        return {name: item for name, item in value.items() if item is not None}

    def token_ids(self, key: str, default: Any = ()) -> tuple[Any, ...]:
        """A token id, a list of them, or nothing."""
        value = self.get(key, default)
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(key, value, "a token id or a list of them")
        return tuple(ids)

    def section(self, key: str, values: Mapping[str, Any]) -> HFConfig:
        """A nested mapping with the same strictness."""
        self._read.add(key)
        return HFConfig(values, f"{self.source}: {key}", self.max_length, self.list_tensors)

    def error(self, key: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}={value!r} is not supported: must be {allowed}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Refuse keys that nothing has read. Keys that are null or start with an underscore say nothing."""
        known = self._read | HARMLESS | set(harmless)
        unknown = [k for k, v in self.values.items() if k not in known and v is not None and not k.startswith("_")]
        if unknown:
            listed = ", ".join(f"{key}={self.values[key]!r}" for key in sorted(unknown))
            raise ConfigError(f"{self.source}: unknown keys may change what the model computes: {listed}")


def read_head_dim(config: HFConfig) -> int:
    """`head_dim`, by default the heads' share of `hidden_size`."""
    hidden_size, heads = config.int("hidden_size"), config.int("num_attention_heads")
    head_dim = config.int("head_dim", None)
    if head_dim is None and hidden_size % heads:
        raise config.error("num_attention_heads", heads, f"a divisor of hidden_size={hidden_size}, or with a head_dim")
    return head_dim or hidden_size // heads


def read_rope(
    config: HFConfig,
    head_dim: int,
    max_positions: int,
    *,
    interleaved: bool = False,
    dim: int | None = None,
    default_theta: float = 10000.0,
) -> RopeConfig | None:
    """The rotation from `rope_parameters` or from the older `rope_theta` and `rope_scaling`; None where nothing turns.

    `dim` channels of a head turn, by default those that `partial_rotary_factor` says.
    """
    parameters: dict[str, Any] = {}
    top = {key: config.get(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    for place, section in (
        ("rope_parameters", config.mapping("rope_parameters")),
        ("rope_scaling", config.mapping("rope_scaling")),
        (None, top),
    ):
        for key, value in section.items():
            name = "rope_type" if key == "type" else key
            if value is not None and parameters.setdefault(name, value) != value:
                stated = f"{place}.{key}" if place else key
                raise ConfigError(
                    f"{config.source}: {stated}={value!r} contradicts {name}={parameters[name]!r} elsewhere"
                )
    # The top-level original length wins over the nested one, as in transformers.
    original = config.get("original_max_position_embeddings", None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    fields = config.section("rope_parameters", parameters)
    kind = fields.choice("rope_type", ("default", "linear", "dynamic", "llama3", "yarn"), "default")
    theta = fields.float("rope_theta", default_theta)
    factor = fields.float("partial_rotary_factor", 1.0)
    if dim is None:
        dim = int(head_dim * factor + 1e-6)  # a quotient of whole numbers that rounding made a little too small
    rope_scaling = _read_scaling(fields, kind, max_positions)
    # A file may carry these for kinds that do not use them.
    fields.finish(harmless=("factor", "original_max_position_embeddings"))
    if dim == 0:
        return None
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, scaling=rope_scaling)


def _read_scaling(fields: HFConfig, kind: str, max_positions: int) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=fields.float("factor"))
    if kind == "dynamic":
        # transformers scales beyond max_position_embeddings, whatever the original length says.
        length = max(fields.max_length or max_positions, max_positions)
        return DynamicScaling(factor=fields.float("factor"), original_length=max_positions, length=length)
    original = fields.int("original_max_position_embeddings", max_positions)
    if kind == "llama3":
        return Llama3Scaling(
            factor=fields.float("factor"),
            low_freq_factor=fields.float("low_freq_factor"),
            high_freq_factor=fields.float("high_freq_factor"),
            original_length=original,
        )
    factor = fields.float("factor", max_positions / original)
    return YarnScaling(
        factor=factor,
        original_length=original,
        attention_factor=_yarn_attention_factor(fields, factor),
        beta_fast=fields.float("beta_fast", 32.0),
        beta_slow=fields.float("beta_slow", 1.0),
        truncate=fields.bool("truncate", True),
    )


def _yarn_attention_factor(fields: HFConfig, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    explicit, scale = fields.float("attention_factor", None), fields.float("mscale", None)
    scale_all = fields.float("mscale_all_dim", None)
    if explicit is not None:
        return explicit
    return magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)


def read_windows(config: HFConfig, num_layers: int, window: int | None, first: int) -> list[int | None]:
    """The attention window of each layer: from `layer_types`, else `window` for the layers from `first` on."""
    types = config.get("layer_types", None)
    if types is None:
        return [window if index >= first else None for index in range(num_layers)]
    if not isinstance(types, list | tuple) or len(types) != num_layers:
        raise config.error("layer_types", types, f"a list of num_hidden_layers={num_layers} names")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise config.error("layer_types", kind, "full_attention or sliding_attention")
    if "sliding_attention" in types and window is None:
        raise ConfigError(f"{config.source}: layer_types has sliding_attention, but no sliding_window is in force")
    return [window if kind == "sliding_attention" else None for kind in types]


def read_model(
    config: HFConfig,
    architecture: str,
    layers: Iterable[LayerConfig],
    eps: float,
    max_positions: int,
    *,
    defaults: Mapping[str, Any] | None = None,
    length_is_known: bool = True,
    harmless: Iterable[str] = (),
) -> ModelConfig:
    """The keys around the layers; then no key may be left unread.

    `defaults` are those of vocab_size, hidden_size, bos_token_id and eos_token_id, where the architecture has some;
    `harmless` are its keys that compute nothing here.
    """
    for key in ("is_encoder_decoder", "add_cross_attention", "pruned_heads"):
        config.choice(key, (False, {}), False)  # transformers writes these out
    defaults = dict(defaults or {})
    bos = config.token_ids("bos_token_id", defaults.get("bos_token_id", ()))

    def size(key: str) -> int:
        return config.int(key, *((defaults[key],) if key in defaults else ()))

    model = ModelConfig(
        architecture=architecture,
        vocab_size=size("vocab_size"),
        hidden_size=size("hidden_size"),
        layers=tuple(layers),
        norm=NormConfig(eps=eps),
        tie_word_embeddings=config.bool("tie_word_embeddings", False),
        max_position_embeddings=max_positions,
        length_is_known=length_is_known,
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=config.token_ids("eos_token_id", defaults.get("eos_token_id", ())),
    )
    config.finish(harmless)
    return model
