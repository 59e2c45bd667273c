"""Tiny random Apriel2 checkpoints: each mixer alone, hybrids, and supernets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers import VOCAB, randomize, save_lamella
from lamella.models import Apriel2ForCausalLM

ATTENTION: dict[str, Any] = {
    "type": "attention",
    "heads": 4,
    "head_groups": 2,
    "head_size": 16,
    "rotary": {"type": "mistral_1d", "theta": 10000.0},
}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": ATTENTION,
    "sliding_window": {**ATTENTION, "window_size": 6},
    "gdn": {
        "type": "gdn",
        "value_heads": 4,
        "key_heads": 2,
        "key_head_dim": 8,
        "value_head_dim": 16,
        "convolution_layer": {"kernel_size": 4},
    },
    "kda": {"type": "kda", "heads": 2, "head_dim": 16, "convolution_layer": {"kernel_size": 4}},
    "mamba": {
        "type": "mamba",
        "state_size": 8,
        "d_inner": 64,
        "d_xb": 32,
        "dt_rank": 4,
        "d_conv": 4,
        "conv_bias": True,
        "dt_proj_bias": True,
    },
}
SUPERNET = {"type": "stochastic", "main_mixer_name": "attention", "mixers": MIXERS}


def block(mixer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "mixer": mixer,
        "mlp": {"type": "mlp", "intermediate_size": 48, "activation": "silu", "gated": True},
        "normalization": {"type": "rms_norm", "epsilon": 1e-5},
    } | changes


def fixed(mixer: dict[str, Any], layers: int = 2, **changes: Any) -> dict[str, Any]:
    """The config of a model whose layers have the same block; `changes` are of the block."""
    return config({"type": "fixed", "num_blocks": layers, "block": block(mixer, **changes)})


def pattern(names: list[str], mixers: dict[str, dict[str, Any]] = MIXERS, layers: int | None = None) -> dict[str, Any]:
    """The config of a model whose layers have these mixers, by name."""
    blocks = {name: block(mixers[name]) for name in names}
    return config({"type": "pattern", "num_blocks": layers or len(names), "pattern": names, "blocks": blocks})


def config(decoder: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["Apriel2ForCausalLM"],
        "model_type": "apriel2_text",
        "hidden_size": 32,
        "vocab_size": VOCAB,
        "decoder": decoder,
        "embeddings": {"max_position_embeddings": 512},
        "head": {"normalization": {"type": "rms_norm", "epsilon": 1e-5}},
    } | changes


def checkpoint(folder: Path, values: dict[str, Any], seed: int = 0) -> Path:
    """A random model of this config on disk."""
    model = Apriel2ForCausalLM.from_config(values)
    randomize(model, seed)
    return save_lamella(model, values, folder)
