"""`from_pretrained` of the model classes: a checkpoint as a plain module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lamella.checkpoint.files import open_checkpoint
from lamella.checkpoint.loader import load_model
from lamella.errors import CheckpointError
from lamella.models.base import CausalLM

Model = TypeVar("Model", bound=CausalLM)


def load_pretrained(
    model_class: type[Model],
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    hf_overrides: Mapping[str, Any] | None = None,
) -> Model:
    """Load the model of a checkpoint, with the arguments of `CausalLM.from_pretrained`.

    Args:
        model_class: the class that the model must have; `CausalLM` for any.
        path: a folder or a Hub id, whatever its format.
        dtype: to compute in; "auto" is the checkpoint's own.
        device: where the weights go.
        hf_overrides: values that replace the config file's.

    Raises:
        CheckpointError: a tensor is missing, left over or of the wrong shape, or the model is of another class.
    """
    checkpoint = open_checkpoint(path, hf_overrides)
    model = load_model(checkpoint, dtype=dtype, device=device)
    if not isinstance(model, model_class):
        raise CheckpointError(f"{checkpoint.path}: holds a {type(model).__name__}, not a {model_class.__name__}")
    return model
