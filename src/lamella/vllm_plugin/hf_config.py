"""Config objects in the form that vLLM reads, of model types that transformers does not know."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lamella.config import ModelConfig
from lamella.models.hf_config import HFConfig
from lamella.models.registry import model_types, resolve_architecture
from lamella.vllm_plugin import PREFIX

# By this, and this alone, vLLM is told in all its versions that no layer of a model keeps slot state.
_STATELESS = "attention"


class LamellaConfig(PretrainedConfig):
    """A config.json as it stands, with the sizes that vLLM asks any model for.

    What it means is read from it by the architecture's own reader, see `read_model_config`.
    """

    architecture: ClassVar[str]  # of a checkpoint that does not say one

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        if not values:
            return  # transformers asks each class for its defaults
        self.architectures = self.architectures or [self.architecture]
        config = read_model_config(self, self.architectures[0])
        attention = next(layer.mixer for layer in config.layers)
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_hidden_layers, self.max_position_embeddings = len(config.layers), config.max_position_embeddings
        self.num_attention_heads, self.num_key_value_heads = attention.num_heads, attention.num_kv_heads
        self.head_dim = attention.head_dim
        if not any(layer.canons for layer in config.layers):
            self.layer_types = [_STATELESS] * len(config.layers)


def read_model_config(hf_config: PretrainedConfig, architecture: str, max_length: int | None = None) -> ModelConfig:
    """The layers of a config object, ours or transformers', by the reader of `architecture` (prefixed or not).

    Raises `ConfigError`, which names the key.
    """
    values = hf_config.to_dict()
    if set(values.get("layer_types") or ()) == {_STATELESS}:
        del values["layer_types"]
    # How it is quantised concerns the projections, which are vLLM's.
    values.pop("quantization_config", None)
    cls = resolve_architecture(architecture.removeprefix(PREFIX))
    return cls.read_config(HFConfig(values, getattr(hf_config, "name_or_path", "") or "config.json", max_length))


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
