"""Reader of the RoPE keys of `config.json` files."""

from __future__ import annotations

import math

from lamella.config.config_keys import way_out
from lamella.config.hf_config import HFConfig
from lamella.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from lamella.errors import ConfigError
from lamella.validation import finite

# "su" is the former name of longrope, in the first Phi-3 files.
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "su")


def read_rope(
    config: HFConfig,
    head_dim: int,
    max_positions: int,
    *,
    interleaved: bool = False,
    dim: int | None = None,
    default_theta: float = 10000.0,
) -> RopeConfig | None:
    """Read the RoPE from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`.

    Args:
        config: the model's config file.
        head_dim: channels of a head.
        max_positions: longest context that the file supports, in tokens.
        interleaved: True to rotate channel pairs (2i, 2i + 1) instead of (i, i + dim / 2).
        dim: number of rotated channels of a head; default: by `partial_rotary_factor`.
        default_theta: base, if the file has none.

    Returns:
        The RoPE, or None if no channel is rotated.

    Raises:
        ConfigError: keys contradict each other, or the type of scaling is unknown.
    """
    fields = _collect_parameters(config)
    kind = fields.choice("rope_type", _ROPE_TYPES, "default")
    theta = fields.float("rope_theta", default_theta)
    factor = fields.float("partial_rotary_factor", 1.0)
    if dim is None:
        dim = int(head_dim * factor + 1e-6)  # rounding may have made a quotient of integers slightly too small
    scaling = _read_scaling(fields, kind, max_positions, dim)
    # Files may have these keys for scalings that do not use them. `finetuned` belongs to dynamic YaRN, which has no
    # `rope_type`.
    fields.ignore("finetuned")
    fields.finish(harmless=("factor", "original_max_position_embeddings"))
    if dim == 0:
        return None
    return RopeConfig(dim=dim, theta=theta, interleaved=interleaved, scaling=scaling)


def _collect_parameters(config: HFConfig) -> HFConfig:
    """Return the RoPE parameters from all sections of the file as one section."""
    parameters: dict[str, object] = {}
    origins: dict[str, tuple[str, ...]] = {}
    top = {key: config.get(key, None) for key in ("rope_theta", "partial_rotary_factor")}
    for location, section in (
        ("rope_parameters", config.mapping("rope_parameters")),
        ("rope_scaling", config.mapping("rope_scaling")),
        (None, top),
    ):
        for key, value in section.items():
            name = "rope_type" if key == "type" else key
            if value is None:
                continue
            if parameters.setdefault(name, value) != value:
                stated = f"{location}.{key}" if location else key
                raise ConfigError(
                    f"{config.source}: {stated}={value!r} contradicts {name}={parameters[name]!r} elsewhere"
                )
            origins.setdefault(name, (*config.path, location, key) if location else config.path_of(key))
    # The top-level original length has precedence over the nested one, as in transformers.
    original = config.get("original_max_position_embeddings", None)
    if original is not None:
        parameters["original_max_position_embeddings"] = original
    return config.section("rope_parameters", parameters, origins)


def _read_scaling(fields: HFConfig, kind: str, max_positions: int, dim: int) -> RopeScaling | None:
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(factor=fields.float("factor"))
    if kind == "dynamic":
        # As in transformers, scaling starts beyond max_position_embeddings, not beyond the original length.
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
    """Return the factors for the engine's context length, since cached keys cannot be rotated again."""
    factor = fields.float("factor", max_positions / original)
    magnitude = 1.0 if factor <= 1 or original <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    factors = {key: _read_factors(fields, key, dim // 2) for key in ("short_factor", "long_factor")}
    length = fields.max_length or max_positions
    # Files of Phi-3 MoE have one attention factor for each of the two lists.
    scale_names = {"short_factor": "short_mscale", "long_factor": "long_mscale"}
    chosen = "long_factor" if length > original else "short_factor"
    explicit = fields.float("attention_factor", None)
    scales = {key: fields.float(name, None) for key, name in scale_names.items()}
    if explicit is None:
        explicit = scales[chosen]
    return LongRopeScaling(factors=factors[chosen], attention_factor=magnitude if explicit is None else explicit)


def _read_factors(fields: HFConfig, key: str, count: int) -> tuple[float, ...]:
    value = fields.get(key)
    found = [finite(f) for f in (value if isinstance(value, list | tuple) else ()) if isinstance(f, int | float)]
    numbers = [f for f in found if f is not None and f > 0]
    if not isinstance(value, list | tuple) or not len(numbers) == len(value) == count:
        raise fields.error(key, value, f"{count} positive numbers, one for each pair of rotated channels")
    return tuple(numbers)


def _yarn_attention_factor(fields: HFConfig, factor: float) -> float:
    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    explicit, scale = fields.float("attention_factor", None), fields.float("mscale", None)
    scale_all = fields.float("mscale_all_dim", None)
    # Key of YaRN's authors and of vLLM. It multiplies the default factor; `attention_factor` replaces it.
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
