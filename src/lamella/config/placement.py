"""Placements of a supernet: which mixer is active in each layer, and the ways to write that down.

A placement is a tuple with a name for each decoder layer, None where a layer has no choice.
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

# What users write: the small language of `_spell`, a list of names, or names by layer.
PlacementLike: TypeAlias = "str | Sequence[str | None] | Mapping[int, str] | Mapping[str, str]"

SHORT_NAMES = {"swa": "sliding_window", "attn": "attention"}
_EVERY = re.compile(r"every(\d+)(?:st|nd|rd|th)-(.+)")


def stochastic_layers(config: ModelConfig) -> dict[int, StochasticConfig]:
    """The layers that have a choice."""
    return {i: layer.mixer for i, layer in enumerate(config.layers) if isinstance(layer.mixer, StochasticConfig)}


def every_mixer(mixer: MixerConfig) -> tuple[SingleMixerConfig, ...]:
    """The mixers that a layer may compute with: one, where it has no choice."""
    return tuple(sub for _, sub in mixer.mixers) if isinstance(mixer, StochasticConfig) else (mixer,)


def main_placement(config: ModelConfig) -> Placement:
    """The one that the checkpoint's config says."""
    return tuple(layer.mixer.main if isinstance(layer.mixer, StochasticConfig) else None for layer in config.layers)


def mixer_names(config: ModelConfig) -> tuple[str, ...]:
    """The mixers that any layer can have, in the order of the layers; empty where no layer has a choice."""
    return tuple(dict.fromkeys(name for mixer in stochastic_layers(config).values() for name in mixer.names))


def read_placement(written: PlacementLike | None, config: ModelConfig) -> Placement:
    """Return a placement from one of the forms in which users write it.

    None is the main placement. Other forms:

    * a string: `all-X`; `everyNth-X` (X in each Nth stochastic layer, attention in the others); `bookend-attn-X`
      (attention in the first and last two); or names separated by commas. "swa" is short for sliding_window, "attn" for
      attention;
    * a list with a name for each stochastic layer, or for each layer of the model (those of layers without a choice do
      not count);
    * a mapping from layers, by their index in the model, to names; other layers keep their main mixer.

    Raises:
        ConfigError: a layer or a name does not exist; the error names it.
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
        names = _spell(written, len(choices)) if isinstance(written, str) else list(written)
        if len(names) == len(choices):
            chosen.update(zip(choices, names, strict=True))
        elif len(names) == len(config.layers):
            chosen.update({layer: names[layer] for layer in choices})
        else:
            raise ConfigError(
                f"placement: {len(names)} names, for {len(choices)} stochastic layers of {len(config.layers)}"
            )
    return tuple(_resolve(layer, chosen[layer], choices[layer]) if layer in choices else None for layer in chosen)


def _spell(written: str, count: int) -> list[str]:
    """The names of a placement in the small language, for `count` stochastic layers."""
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
    """The layer's own name for a mixer that may be named in short."""
    if isinstance(name, str):
        for candidate in (name, SHORT_NAMES.get(name, name)):
            if candidate in mixer.names:
                return candidate
    raise ConfigError(f"placement: layer {layer} has no mixer {name!r}; it has {', '.join(mixer.names)}")


def _listed(layers: Mapping[int, StochasticConfig]) -> str:
    return ", ".join(map(str, layers))


def covering_placements(config: ModelConfig) -> list[Placement]:
    """As few as have every mixer of every layer in one of them; one, where no layer has a choice."""
    choices = stochastic_layers(config)
    count = max((len(mixer.names) for mixer in choices.values()), default=1)

    def name(layer: int, turn: int) -> str | None:
        return choices[layer].names[turn % len(choices[layer].names)] if layer in choices else None

    return [tuple(name(layer, turn) for layer in range(len(config.layers))) for turn in range(count)]


def chosen_mixer(placement: Placement, layer: int) -> str:
    """Return the name of the mixer of a layer with a choice.

    Raises:
        ConfigError: the placement has no mixer for the layer.
    """
    name = placement[layer]
    if name is None:
        raise ConfigError(f"placement: layer {layer} has several mixers, and none is named")
    return name


def placed(config: ModelConfig, placement: Placement) -> ModelConfig:
    """The model without a choice: what a supernet with this placement computes."""

    def place(layer: LayerConfig, name: str | None) -> LayerConfig:
        if not isinstance(layer.mixer, StochasticConfig):
            return layer
        return replace(layer, mixer=next(mixer for own, mixer in layer.mixer.mixers if own == name))

    return replace(config, layers=tuple(map(place, config.layers, placement)))


def restricted(config: ModelConfig, placement: Placement) -> ModelConfig:
    """The supernet whose layers have no mixer but the placement's: what it computes, under the same names."""

    def restrict(layer: LayerConfig, name: str | None) -> LayerConfig:
        if not isinstance(layer.mixer, StochasticConfig):
            return layer
        ((main, mixer),) = (pair for pair in layer.mixer.mixers if pair[0] == name)
        return replace(layer, mixer=replace(layer.mixer, mixers=((main, mixer),), main=main))

    return replace(config, layers=tuple(map(restrict, config.layers, placement)))


def describe_placement(placement: Placement) -> str:
    """In one line, as `read_placement` reads it: the names of the stochastic layers, `all-X` where they are one."""
    names = [name for name in placement if name is not None]
    return f"all-{names[0]}" if len(set(names)) == 1 else ",".join(names)
