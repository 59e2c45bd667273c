"""`CausalLM`: the model class of an architecture, made from its description."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import new_class
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

from lamella.config import ModelConfig, Placement
from lamella.config.hf_config import HFConfig
from lamella.layers.decoder import LanguageModel
from lamella.layers.kit import Kit
from lamella.layers.local_kit import LocalKit
from lamella.layers.parameters import initialize as initialize
from lamella.layers.supernet.placing import SupernetModel
from lamella.models.architecture import Architecture, keep_name, no_leftovers, no_placements
from lamella.models.names import LLAMA_NAMES, PACKED_MODULES, rename, shard_ids
from lamella.models.weight_loaders import attach_weight_loaders

# Resolved on use: `lamella.checkpoint` imports this package.
_LOADER = "lamella.checkpoint.pretrained:load_pretrained"

_classes: dict[Architecture, type[CausalLM]] = {}


class CausalLM(SupernetModel):
    """Decoder and head of an architecture, with the usual constructors and loaders of other libraries.

    A subclass names its description: `class LlamaForCausalLM(CausalLM, description=LLAMA)`. Its class attributes are
    then copied from the description. A subclass without a description defines the attributes itself, and its
    description is built from them.

    Attributes:
        description: description of the architecture; the only attribute that engines, loaders and converters read.
        checkpoint_names: see `Architecture`.
        packed_modules_mapping: `Architecture.packed_modules`, under the name that LoRA and quantization tools use.
        packed_module_mapping: module and shard id for `weight_loader`, by the projection's name in files.
        outer_prefix: see `Architecture`.
        has_slot_state: see `Architecture`.
        image_model: see `Architecture`.
    """

    description: ClassVar[Architecture]
    checkpoint_names: ClassVar[Mapping[str, str]] = LLAMA_NAMES
    packed_modules_mapping: ClassVar[Mapping[str, Sequence[str]]] = PACKED_MODULES
    packed_module_mapping: ClassVar[Mapping[str, tuple[str, str | int]]] = shard_ids(PACKED_MODULES)
    outer_prefix: ClassVar[str] = ""
    has_slot_state: ClassVar[bool] = True
    image_model: ClassVar[str | None] = None

    def __init__(self, config: ModelConfig, kit: Kit | None = None) -> None:
        """Build a model with random weights (linear layers and embeddings N(0, 0.02), convolutions as in torch)."""
        super().__init__(config, kit or LocalKit(torch.get_default_dtype()))
        attach_weight_loaders(self)
        initialize(self)

    def __init_subclass__(cls, description: Architecture | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        if description is not None:
            cls.checkpoint_names, cls.packed_modules_mapping = description.checkpoint_names, description.packed_modules
            cls.outer_prefix, cls.has_slot_state = description.outer_prefix, description.has_slot_state
            cls.image_model = description.image_model
            for name in ("read_config", "own_name", "leftovers", "with_placement"):
                setattr(cls, name, staticmethod(getattr(description, name)))
        if not isinstance(cls.image_model, str | None):
            raise TypeError(f"{cls.__name__}.image_model: must be None or 'module:Class' of an ImageModel")
        cls.description = description or Architecture(
            cls.__name__,
            cls.read_config,
            cls.checkpoint_names,
            cls.packed_modules_mapping,
            cls.outer_prefix,
            cls.has_slot_state,
            cls.own_name,
            cls.leftovers,
            cls.with_placement,
            cls.image_model,
            f"{cls.__module__}:{cls.__qualname__}",
        )
        cls.packed_module_mapping = shard_ids(cls.packed_modules_mapping)
        _classes[cls.description] = cls

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by its path here or by its name in checkpoints, which vLLM-like loading loops use."""
        own = target
        if target not in (paths := [path for path, _ in self.named_parameters(remove_duplicate=False)]):
            own = next((path for path in paths if rename(path, self.checkpoint_names) == target), target)
        return super().get_parameter(own)

    @classmethod
    def read_config(cls, config: HFConfig) -> ModelConfig:
        """Return the layers that a `config.json` describes; see `Architecture.read_config`."""
        raise NotImplementedError(f"{cls.__name__}.read_config")

    @classmethod
    def own_name(cls, name: str) -> str | None:
        """Return the name of a file's tensor in the language model; see `Architecture.own_name`."""
        return keep_name(name)

    @classmethod
    def leftovers(cls, names: Collection[str], expected: Collection[str]) -> set[str]:
        """Return the unexpected tensors that are not an error; see `Architecture.leftovers`."""
        return no_leftovers(names, expected)

    @classmethod
    def with_placement(cls, values: Mapping[str, Any], placement: Placement) -> dict[str, Any]:
        """Return a supernet's config values with another placement; see `Architecture.with_placement`."""
        return no_placements(values, placement)

    @classmethod
    def allocate(cls, config: ModelConfig, kit: Kit) -> Self:
        """Build a model with uninitialized parameters, for a loader to fill.

        Args:
            config: config of the model.
            kit: builds the modules and decides dtype and device.
        """
        model = cls.__new__(cls)
        LanguageModel.__init__(model, config, kit)
        attach_weight_loaders(model)
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | Any, kit: Kit | None = None) -> Self:
        """Build a model with random weights from a Hugging Face config.

        Args:
            config: values of a `config.json`, or a config object of `transformers`.
            kit: builds the modules; by default plain torch modules on the CPU in torch's default dtype.

        Raises:
            ConfigError: a value of the config is wrong or not supported.
        """
        values = config if isinstance(config, Mapping) else config.to_dict()
        model = cls.allocate(cls.read_config(HFConfig(values)), kit or LocalKit(torch.get_default_dtype()))
        initialize(model)
        return model

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        hf_overrides: Mapping[str, Any] | None = None,
    ) -> Self:
        """Load the model of a checkpoint; see `lamella.checkpoint.pretrained.load_pretrained`.

        Args:
            path: a folder or a Hub id, in any supported format.
            dtype: dtype of weights and activations; "auto" is the checkpoint's.
            device: device of the weights.
            hf_overrides: values that replace the config file's, see `EngineOptions.hf_overrides`.

        Raises:
            CheckpointError: a tensor is missing, unexpected or has the wrong shape, or the model has another class.
        """
        model: Self = resolve_name(_LOADER)(cls, path, dtype, device, hf_overrides)
        return model


def model_class(architecture: Architecture) -> type[CausalLM]:
    """Return the model class of an architecture; build one from the description if no class names it."""
    if architecture not in _classes:
        contents = {"__module__": architecture.read_config.__module__}
        new_class(architecture.name, (CausalLM,), {"description": architecture}, lambda names: names.update(contents))
    return _classes[architecture]
