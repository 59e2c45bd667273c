"""Placements of a supernet: the active mixer of each layer, and the notations for it.

A placement is a tuple with one mixer name per decoder layer; None for a layer without a choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from lamella.config.mixers import MixerConfig, SingleMixerConfig, StochasticConfig
from lamella.config.model import LayerConfig, ModelConfig
from lamella.errors import ConfigError

Placement: TypeAlias = tuple[str | None, ...]

# Notations of users: a string (see `_names_from_string`), a list of names, or names by layer.
PlacementLike: TypeAlias = "str | Sequence[str | None] | Mapping[int, str] | Mapping[str, str]"

SHORT_NAMES = {"swa": "sliding_window", "attn": "attention"}
_EVERY = re.compile(r"every(\d+)(?:st|nd|rd|th)-(.+)")


def stochastic_layers(config: ModelConfig) -> dict[int, StochasticConfig]:
    """Return the layers that have a choice of mixers, by index."""
    return {i: layer.mixer for i, layer in enumerate(config.layers) if isinstance(layer.mixer, StochasticConfig)}


def every_mixer(mixer: MixerConfig) -> tuple[SingleMixerConfig, ...]:
    """Return all mixers of a layer; a single one for a layer without a choice."""
    return tuple(sub for _, sub in mixer.mixers) if isinstance(mixer, StochasticConfig) else (mixer,)


def main_placement(config: ModelConfig) -> Placement:
    """Return the placement of the checkpoint's config."""
    return tuple(layer.mixer.main if isinstance(layer.mixer, StochasticConfig) else None for layer in config.layers)


def mixer_names(config: ModelConfig) -> tuple[str, ...]:
    """Return the mixer names of all layers, without duplicates; empty if no layer has a choice."""
    return tuple(dict.fromkeys(name for mixer in stochastic_layers(config).values() for name in mixer.names))


def read_placement(written: PlacementLike | None, config: ModelConfig) -> Placement:
    """Return the placement that a user has written.

    Args:
        written: None for the main placement, or one of these forms:

            * A string: `all-X`; `everyNth-X` (X in every Nth stochastic layer, attention in the others);
              `bookend-attn-X` (attention in the first two and last two stochastic layers, X in the others); or names
              separated by commas. "swa" is short for sliding_window, "attn" for attention.
            * A list with one name per stochastic layer, or per layer of the model (names of layers without a choice are
              ignored).
            * A mapping from layer indices to names; other layers keep their main mixer.
        config: of the supernet.

    Returns:
        The placement.

    Raises:
        ConfigError: a layer or a mixer does not exist.
    """
    main = main_placement(config)
    if written is None:
        return main
    choices = stochastic_layers(config)
    if not choices:
        raise ConfigError(f"placement={written!r}: no layer of the model has a choice of mixers")
    chosen = dict(enumerate(main))
    if isinstance(written, Mapping):
        for key, name in written.items():
            layer = int(key) if str(key).lstrip("-").isdigit() else None
            if layer not in choices:
                raise ConfigError(f"placement: layer {key!r} has no choice; those that have: {_listed(choices)}")
            chosen[layer] = name
    else:
        names = _names_from_string(written, len(choices)) if isinstance(written, str) else list(written)
        if len(names) == len(choices):
            chosen.update(zip(choices, names, strict=True))
        elif len(names) == len(config.layers):
            chosen.update({layer: names[layer] for layer in choices})
        else:
            raise ConfigError(
                f"placement: {len(names)} names, for {len(choices)} stochastic layers of {len(config.layers)}"
            )
    return tuple(_resolve(layer, chosen[layer], choices[layer]) if layer in choices else None for layer in chosen)


def _names_from_string(written: str, count: int) -> list[str]:
    """Return the names of `count` stochastic layers from the string form of a placement."""
    every = _EVERY.fullmatch(written)
    if every is not None:
        step = int(every[1])
        if step == 0:
            raise ConfigError(f"placement={written!r}: every 0th layer is none")
        return [every[2] if (index + 1) % step == 0 else "attention" for index in range(count)]
    if written.startswith("all-"):
        return [written.removeprefix("all-")] * count
    if written.startswith("bookend-attn-"):
        name = written.removeprefix("bookend-attn-")
        return ["attention" if index < 2 or index >= count - 2 else name for index in range(count)]
    return [name.strip() for name in written.split(",")]


def _resolve(layer: int, name: object, mixer: StochasticConfig) -> str:
    """Return the full name of a layer's mixer from its full or short name."""
    if isinstance(name, str):
        for candidate in (name, SHORT_NAMES.get(name, name)):
            if candidate in mixer.names:
                return candidate
    raise ConfigError(f"placement: layer {layer} has no mixer {name!r}; it has {', '.join(mixer.names)}")


def _listed(layers: Mapping[int, StochasticConfig]) -> str:
    return ", ".join(map(str, layers))


def covering_placements(config: ModelConfig) -> list[Placement]:
    """Return the fewest placements that use every mixer of every layer; a single one if no layer has a choice."""
    choices = stochastic_layers(config)
    count = max((len(mixer.names) for mixer in choices.values()), default=1)

    def name(layer: int, number: int) -> str | None:
        return choices[layer].names[number % len(choices[layer].names)] if layer in choices else None

    return [tuple(name(layer, number) for layer in range(len(config.layers))) for number in range(count)]


def chosen_mixer(placement: Placement, layer: int) -> str:
    """Return a placement's mixer for a layer with a choice.

    Raises:
        ConfigError: the placement names no mixer for the layer.
    """
    name = placement[layer]
    if name is None:
        raise ConfigError(f"placement: layer {layer} has several mixers, and none is named")
    return name


def placed(config: ModelConfig, placement: Placement) -> ModelConfig:
    """Return the model without choices that a supernet with this placement computes."""

    def fix_mixer(layer: LayerConfig, name: str | None) -> LayerConfig:
        if not isinstance(layer.mixer, StochasticConfig):
            return layer
        return replace(layer, mixer=next(mixer for own, mixer in layer.mixer.mixers if own == name))

    return replace(config, layers=tuple(map(fix_mixer, config.layers, placement)))


def restricted(config: ModelConfig, placement: Placement) -> ModelConfig:
    """Return a supernet with only the mixers of the placement. Unlike `placed`, tensor names do not change."""

    def restrict(layer: LayerConfig, name: str | None) -> LayerConfig:
        if not isinstance(layer.mixer, StochasticConfig):
            return layer
        ((main, mixer),) = (named for named in layer.mixer.mixers if named[0] == name)
        return replace(layer, mixer=replace(layer.mixer, mixers=((main, mixer),), main=main))

    return replace(config, layers=tuple(map(restrict, config.layers, placement)))


def describe_placement(placement: Placement) -> str:
    """Return a placement as a string that `read_placement` accepts: names separated by commas, or `all-X`."""
    names = [name for name in placement if name is not None]
    return f"all-{names[0]}" if len(set(names)) == 1 else ",".join(names)
