"""Tiny random checkpoints and an oracle: what many tests start from."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lamella.checkpoint.names import targets
from lamella.models import resolve_architecture

VOCAB = 128


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Weights large enough that every part matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "canon" in name:
            parameter.uniform_(-0.5, 0.5, generator=generator)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.15, generator=generator)


def save_lamella(model: nn.Module, config: dict[str, Any], folder: Path) -> Path:
    """Write one of our models in its Hugging Face layout."""
    tensors = {
        name: target.parameter[target.start : target.stop].detach().clone()
        for name, target in targets(model, type(model).checkpoint_names).items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def canon_config(**changes: Any) -> dict[str, Any]:
    """A tiny LlamaCanon with everything that a test may change."""
    return {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "canon_set": "ABCD",
    } | changes


def canon_checkpoint(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random tiny LlamaCanon on disk."""
    config = canon_config(**changes)
    model = resolve_architecture("LlamaCanonForCausalLM").from_config(config)
    randomize(model, seed)
    return save_lamella(model, config, folder)


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    return [{"prompt_token_ids": [rng.randrange(VOCAB) for _ in range(n)]} for n in lengths]


@torch.no_grad()
def greedy(logits_of: Callable[[Tensor], Tensor], prompt: Sequence[int], count: int) -> list[int]:
    """`count` greedy tokens, each from one full forward: `logits_of` ids (1, S) gives (1, S, V)."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_of(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]
