"""Apriel2's config files: read, changed, refused."""

from __future__ import annotations

import logging
from collections.abc import Collection
from copy import deepcopy
from typing import Any

import pytest

from apriel2_models import ATTENTION, fixed
from lamella.checkpoint.names import targets
from lamella.config import LayerConfig, MLPConfig, ModelConfig
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError
from lamella.layers.local_kit import LocalKit
from lamella.models import Apriel2ForCausalLM

FILE = "folder/config.json"
BLOCKS = "model.decoder.blocks"
BIAS = {"bias": {"enabled": True}}
NO_BIAS = {"bias": {"enabled": False}}
LAYERS = {"q": "query_layer", "k": "key_layer", "v": "value_layer", "o": "dense_layer"}
DROP = object()


def read(values: dict[str, Any], tensors: Collection[str] | None = None) -> ModelConfig:
    """Return the model of a config file, beside a checkpoint with these tensors or beside none."""
    return Apriel2ForCausalLM.read_config(HFConfig(values, FILE, list_tensors=lambda: tensors))


def tensors_of(values: dict[str, Any]) -> set[str]:
    """Return the names of the tensors that a checkpoint of this config has."""
    model = Apriel2ForCausalLM.allocate(read(values), LocalKit(device="meta"))
    return set(targets(model, Apriel2ForCausalLM.checkpoint_names))


def first(values: dict[str, Any], tensors: Collection[str] | None = None) -> LayerConfig:
    """Return the first layer."""
    return read(values, tensors).layers[0]


def mixer(values: dict[str, Any], tensors: Collection[str] | None = None) -> Any:
    """Return the first layer's mixer in a model of such layers."""
    return first(fixed(values), tensors).mixer


def mlp(tensors: Collection[str] | None = None, **changes: Any) -> MLPConfig:
    """Return the first layer's feed-forward."""
    return first(with_mlp(**changes), tensors).feed_forward


def with_mlp(**changes: Any) -> dict[str, Any]:
    """Return a config file with changes of the feed-forward."""
    return fixed(ATTENTION, mlp={"type": "mlp", "intermediate_size": 48} | changes)


def changed(values: dict[str, Any], path: Collection[str], **changes: Any) -> dict[str, Any]:
    """Return a copy with some keys of a nested mapping set or (DROP) removed. The mapping is created if missing."""
    new = deepcopy(values)
    inner = new
    for key in path:
        inner = inner.setdefault(key, {})
    inner |= changes
    for key in [key for key, value in inner.items() if value is DROP]:
        del inner[key]
    return new


def refused(values: dict[str, Any], *said: str, tensors: Collection[str] | None = None) -> str:
    """Check that a config file is an error of one line that says these words, and return the message."""
    with pytest.raises(ConfigError) as caught:
        read(values, tensors)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    return message


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the logged messages, which must be warnings."""
    assert all(record.levelno == logging.WARNING and record.name == "lamella" for record in caplog.records)
    return [record.getMessage() for record in caplog.records]
