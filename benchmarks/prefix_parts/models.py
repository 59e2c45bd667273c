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
MODELS = ("dense", "canon", "hybrid")


def model_config(model: str, **sizes: Any) -> dict[str, Any]:
    """Return the values of `config.json`.

    Args:
        model: of `MODELS`: "dense" is Qwen3, "canon" a Llama with canons A to D, and "hybrid" has three gated delta
            nets to one attention.
        sizes: in the place of those of `SHAPE`.
    """
    shape = {**SHAPE, **sizes}
    if model == "dense":
        return {**shape, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    if model == "canon":
        return {
            **shape,
            "architectures": ["LlamaCanonForCausalLM"],
            "model_type": "LlamaCanon",
            "canon_set": "ABCD",
            "qk_norm": True,
        }
    heads, groups, size = (shape[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    attention = {
        "type": "attention",
        "heads": heads,
        "head_groups": groups,
        "head_size": size,
        "rotary": {"type": "mistral_1d", "theta": shape["rope_theta"]},
    }
    delta_net = {
        "type": "gdn",
        "value_heads": heads,
        "key_heads": groups,
        "key_head_dim": size,
        "value_head_dim": size,
        "convolution_layer": {"kernel_size": 4},
    }
    mlp = {"type": "mlp", "intermediate_size": shape["intermediate_size"], "activation": "silu", "gated": True}
    norm = {"type": "rms_norm", "epsilon": shape["rms_norm_eps"]}
    blocks = {
        name: {"mixer": mixer, "mlp": mlp, "normalization": norm}
        for name, mixer in (("delta_net", delta_net), ("attention", attention))
    }
    depth = shape["num_hidden_layers"]
    return {
        **{name: shape[name] for name in ("vocab_size", "hidden_size", "max_position_embeddings", "torch_dtype")},
        "tie_word_embeddings": shape["tie_word_embeddings"],
        "architectures": ["Apriel2ForCausalLM"],
        "model_type": "apriel2",
        "decoder": {
            "type": "pattern",
            "num_blocks": depth,
            "pattern": ["attention" if index % 4 == 3 or index == depth - 1 else "delta_net" for index in range(depth)],
            "blocks": blocks,
        },
        "head": {"normalization": norm},
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
