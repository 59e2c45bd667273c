"""Config classes that vLLM reads, for model types that `transformers` does not support."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lamella.checkpoint.tensors import SafetensorsFolder
from lamella.config import AttentionConfig, ModelConfig, PlacementLike, read_placement
from lamella.config.config_keys import IgnoredKeys
from lamella.config.hf_config import HFConfig
from lamella.config.placement import every_mixer, restricted
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.state_modules import find_state_modules
from lamella.models.registry import find_architecture, model_types
from lamella.state.memory import StateCost
from lamella.vllm_plugin import PREFIX

# The value of `layer_types` that tells all versions of vLLM that no layer keeps slot state.
_STATELESS = "attention"

# Attributes that vLLM reads from every config.
_SIZES = frozenset(
    """
    head_dim hidden_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads vocab_size
    """.split()
)


class LamellaConfig(PretrainedConfig):
    """Values of a config.json, with the sizes that vLLM reads from every config.

    The architecture's own reader interprets the values, see `read_model_config`.

    Attributes:
        architecture: architecture of checkpoints that do not name one.
    """

    architecture: ClassVar[str]
    _placement: PlacementLike | None = None

    @property
    def placement(self) -> PlacementLike | None:
        """Placement to which a supernet is reduced (`hf_overrides={"placement": ...}`); None to keep all mixers."""
        return self._placement

    @placement.setter
    def placement(self, placement: PlacementLike | None) -> None:
        self._placement = placement
        self._describe()

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if not values:
            return  # transformers constructs each class without values to get its defaults
        self.architectures = self.architectures or [self.architecture]
        self._given = sorted(values)
        self._describe()

    def _describe(self) -> None:
        """Set the attributes that vLLM reads from every config."""
        if not self.architectures:
            return
        config = read_model_config(self, self.architectures[0])
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers, self.max_position_embeddings = len(config.layers), config.max_position_embeddings
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = _heads(config)
        stateless = [_STATELESS] * len(config.layers)
        if not find_architecture(self.architectures[0].removeprefix(PREFIX)).has_slot_state:
            return  # vLLM recognizes stateless models by their class
        if not _has_slot_state(config):
            self.layer_types = stateless
        elif getattr(self, "layer_types", None) == stateless:
            del self.layer_types

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LamellaConfig:
        """Return the config itself; a section of the file named `decoder` is not a text config."""
        return self


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    """Return query heads, key/value heads and head size for vLLM.

    They are those of the first attention layer. A model without attention gets numbers that are divisible by the same
    tensor-parallel sizes as its own heads.
    """
    mixers = [mixer for layer in config.layers for mixer in every_mixer(layer.mixer)]
    first = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    if first is not None:
        return first.num_heads, first.num_kv_heads, first.head_dim
    counts = ("num_heads", "value_heads", "heads")
    heads = next((getattr(mixers[0], name) for name in counts if hasattr(mixers[0], name)), 1)
    return heads, heads, max(1, config.hidden_size // heads)


@cache
def _has_slot_state(config: ModelConfig) -> bool:
    """Return True if any layer has slot state."""
    return bool(StateCost.from_modules(find_state_modules(LanguageModel(config, LocalKit(device="meta")))).slots)


def read_model_config(
    hf_config: PretrainedConfig, architecture: str, max_length: int | None = None, whole: bool = False
) -> ModelConfig:
    """Read the layers of a model from a config object, with the reader of its architecture.

    Args:
        hf_config: `LamellaConfig` or a config of `transformers`.
        architecture: name with or without the prefix.
        max_length: length for which a `dynamic` RoPE scaling is computed; None for the config's.
        whole: whether to keep all mixers of a supernet, even if the values contain a `placement`.

    Raises:
        ConfigError: a value is wrong or not supported; the message names the key.
    """
    values = hf_config.to_dict()
    if set(values.get("layer_types") or ()) == {_STATELESS}:
        del values["layer_types"]
    if "_given" in values:  # drop attributes that `_describe` added
        values = {key: value for key, value in values.items() if key in values["_given"] or key not in _SIZES}
    # vLLM's projections handle the quantization.
    values.pop("quantization_config", None)
    placement = values.pop("_placement", None)
    description, path = find_architecture(architecture.removeprefix(PREFIX)), getattr(hf_config, "name_or_path", "")
    source = path or "config.json"
    reader = HFConfig(values, source, max_length, lambda: _tensor_names(path), _ignored_keys(source))
    config = description.read_config(reader)
    return config if placement is None or whole else restricted(config, read_placement(placement, config))


@cache
def _ignored_keys(source: str) -> IgnoredKeys:
    """Return the record of ignored keys of a file, shared by repeated reads so that each key is logged once."""
    return IgnoredKeys()


@cache
def _tensor_names(path: str) -> frozenset[str] | None:
    """Return the tensor names of the checkpoint in a folder; None if there is no such folder or checkpoint."""
    if not path or not Path(path).is_dir():
        return None
    with SafetensorsFolder(Path(path)).opened() as tensors:
        return frozenset(tensors.names()) or None


def register_config(model_type: str) -> None:
    """Register the config class of a `model_type`, unless `transformers` already has one."""
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, config_class(model_type), exist_ok=True)


@cache
def config_class(model_type: str) -> type[LamellaConfig]:
    """Return the config class of a `model_type`."""
    name = f"Config_{model_type}"
    contents: dict[str, Any] = {"model_type": model_type, "architecture": model_types()[model_type]}
    # transformers generates an `__init__` for a class without one in its own namespace.
    contents |= {"__init__": LamellaConfig.__init__, "__module__": __name__, "__qualname__": name}
    return type(name, (LamellaConfig,), contents)


def __getattr__(name: str) -> type[LamellaConfig]:
    """Return a config class by name; workers that unpickle a config object look it up here."""
    model_type = name.removeprefix("Config_")
    if model_type == name or model_type not in model_types():
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return config_class(model_type)
