"""Config objects in the form that vLLM reads, of model types that transformers does not know."""

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

# By this, and this alone, vLLM is told in all its versions that no layer of a model keeps slot state.
_STATELESS = "attention"

# What vLLM asks any config for.
_SIZES = frozenset(
    """
    head_dim hidden_size max_position_embeddings num_attention_heads num_hidden_layers num_key_value_heads vocab_size
    """.split()
)


class LamellaConfig(PretrainedConfig):
    """A config.json as it stands, with the sizes that vLLM asks any model for.

    What it means is read from it by the architecture's own reader, see `read_model_config`.
    """

    architecture: ClassVar[str]  # of a checkpoint that does not say one
    _placement: PlacementLike | None = None

    @property
    def placement(self) -> PlacementLike | None:
        """Of a supernet, the only mixers that there shall be (`hf_overrides={"placement": ...}`)."""
        return self._placement

    @placement.setter
    def placement(self, placement: PlacementLike | None) -> None:
        self._placement = placement
        self._describe()

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if not values:
            return  # transformers asks each class for its defaults
        self.architectures = self.architectures or [self.architecture]
        self._given = sorted(values)
        self._describe()

    def _describe(self) -> None:
        """Add what vLLM asks any config for."""
        if not self.architectures:
            return
        config = read_model_config(self, self.architectures[0])
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers, self.max_position_embeddings = len(config.layers), config.max_position_embeddings
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = _heads(config)
        stateless = [_STATELESS] * len(config.layers)
        if not find_architecture(self.architectures[0].removeprefix(PREFIX)).has_slot_state:
            return  # vLLM knows it by the class
        if not _keeps_slots(config):
            self.layer_types = stateless
        elif getattr(self, "layer_types", None) == stateless:
            del self.layer_types

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> LamellaConfig:
        """The config itself: a file's section called `decoder` is none."""
        return self


def _heads(config: ModelConfig) -> tuple[int, int, int]:
    """Query heads, key heads and their size: the first attention's, or of a model without any something that can be
    divided as its heads can.
    """
    mixers = [mixer for layer in config.layers for mixer in every_mixer(layer.mixer)]
    first = next((mixer for mixer in mixers if isinstance(mixer, AttentionConfig)), None)
    if first is not None:
        return first.num_heads, first.num_kv_heads, first.head_dim
    counts = ("num_heads", "value_heads", "heads")
    heads = next((getattr(mixers[0], name) for name in counts if hasattr(mixers[0], name)), 1)
    return heads, heads, max(1, config.hidden_size // heads)


@cache
def _keeps_slots(config: ModelConfig) -> bool:
    return bool(StateCost.from_modules(find_state_modules(LanguageModel(config, LocalKit(device="meta")))).slots)


def read_model_config(
    hf_config: PretrainedConfig, architecture: str, max_length: int | None = None, whole: bool = False
) -> ModelConfig:
    """The layers of a config object, ours or transformers', by the reader of `architecture` (prefixed or not).

    A `placement` among the values (`hf_overrides={"placement": ...}`) leaves a supernet no other choice, unless the
    `whole` of it is wanted.

    Raises `ConfigError`, which names the key.
    """
    values = hf_config.to_dict()
    if set(values.get("layer_types") or ()) == {_STATELESS}:
        del values["layer_types"]
    if "_given" in values:  # what is ours beside it, its reader does not know
        values = {key: value for key, value in values.items() if key in values["_given"] or key not in _SIZES}
    # How it is quantised concerns the projections, which are vLLM's.
    values.pop("quantization_config", None)
    placement = values.pop("_placement", None)
    description, path = find_architecture(architecture.removeprefix(PREFIX)), getattr(hf_config, "name_or_path", "")
    source = path or "config.json"
    reader = HFConfig(values, source, max_length, lambda: _tensor_names(path), _ignored_keys(source))
    config = description.read_config(reader)
    return config if placement is None or whole else restricted(config, read_placement(placement, config))


@cache
def _ignored_keys(source: str) -> IgnoredKeys:
    """Ignored keys of a file, shared by the many times that vLLM has it read."""
    return IgnoredKeys()


@cache
def _tensor_names(path: str) -> frozenset[str] | None:
    """Of the checkpoint in a folder; None where there is none to look at."""
    if not path or not Path(path).is_dir():
        return None
    with SafetensorsFolder(Path(path)).opened() as tensors:
        return frozenset(tensors.names()) or None


def register_config(model_type: str) -> None:
    """Have a config.json with this `model_type` read, unless transformers knows it."""
    if model_type not in CONFIG_MAPPING:
        AutoConfig.register(model_type, config_class(model_type), exist_ok=True)


@cache
def config_class(model_type: str) -> type[LamellaConfig]:
    """The class for files of this `model_type`."""
    name = f"Config_{model_type}"
    contents: dict[str, Any] = {"model_type": model_type, "architecture": model_types()[model_type]}
    # transformers writes an `__init__` for a class that has none of its own.
    contents |= {"__init__": LamellaConfig.__init__, "__module__": __name__, "__qualname__": name}
    return type(name, (LamellaConfig,), contents)


def __getattr__(name: str) -> type[LamellaConfig]:
    """Config classes by name, as a worker that unpickles a config object looks them up."""
    model_type = name.removeprefix("Config_")
    if model_type == name or model_type not in model_types():
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return config_class(model_type)
