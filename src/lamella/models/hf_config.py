"""Strict reading of Hugging Face `config.json` files, and the keys that Llama-shaped architectures share.

A key that the reader has not read is ignored with a warning, or an error: `config_keys.json` has the rules. Numbers are
accepted as int or float where that loses nothing.
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
    LongRopeScaling,
    ModelConfig,
    NormConfig,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from lamella.config.feed_forward import ACTIVATIONS
from lamella.errors import ConfigError
from lamella.models.config_keys import IgnoredKeys, KeyRules, way_out

_MISSING: Any = object()

# Beyond these a file is damaged; what is listed once a layer would take all memory before anything else notices.
_LAYER_COUNTS = frozenset({"num_hidden_layers", "num_blocks", "n_layers"})
_MOST_LAYERS, _MOST = 4096, 2**53


class HFConfig:
    """The values of a config file, each marked as read when asked for."""

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str = "config.json",
        max_length: int | None = None,
        list_tensors: Callable[[], Collection[str] | None] = lambda: None,
        ignored: IgnoredKeys | None = None,
        path: tuple[str, ...] = (),
        origins: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Wrap `values` for one reader.

        Args:
            values: the keys of the file, or of a section of it.
            source: the file's name in errors.
            max_length: the context length that an engine will use, where one is known.
            list_tensors: lists the checkpoint's tensors; None where there is nothing to look at.
            ignored: collects the keys that are ignored, for one warning per load.
            path: where in the file the section stands.
            origins: where in the file some keys stand that do not stand at `path`.
        """
        self.values, self.source, self.max_length = dict(values), source, max_length
        self.list_tensors = list_tensors
        self.path, self._origins = path, dict(origins or {})
        self._ignored = ignored if ignored is not None else IgnoredKeys()
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

    def section(
        self, key: str, values: Mapping[str, Any], origins: Mapping[str, tuple[str, ...]] | None = None
    ) -> HFConfig:
        """Return a nested mapping with the same strictness; `origins` as in the constructor."""
        self._read.add(key)
        source, path = f"{self.source}: {key}", self.path_of(key)
        return HFConfig(values, source, self.max_length, self.list_tensors, self._ignored, path, origins)

    def path_of(self, key: str) -> tuple[str, ...]:
        """Return where in the file `key` stands."""
        return self._origins.get(key, (*self.path, key))

    def ignore(self, *keys: str) -> None:
        """Mark keys as read, and list those that the file has among the ignored ones."""
        for key in keys:
            self._read.add(key)
            if self.values.get(key) is not None:
                self._ignored.add(".".join(self.path_of(key)), self.values[key])

    def say(self, message: str) -> None:
        """Log how the file is read, once per load."""
        self._ignored.say(f"{self.source}: {message}")

    def error(self, key: str, value: Any, allowed: str) -> ConfigError:
        return ConfigError(f"{self.source}: {key}={value!r} is not supported: must be {allowed}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Ignore or refuse the keys that nothing has read, see `KeyRules`.

        Keys that are null or start with an underscore say nothing. `harmless` are keys of this architecture that
        compute nothing.

        Raises:
            ConfigError: a key changes what the model computes, or may do so.
        """
        rules = KeyRules.read()
        known = self._read | rules.silent | set(harmless)
        left = [k for k, v in self.values.items() if k not in known and v is not None and not k.startswith("_")]
        unsupported: dict[str, str] = {}
        unknown: list[str] = []
        for key in sorted(left):
            if rules.why_ignored(key, self.values[key]) is not None:
                self.ignore(key)
            elif (why := rules.why_refused(key)) is not None:
                unsupported[key] = why
            else:
                unknown.append(key)
        problems = [
            f"{key}={self.values[key]!r} is not supported for this architecture ({why})"
            for key, why in unsupported.items()
        ]
        if unknown:
            listed = ", ".join(f"{key}={self.values[key]!r}" for key in unknown)
            problems.append(f"unknown keys may change what the model computes: {listed}")
        if problems:
            out = way_out([self.path_of(key) for key in (*unsupported, *unknown)])
            raise ConfigError(f"{self.source}: {'; '.join(problems)}; to compute without: {out}")
        if not self.path:
            self._ignored.log(self.source)


def read_head_dim(config: HFConfig) -> int:
    """`head_dim`, by default the heads' share of `hidden_size`."""
    hidden_size, heads = config.int("hidden_size"), config.int("num_attention_heads")
    head_dim = config.int("head_dim", None)
    if head_dim is None and hidden_size % heads:
        raise config.error("num_attention_heads", heads, f"a divisor of hidden_size={hidden_size}, or with a head_dim")
    return head_dim or hidden_size // heads


# transformers' names (ACT2FN) of what we call otherwise. Several are one function, computed in different ways.
_ACT2FN = {
    "swish": "silu",
    "linear": "identity",
    "gelu_python": "gelu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_accurate": "gelu_pytorch_tanh",
    "gelu_python_tanh": "gelu_pytorch_tanh",
}


def read_activation(config: HFConfig, key: str = "hidden_act") -> str:
    """Return our name of a feed-forward's activation, which a file calls as transformers' ACT2FN does.

    Raises:
        ConfigError: the name is unknown, or means a function with weights of its own (prelu, xielu).
    """
    name = config.get(key, "silu")
    known = [other for other in (*ACTIVATIONS, *_ACT2FN) if other != "identity"]
    if not isinstance(name, str) or name not in known:
        raise config.error(key, name, f"one of {', '.join(sorted(known))}")
    return _ACT2FN.get(name, name)


def read_output_bias(config: HFConfig, stated: bool) -> bool:
    """Return whether `o_proj` has a bias: what the tensors say, else what `attention_bias` states.

    Files of models with biases of queries, keys and values only state `attention_bias` too.
    """
    tensors = config.list_tensors() if stated else None
    if tensors is None or any(name.endswith("o_proj.bias") for name in tensors):
        return stated
    config.say("attention_bias=true, and no o_proj.bias in the files: o_proj has none")
    return False


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
    origins: dict[str, tuple[str, ...]] = {}
    top = {key: config.get(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    for place, section in (
        ("rope_parameters", config.mapping("rope_parameters")),
        ("rope_scaling", config.mapping("rope_scaling")),
        (None, top),
    ):
        for key, value in section.items():
            name = "rope_type" if key == "type" else key
            if value is None:
                continue
            if parameters.setdefault(name, value) != value:
                stated = f"{place}.{key}" if place else key
                raise ConfigError(
                    f"{config.source}: {stated}={value!r} contradicts {name}={parameters[name]!r} elsewhere"
                )
            origins.setdefault(name, (*config.path, place, key) if place else config.path_of(key))
    # The top-level original length wins over the nested one, as in transformers.
    original = config.get("original_max_position_embeddings", None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    fields = config.section("rope_parameters", parameters, origins)
    kind = fields.choice("rope_type", _ROPE_TYPES, "default")
    theta = fields.float("rope_theta", default_theta)
    factor = fields.float("partial_rotary_factor", 1.0)
    if dim is None:
        dim = int(head_dim * factor + 1e-6)  # a quotient of whole numbers that rounding made a little too small
    rope_scaling = _read_scaling(fields, kind, max_positions, dim)
    # A file may carry these for kinds that do not use them; `finetuned` belongs to dynamic YaRN, which files cannot ask
    # for.
    fields.ignore("finetuned")
    fields.finish(harmless=("factor", "original_max_position_embeddings"))
    if dim == 0:
        return None
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, scaling=rope_scaling)


# "su" is what Phi-3's first files call longrope.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


def _read_scaling(fields: HFConfig, kind: str, max_positions: int, dim: int) -> RopeScaling | None:
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
    if kind in ("longrope", "su"):
        return _read_longrope(fields, max_positions, original, dim)
    factor = fields.float("factor", max_positions / original)
    return YarnScaling(
        factor=factor,
        original_length=original,
        attention_factor=_yarn_attention_factor(fields, factor),
        beta_fast=fields.float("beta_fast", 32.0),
        beta_slow=fields.float("beta_slow", 1.0),
        truncate=fields.bool("truncate", True),
        extrapolation_factor=fields.float("extrapolation_factor", 1.0),
    )


def _read_longrope(fields: HFConfig, max_positions: int, original: int, dim: int) -> LongRopeScaling:
    """The factors of one length: an engine's, since cached keys cannot be rotated again."""
    factor = fields.float("factor", max_positions / original)
    magnitude = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {}
    for key in ("short_factor", "long_factor"):
        value = fields.get(key)
        numbers = isinstance(value, list | tuple) and all(
            isinstance(f, int | float) and not isinstance(f, bool) and math.isfinite(f) and f > 0 for f in value
        )
        if not numbers or len(value) != dim // 2:
            raise fields.error(key, value, f"{dim // 2} positive numbers, one for each pair of rotated channels")
        factors[key] = tuple(float(f) for f in value)
    length = fields.max_length or max_positions
    # Phi-3 MoE's files scale the two cases apart.
    parts = {"short_factor": "short_mscale", "long_factor": "long_mscale"}
    chosen = "long_factor" if length > original else "short_factor"
    explicit = fields.float("attention_factor", None)
    scales = {key: fields.float(name, None) for key, name in parts.items()}
    if explicit is None:
        explicit = scales[chosen]
    return LongRopeScaling(factors=factors[chosen], attention_factor=magnitude if explicit is None else explicit)


def _yarn_attention_factor(fields: HFConfig, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    explicit, scale = fields.float("attention_factor", None), fields.float("mscale", None)
    scale_all = fields.float("mscale_all_dim", None)
    # The name of YaRN's authors, and of vLLM: a factor of the default, not in its place.
    multiplier = fields.float("attn_factor", 1.0)
    if explicit is not None:
        if multiplier not in (1.0, explicit):
            raise ConfigError(
                f"{fields.source}: attn_factor={multiplier!r} contradicts attention_factor={explicit!r}; to remove it: "
                f"{way_out([fields.path_of('attn_factor')])}"
            )
        return explicit
    default = magnitude(scale) / magnitude(scale_all) if scale and scale_all else magnitude(1.0)
    return default * multiplier


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
