"""Recurrent mixers and supernets in vLLM: tokens are those of one full float64 forward.

However a step is divided, whatever else is in the batch, and whatever placement came before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, fixed, pattern
from lamella.parity import compare
from vllm_plugin.plugin_helpers import (
    ENVIRONMENT,
    LENGTHS,
    NGRAM,
    ON_CPU,
    ROOM,
    assert_right,
    generate,
    metric,
    oracle,
    prompts_of,
    running,
    scheduler_of,
    tokens_of,
)
from vllm_plugin.test_plugin_parallel import TRACED

pytest.importorskip("vllm", reason="vLLM is not installed")

# vLLM's attention has heads of 32 channels at least on CPUs.
WIDE = {name: {**mixer, "head_size": 32} if mixer["type"] == "attention" else mixer for name, mixer in MIXERS.items()}
SOME = {name: WIDE[name] for name in ("attention", "sliding_window", "gdn", "kda", "mamba")}
A, B, C = "all-gdn", "mamba,attention,kda", "swa,attention,sliding_window"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    biased = {**WIDE["attention"], "query_layer": {"bias": {"enabled": True}}}
    models = {
        "gdn": pattern(["gdn", "attention"], WIDE),
        "kda": pattern(["attention", "kda"], WIDE),
        "mamba": pattern(["mamba", "attention"], WIDE),
        "all": pattern(["attention", "gdn", "kda", "mamba", "sliding_window"], WIDE),
        "query bias": pattern(["biased", "gdn"], {**WIDE, "biased": biased}),
        "supernet": fixed({**SUPERNET, "mixers": SOME}, layers=3),
    }
    return {name: checkpoint(tmp_path_factory.mktemp("apriel2"), values) for name, values in models.items()}


@pytest.mark.parametrize("name", ["gdn", "kda", "mamba", "all", "query bias"])
def test_chunks_batches_and_reuse(folders: dict[str, Path], name: str) -> None:
    """Prompts in small chunks with other requests' decodes, then one-token prompts in recycled blocks."""
    folder = folders[name]
    with running(folder, max_num_batched_tokens=16, enable_prefix_caching=False) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 12))
        assert_right(oracle(folder), generate(llm, prompts_of(1, 1, 2), 6))


@pytest.mark.parametrize("name", ["all", "supernet"])
def test_prefix_hits(folders: dict[str, Path], name: str) -> None:
    """A state copied at the end of a block equals the state that a request would have computed."""
    folder = folders[name]
    placement = A if name == "supernet" else None
    with running(folder, enable_prefix_caching=True) as llm:
        if placement:
            from lamella.vllm_plugin.placement import set_placement

            set_placement(llm, placement)
        shared = prompts_of(150)[0]
        prompts = [shared, [*shared, 5, 6], [*shared[:130], 9, 9, 9], shared]
        hits = []
        for prompt in prompts:
            outputs = generate(llm, [prompt], 8)
            assert_right(oracle(folder, placement), outputs)
            hits.append(outputs[0].num_cached_tokens)
    assert hits[0] == 0 and any(hits)


def test_preemption(folders: dict[str, Path]) -> None:
    folder = folders["all"]
    with running(folder, num_gpu_blocks_override=24, enable_prefix_caching=False) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(60, 50, 70, 40, 65, 55), 60))
        assert metric(llm, "num_preemptions") > 0


@pytest.mark.parametrize("name", ["all", "supernet"])
def test_compiled(folders: dict[str, Path], name: str) -> None:
    folder = folders[name]
    with running(folder, enforce_eager=False, max_num_batched_tokens=64) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 12))


