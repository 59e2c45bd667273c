"""Llama 4 in vLLM: tokens are those of one full float64 forward, across the ends of chunks and the steps of the
temperature, however a step is cut and whatever else is in the batch."""

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
    configured,
    generate,
    metric,
    oracle,
    prompts_of,
    refused,
    running,
)
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
    "chunk of blocks": {"attention_chunk_size": 2 * CHUNK},
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
    """Prompts in small pieces that end anywhere in an attention chunk, with other requests' decodes."""
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
    """The compiler sees experts as one operation; rotation within the chunk and temperature are traced."""
    with serving(folders[name], enforce_eager=False, max_num_batched_tokens=64) as llm:
        assert_right(oracle(folders[name]), generate(llm, prompts_of(*LENGTHS), 24))


@pytest.mark.parametrize(("name", "prompt"), [("scout", 96), ("scout", 97), ("scout", 110), ("chunk of blocks", 110)])
def test_prefix_hits(folders: dict[str, Path], name: str, prompt: int) -> None:
    """Prefixes that end at or within an attention chunk; hits end at block boundaries."""
    folder = folders[name]
    with serving(folder, enable_prefix_caching=True) as llm:
        shared = prompts_of(prompt)[0]
        hits = []
        for ids in (shared, [*shared, 5, 6], [*shared[:70], 9, 9, 9], [*shared, *prompts_of(60, seed=1)[0]]):
            outputs = generate(llm, [ids], 8)
            assert_right(oracle(folder), outputs)
            hits.append(outputs[0].num_cached_tokens)
    assert hits[0] == 0 and all(hits[1:])


def test_preemption(folders: dict[str, Path]) -> None:
    folder = folders["scout"]
    tight = {"num_gpu_blocks_override": 20, "max_num_batched_tokens": 32, "enable_prefix_caching": False}
    with serving(folder, **tight) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(60, 50, 70, 40, 65, 55), 60))
        assert metric(llm, "num_preemptions") > 0


def test_drafts(folders: dict[str, Path]) -> None:
    folder = folders["maverick"]
    repeated = [[5, 6, 7, 8] * 16, *prompts_of(33, 70)]
    with serving(folder, speculative_config=NGRAM) as llm:
        assert_right(oracle(folder), generate(llm, repeated, 40))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 0


needs_two = pytest.mark.skipif(
    (os.cpu_count() or 1) < 2 if ON_CPU else torch.cuda.device_count() < 2, reason="needs two"
)


def assert_right_on_two(folder: Path, options: dict[str, Any]) -> None:
    separate = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_CI_ENV": "0"}
    said = json.dumps(options | {"max_num_batched_tokens": 64, "hf_overrides": OURS})
    result = subprocess.run(
        [sys.executable, "-m", "vllm_plugin.plugin_helpers", folder, said],
        env={**os.environ, **ENVIRONMENT, **separate, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "right", result.stdout + result.stderr


@needs_two
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("scout", {"tensor_parallel_size": 2}), ("maverick", {"pipeline_parallel_size": 2} | TRACED)],
    ids=["tensor", "pipeline"],
)
def test_two_ranks(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    assert_right_on_two(folders[name], options)


# Files, as there are: with images or without, experts in one tensor or one by one.


def one_by_one(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, -1), strict=True) if leaf != "down_proj" else ()
        for part, weights in parts or [(leaf, tensor)]:
            found |= {f"{parent}.{index}.{part}.weight": weight.T for index, weight in enumerate(weights)}
    return found


def write(folder: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def original(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def reading_images(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the image model to which this language model belongs."""
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": {key: value for key, value in values.items() if key != "architectures"},
        "vision_config": {"hidden_size": 8},
        "image_token_index": 92,
    }


@pytest.mark.parametrize("name", [NAME, "LamellaLlama4ForConditionalGeneration"])
def test_the_language_model_of_a_checkpoint_with_images(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    tensors, values = original(folders["explicit lists"])
    images = {"vision_model.class_embedding": torch.zeros(3), "multi_modal_projector.linear_1.weight": torch.zeros(2)}
    named = {f"language_model.{name}": tensor for name, tensor in one_by_one(tensors).items()}
    write(tmp_path, named | images, reading_images(values))
    with running(tmp_path, hf_overrides={"architectures": [name]}) as llm:
        assert_right(oracle(folders["explicit lists"]), generate(llm, prompts_of(*LENGTHS), 12))


def test_experts_half_one_by_one(folders: dict[str, Path], tmp_path: Path) -> None:
    tensors, values = original(folders["maverick"])
    separate = one_by_one(tensors)
    parent, gone = "model.layers.1.feed_forward.experts", "5.up_proj.weight"
    some = {name: tensor for name, tensor in separate.items() if name != f"{parent}.{gone}"}
    with pytest.raises(CheckpointError, match=rf"missing: {parent}\.{gone}$"), serving(write(tmp_path, some, values)):
        pass
    twice = tensors | {f"{parent}.{gone}": separate[f"{parent}.{gone}"]}
    with (
        pytest.raises(CheckpointError, match=rf"unexpected: {parent}\.{gone}$"),
        serving(write(tmp_path, twice, values)),
    ):
        pass


def test_own_formats(folders: dict[str, Path]) -> None:
    """The file's layer_types differ from vLLM's."""
    folder = folders["explicit lists"]
    with serving(folder, config_format="lamella", load_format="lamella") as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 12))


# What vLLM is asked for.


def test_layers_see_what_the_config_says(folders: dict[str, Path]) -> None:
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec

    def specs(model: Any) -> list[Any]:
        layers = [layer.mixer.attention.attn for layer in model.model.layers]
        return [layer.get_kv_cache_spec(model.vllm_config) for layer in layers]

    with serving(folders["scout"]) as llm:
        (found,) = llm.apply_model(specs)
    assert [type(spec) for spec in found] == [ChunkedLocalAttentionSpec] * 3 + [FullAttentionSpec]
    assert {spec.attention_chunk_size for spec in found[:3]} == {CHUNK}
    # Where no request outgrows a chunk, layers see everything: one group, and whole graphs.
    with serving(folders["scout"], max_model_len=CHUNK) as llm:
        (found,) = llm.apply_model(specs)
        assert_right(oracle(folders["scout"]), generate(llm, prompts_of(1, 20), 8))
    assert {type(spec) for spec in found} == {FullAttentionSpec}


class TestChecks:
    def of(self, folder: Path, **options: Any) -> Any:
        return configured(folder, **({"hf_overrides": OURS, "max_model_len": MAX_LEN} | options))

    def test_blocks_end_where_chunks_do(self, folders: dict[str, Path]) -> None:
        made = self.of(folders["scout"])
        assert not made.model_config.is_hybrid
        assert not ON_CPU or made.cache_config.block_size == CHUNK
        assert not ON_CPU or self.of(folders["chunk beyond the text"]).cache_config.block_size == 128
        with refused(f"block_size=64: must divide the chunks of {CHUNK} tokens"):
            self.of(folders["scout"], block_size=64)

    @pytest.mark.skipif(not ON_CPU, reason="blocks of CPUs")
    def test_chunks_that_no_block_ends_with(self, folders: dict[str, Path]) -> None:
        overrides = {"hf_overrides": OURS | {"attention_chunk_size": 40}}
        with refused("layers see chunks of 40 tokens: on CPUs, vLLM's must be multiples of 32"):
            self.of(folders["scout"], **overrides)
