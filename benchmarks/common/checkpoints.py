"""Config files and random checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from lamella.models import CausalLM


def write_config(folder: Path, values: Mapping[str, Any]) -> str:
    """Write `config.json` and return the folder as a model's name."""
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


def write_checkpoint(folder: Path, model: CausalLM, values: Mapping[str, Any], dtype: torch.dtype | None = None) -> str:
    """Write a model with its config and return the folder as a model's name.

    Args:
        folder: an existing folder.
        model: the model to write.
        values: values of `config.json`.
        dtype: dtype of the tensors; None for the dtypes of the parameters.
    """
    from safetensors.torch import save_file

    from lamella.checkpoint.names import targets

    named = targets(model, model.checkpoint_names).items()
    tensors = {name: target.place.detach().to(dtype or target.place.dtype) for name, target in named}
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return write_config(folder, values)


def enlarge_weights(model: CausalLM, dims: tuple[int, ...]) -> None:
    """Make random weights so large that every part matters to the output.

    Args:
        model: the model to change.
        dims: numbers of dimensions of the weights to enlarge.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() in dims and "A_log" not in name:
                parameter.mul_(3)
