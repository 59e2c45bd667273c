"""`Architecture`: the description of a family of models, from which loaders, engines and converters derive the rest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lamella.config import ModelConfig, Placement
from lamella.config.hf_config import HFConfig
from lamella.models.names import LLAMA_NAMES, PACKED_MODULES


def keep_name(name: str) -> str | None:
    """Return `name`: every tensor of the files belongs to the language model."""
    return name


def no_leftovers(names: Collection[str], expected: Collection[str]) -> set[str]:
    """Return an empty set: every unexpected tensor is an error."""
    return set()


def no_placements(values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
    """Raise `NotImplementedError`: the architecture has no supernets whose placement can be written."""
    raise NotImplementedError("the architecture does not define how a placement is written into config.json")


@dataclass(frozen=True, eq=False)
class Architecture:
    """Description of an architecture: data and functions only, without modules or weights.

    Attributes:
        name: name in `architectures` of a checkpoint's `config.json`.
        read_config: returns the layers that a `config.json` describes. Raises `ConfigError`.
        checkpoint_names: rewrites lamella's parameter paths into the checkpoint's. Each key is one or more path
            components of lamella ("mixer.canon"), each value replaces them in the file.
        packed_modules: projections of the file, in order, by the lamella module that contains them. LoRA and
            quantization tools read it.
        outer_prefix: prefix of the language model's tensors in files of larger models ("language_model.").
        has_slot_state: False if no layer of any model of the architecture has slot state.
        own_name: returns the name of a file's tensor without `outer_prefix`, or None if the tensor belongs to another
            part of a larger model and is not read.
        leftovers: given the unexpected tensors of a file and the expected ones, returns those that the architecture's
            own tools leave in files and that are not an error.
        with_placement: returns the values of a supernet's `config.json` with another main placement.
        image_model: "module:Class" of the `ImageModel` that encodes images; None if the architecture reads text only.
        path: "module:attribute" by which another process imports the description; by default the attribute is searched
            in the module of `read_config`.
    """

    name: str
    read_config: Callable[[HFConfig], ModelConfig]
    checkpoint_names: Mapping[str, str] = field(default_factory=lambda: dict(LLAMA_NAMES))
    packed_modules: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(PACKED_MODULES))
    outer_prefix: str = ""
    has_slot_state: bool = True
    own_name: Callable[[str], str | None] = keep_name
    leftovers: Callable[[Collection[str], Collection[str]], set[str]] = no_leftovers
    with_placement: Callable[[Mapping[str, Any], Placement], dict[str, Any]] = no_placements
    image_model: str | None = None
    path: str | None = None

    @property
    def import_path(self) -> str | None:
        """The "module:attribute" by which another process imports the description; None if there is none."""
        if self.path is not None:
            return self.path
        module = sys.modules.get(self.read_config.__module__)
        found = (name for name, value in vars(module).items() if value is self) if module is not None else iter(())
        name = next(found, None)
        return None if name is None else f"{self.read_config.__module__}:{name}"