@pytest.mark.parametrize("name", ["all", "gdn", "kda", "mamba", "sliding_window", "supernet"])
def test_bfloat16_is_as_exact_as_the_reference_in_bfloat16(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Check one mixer, all mixers, and a supernet under a placement."""
    folder = folders[name] if name in ("all", "supernet") else checkpoint(tmp_path, fixed(WIDE[name]))
    placement = B if name == "supernet" else None
    inputs = {"prompts": "random", "count": 6, "placement": placement}
    result = compare(folder, engine="vllm", dtype="bfloat16", engine_options=ROOM, **inputs)
    assert result.noise_floor_ratio <= 1.0


class TestSupernet:
    @pytest.fixture(scope="class", params=[True, False], ids=["prefix caching", ""])
    def engine(self, request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[Any]:
        with running(folders["supernet"], enable_prefix_caching=request.param) as llm:
            yield llm

    def test_published_calls(self, engine: Any, folders: dict[str, Path]) -> None:
        assert engine.collective_rpc("get_mixer_names") == [tuple(SOME)]
        assert engine.collective_rpc("get_layer_placements") == [dict.fromkeys(range(3), "attention")]
        engine.collective_rpc("clear_kv_cache")
        engine.reset_prefix_cache()
        names = ["gdn", "kda", "mamba"]
        if engine.llm_engine.vllm_config.cache_config.enable_prefix_caching:
            with pytest.raises(Exception, match="set_layer_placements: with prefix caching on"):
                engine.collective_rpc("set_layer_placements", args=(names,))
            return
        assert engine.collective_rpc("set_layer_placements", args=(names,)) == [dict(enumerate(names))]
        assert_right(oracle(folders["supernet"], "gdn,kda,mamba"), generate(engine, prompts_of(*LENGTHS), 8))

    def test_switching_placements_gives_the_tokens_of_each(self, engine: Any, folders: dict[str, Path]) -> None:
        """Run the same prompts under each placement repeatedly; no cache entry of another placement is used."""
        from lamella.vllm_plugin.placement import set_placement

        seen: dict[str, list[list[int]]] = {}
        for placement in (A, B, C, A, B):
            set_placement(engine, placement)
            for _ in range(2):
                outputs = generate(engine, prompts_of(*LENGTHS), 8)
                assert_right(oracle(folders["supernet"], placement), outputs)
                assert seen.setdefault(placement, tokens_of(outputs)) == tokens_of(outputs)
        assert len({str(tokens) for tokens in seen.values()}) == 3

    def test_a_switch_with_running_requests(self, engine: Any, folders: dict[str, Path]) -> None:
        """Tokens after the switch are those of the new placement over the whole prefix."""
        from vllm import SamplingParams

        from lamella.vllm_plugin.placement import set_placement

        set_placement(engine, A)
        prompt, core = prompts_of(70)[0], engine.llm_engine
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        core.add_request("1000", {"prompt_token_ids": prompt}, params)
        tokens: list[int] = []
        while core.has_unfinished_requests():
            before = len(tokens)
            for output in core.step():
                tokens = list(output.outputs[0].token_ids)
            if before < 8 <= len(tokens):
                set_placement(engine, B)
        assert len(tokens) == 24
        ids = [*prompt, *tokens]
        chosen = {name: oracle(folders["supernet"], name)(ids).argmax(-1).tolist() for name in (A, B)}
        start = len(prompt) - 1
        right = {name: [a == b for a, b in zip(chosen[name][start:-1], tokens, strict=True)] for name in chosen}
        count = next(index for index, same in enumerate(right[A]) if not same)
        assert count >= 8 and all(right[A][:count]) and all(right[B][count:])

    def test_a_bad_placement_changes_nothing(self, engine: Any) -> None:
        from lamella.vllm_plugin.placement import set_placement

        before = engine.collective_rpc("get_layer_placements")
        with pytest.raises(Exception, match="layer 0 has no mixer 'rwkv'"):
            set_placement(engine, "all-rwkv")
        assert engine.collective_rpc("get_layer_placements") == before
        assert tokens_of(generate(engine, prompts_of(3), 2))

    def test_state_is_one_group_as_wide_as_the_widest_mixers(self, engine: Any) -> None:
        kda, gdn = 4 * 2 * 16 * 16 + 4 * 3 * 96, 4 * 4 * 8 * 16 + 4 * 3 * 96
        mamba = 4 * 8 * 8 * 8 + 4 * 3 * 64
        groups = scheduler_of(engine).kv_cache_config.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups if any("state" in name for name in group.layer_names)]
        assert len(specs) == 1 and specs[0].shapes == ((max(kda, gdn, mamba),),)


def test_a_fixed_placement_has_no_other_mixers(folders: dict[str, Path]) -> None:
    """`hf_overrides` fixes the placement: only its state and cache groups exist."""
    folder = folders["supernet"]
    for placement in (B, "all-attention"):
        with running(folder, hf_overrides={"placement": placement}) as llm:
            assert_right(oracle(folder, placement), generate(llm, prompts_of(*LENGTHS), 12))
            (names,) = llm.apply_model(lambda model: [name for name, _ in model.named_parameters()])
            assert not any("sliding_window" in name for name in names)
            groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
            kept = {name for group in groups for name in group.layer_names}
            states = set() if placement == "all-attention" else {"model.layers.0.state", "model.layers.2.state"}
            assert {name for name in kept if name.endswith("state")} == states
            assert len(kept) == 3


@pytest.mark.parametrize("asked", [None, "FULL", "FULL_AND_PIECEWISE", "PIECEWISE", "NONE"])
def test_a_supernet_has_no_whole_graphs(folders: dict[str, Path], asked: str | None) -> None:
    """Whatever is asked for, or left to vLLM: a whole graph would hold the mixer of its capture. A model without a
    choice may have them."""
    from types import SimpleNamespace

    from transformers import AutoConfig
    from vllm.config import CUDAGraphMode

    from lamella.vllm_plugin import register
    from lamella.vllm_plugin.checks import Checks

    register()
    mode = None if asked is None else CUDAGraphMode[asked]
    for name, expected in (
        ("supernet", CUDAGraphMode.NONE if asked == "NONE" else CUDAGraphMode.PIECEWISE),
        ("gdn", mode),
    ):
        hf_config = AutoConfig.from_pretrained(folders[name])
        config = SimpleNamespace(
            model_config=SimpleNamespace(
                hf_config=hf_config,
                architecture="Apriel2ForCausalLM",
                enforce_eager=False,
                is_hybrid=False,
                max_model_len=64,
            ),
            cache_config=SimpleNamespace(user_specified_block_size=True, block_size=16),
            lora_config=None,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1, worker_extension_cls=""),
            compilation_config=SimpleNamespace(cudagraph_mode=mode),
        )
        Checks.verify_and_update_config(config)
        assert config.compilation_config.cudagraph_mode == expected
        assert bool(config.parallel_config.worker_extension_cls) == (name == "supernet")


def test_drafts_are_refused(folders: dict[str, Path]) -> None:
    with (
        pytest.raises(Exception, match="recurrent state cannot be rolled back after a rejected draft"),
        running(folders["all"], speculative_config=NGRAM),
    ):
        pass


@pytest.mark.skipif((os.cpu_count() or 1) < 2 or not ON_CPU, reason="needs two cores, and gloo")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"tensor_parallel_size": 2}, id="tensor"),
        pytest.param({"pipeline_parallel_size": 2} | TRACED, id="pipeline", marks=pytest.mark.slow),
    ],
)
def test_two_ranks(tmp_path: Path, options: dict[str, Any]) -> None:
    """Every mixer, sharded by heads or by layers; all ranks switch."""
    folder = checkpoint(tmp_path / "model", fixed({**SUPERNET, "mixers": SOME}, layers=4))
    separate = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_CI_ENV": "0"}
    placements = ["gdn,kda,mamba,swa", "all-attention"]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_plugin.plugin_helpers",
            folder,
            json.dumps(options | {"max_num_batched_tokens": 64}),
            *placements,
        ],
        env={**os.environ, **ENVIRONMENT, **separate, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "right", result.stdout + result.stderr


def test_no_attention_at_all(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, fixed(WIDE["gdn"]))
    with running(folder, max_num_batched_tokens=64) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 12))


def test_attention_only(tmp_path: Path) -> None:
    """Such a model has no slot state."""
    folder = checkpoint(tmp_path, fixed({**ATTENTION, "head_size": 32}))
    with running(folder) as llm:
        assert_right(oracle(folder), generate(llm, prompts_of(*LENGTHS), 12))
