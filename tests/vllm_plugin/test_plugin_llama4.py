"""Llama 4 in vLLM: tokens are those of one full float64 forward, across the ends of chunks and the steps of the
temperature, however a step is cut and whoever stands in the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4TextConfig

from helpers import VOCAB, hf_checkpoint
from lamella.errors import CheckpointError
from vllm_plugin.plugin_helpers import (
    ENVIRONMENT,
    MAX_LEN,
    NGRAM,
    ON_CPU,
    assert_right,
    generate,
    metric,
    oracle,
    prompts_of,
    running,
)
from vllm_plugin.test_plugin_contract import configured, refused
from vllm_plugin.test_plugin_parallel import TRACED

pytest.importorskip("vllm", reason="vLLM is not installed")

CHUNK = 32  # which is a block of vLLM's on CPUs, too
# Around the first chunk's end, and over many.
LENGTHS = (1, 5, 31, 32, 33, 64, 70, 170)
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "attention_chunk_size": CHUNK,
    "floor_scale": 24,
    "attn_scale": 0.3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SCOUT_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "scout": {"rope_parameters": SCOUT_ROPE},
    "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_local_experts": 8},
    "top 2, tied": {"num_experts_per_tok": 2, "tie_word_embeddings": True},
    "dense": {"moe_layers": [], "attention_bias": True},
    "explicit lists": {
        "no_rope_layers": [0, 1, 1, 0],
        "moe_layers": [0, 3],
        "layer_types": ["full_attention", "chunked_attention", "full_attention", "chunked_attention"],
    },
    "temperature off": {"attn_temperature_tuning": False},
    "chunk beyond the text": {"attention_chunk_size": 4096},
}
NAME = "LamellaLlama4ForCausalLM"
OURS = {"architectures": [NAME]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, changes in CASES.items():
        found[name] = tmp_path_factory.mktemp("llama4")
        hf_checkpoint(found[name], Llama4TextConfig(**SHAPE | changes))
    return found


def serving(folder: Path, **options: Any) -> Any:
    return running(folder, **({"hf_overrides": OURS} | options))


@pytest.mark.parametrize("name", CASES)
def test_chunks_and_batches(folders: dict[str, Path], name: str) -> None:
    """Prompts in pieces of a few tokens, which end anywhere in a chunk, beside others' decodes."""
    folder = folders[name]
    with serving(folder, max_num_batched_tokens=24, enable_prefix_caching=False) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 24))
        assert_right(oracle(folder), generate(llm, prompts_of(1, 1, 33), 6))
        (kind,) = set(llm.apply_model(lambda model: type(model).__qualname__))
    assert kind == NAME


def test_prompts_of_several_chunks_in_a_step(folders: dict[str, Path]) -> None:
    with serving(folders["scout"], max_num_batched_tokens=512) as llm:
        assert_right(oracle(folders["scout"]), generate(llm, prompts_of(*LENGTHS), 40))


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_compiled(folders: dict[str, Path], name: str) -> None:
    """Experts are one operation to the compiler, the rotation in the chunk and the temperature are traced."""
    with serving(folders[name], enforce_eager=False, max_num_batched_tokens=64) as llm:
        assert_right(oracle(folders[name]), generate(llm, prompts_of(*LENGTHS), 24))


@pytest.mark.parametrize("prompt", [96, 97, 110])
def test_prefix_hits(folders: dict[str, Path], prompt: int) -> None:
    """Of a prefix that ends with a chunk, or within one."""
    folder = folders["scout"]
    with serving(folder, enable_prefix_caching=True) as llm:
        shared = prompts_of(prompt)[0]
        for ids in (shared, [*shared, 5, 6], [*shared[:70], 9, 9, 9], [*shared, *prompts_of(60, seed=1)[0]]):
            assert_right(oracle(folder), generate(llm, [ids], 8))
        assert metric(llm, "prefix_cache_hits") > 0


def test_preemption(folders: dict[str, Path]) -> None:
    folder = folders["scout"]
    with serving(folder, num_gpu_blocks_override=24, enable_prefix_caching=False) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(60, 50, 70, 40, 65, 55), 60))
        assert metric(llm, "num_preemptions") > 0


def test_drafts(folders: dict[str, Path]) -> None:
    folder = folders["maverick"]
    repeated = [[5, 6, 7, 8] * 16, *prompts_of(33, 70)]
    with serving(folder, speculative_config=NGRAM) as llm:
        assert_right(oracle(folder), generate(llm, repeated, 40))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0
