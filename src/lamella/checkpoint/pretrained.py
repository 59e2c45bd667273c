"""Implementation of the model classes' `from_pretrained`."""

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
    """Load the model of a checkpoint. See `CausalLM.from_pretrained`.

    Args:
        model_class: class that the model must have; `CausalLM` for any.
        path: folder, GGUF file or Hub id.
        dtype: to compute in; "auto" is the dtype of the checkpoint.
        device: of the parameters.
        hf_overrides: values that replace those of the config file.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of the wrong shape, or the model is of another class.
    """
    checkpoint = open_checkpoint(path, hf_overrides)
    model = load_model(checkpoint, dtype=dtype, device=device)
    if not isinstance(model, model_class):
        raise CheckpointError(f"{checkpoint.path}: holds a {type(model).__name__}, not a {model_class.__name__}")
    return model
