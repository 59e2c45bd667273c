"""The models, and how their checkpoints are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.checkpoints import write_checkpoint

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "canon": {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "canon_set": "ABCD",
        "qk_norm": True,
    },
}


def make_checkpoint(folder: Path, config: dict[str, Any], matrix_std: float | None = None) -> None:
    """Write a checkpoint with random weights from a fixed seed.

    Args:
        folder: a folder that does not exist yet.
        config: values of `config.json`.
        matrix_std: standard deviation of the weights of every matrix; None for that of the model.
    """
    import torch

    from lamella import models

    cls = getattr(models, config["architectures"][0])
    dtype = getattr(torch, config["torch_dtype"])
    torch.manual_seed(0)
    model = cls.from_config(config)
    if matrix_std is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "canon" not in name:
                    parameter.normal_(0.0, matrix_std)
    folder.mkdir()
    write_checkpoint(folder, model, config, dtype)
