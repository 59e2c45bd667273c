"""Options that the plugin rejects or changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from helpers import VOCAB
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.registration import OPERATIONS, register_all
from vllm_plugin.plugin_helpers import (
    NGRAM,
    ON_CPU,
    SHAPE,
    assert_right,
    canon,
    configured,
    generate,
    oracle,
    prompts_of,
    refused,
    running,
)

register_all()


class TestChecks:
    def test_the_defaults_pass_the_checks(self, folder: Path) -> None:
        config = configured(folder)
        assert config.model_config.is_hybrid
        assert not ON_CPU or config.cache_config.block_size == 32

    def test_a_given_block_size_is_kept(self, folder: Path) -> None:
        assert configured(folder, block_size=64).cache_config.block_size == 64

    def test_another_state_dtype_is_rejected(self, folder: Path) -> None:
        configured(folder, mamba_cache_dtype="auto")
        with refused("mamba_cache_dtype='float32': state has the model's dtype"):
            configured(folder, dtype="bfloat16", mamba_cache_dtype="float32")

    def test_the_other_state_layout_is_rejected(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers.mamba import mamba_utils

        monkeypatch.setattr(mamba_utils, "is_conv_state_dim_first", lambda: True)
        with refused("VLLM_SSM_CONV_STATE_LAYOUT=DS"):
            configured(folder)

    @pytest.mark.skipif(compat.is_at_least(0, 32), reason="this vLLM has no such mode")
    def test_mamba_cache_mode_all_is_rejected(self, folder: Path) -> None:
        with refused("mamba_cache_mode='all'"):
            configured(folder, mamba_cache_mode="all")

    @pytest.mark.skipif(compat.has_sound_partial_hits(), reason="in this vLLM they are right, or absent")
    def test_unsound_partial_hits_are_rejected(self, folder: Path) -> None:
        with refused("prefix_match_unit=16: .*leave it out"):
            configured(folder, prefix_match_unit=16, enable_prefix_caching=True)

    @pytest.mark.skipif(not ON_CPU, reason="a fault of vLLM's on CPUs")
    def test_lora_on_cpus_is_rejected(self, folder: Path) -> None:
        with refused("enable_lora on CPU"):
            configured(folder, enable_lora=True)

    @pytest.mark.skipif(not ON_CPU, reason="a fault of vLLM's on CPUs")
    def test_eager_pipeline_stages_on_cpus_are_rejected(self, folder: Path) -> None:
        with refused("enforce_eager with pipeline_parallel_size > 1"):
            configured(folder, pipeline_parallel_size=2, enforce_eager=True)

    def test_drafts_of_a_model_are_rejected(self, folder: Path) -> None:
        drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
        with refused(r"speculative_config: method 'draft_model' .* there are ngram, "):
            configured(folder, speculative_config=drafts)

    def test_drafts_in_a_vllm_that_loses_accepted_counts_are_rejected(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compat, "has_sound_speculation", lambda: False)
        with refused(r"speculative_config: up to 0\.31"):
            configured(folder, speculative_config=NGRAM)

    @pytest.mark.skipif(not compat.has_sound_speculation(), reason="this vLLM's speculation is refused")
    def test_drafts_turn_prefix_caching_off_on_cpus(self, folder: Path, plugin_log: pytest.LogCaptureFixture) -> None:
        config = configured(folder, speculative_config=NGRAM)
        assert ("prefix caching is off" in plugin_log.text) == ON_CPU
        assert not ON_CPU or not config.cache_config.enable_prefix_caching

    @pytest.mark.parametrize(
        ("options", "whole"),
        [
            ({}, True),
            ({"enforce_eager": True}, True),  # without effect: nothing is compiled
            ({"compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}, False),
            ({"compilation_config": {"splitting_ops": [OPERATIONS[0]]}}, False),
            ({"optimization_level": 1}, False),
        ],
        ids=str,
    )
    @pytest.mark.skipif(ON_CPU, reason="graphs are CUDA's")
    def test_a_model_is_compiled_in_one_piece_by_default(
        self, folder: Path, options: dict[str, Any], whole: bool
    ) -> None:
        from vllm.config import CUDAGraphMode

        made = configured(folder, **options).compilation_config
        assert (made.splitting_ops == []) == whole
        if options == {}:
            assert made.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
        assert whole or OPERATIONS[0] in made.splitting_ops

    def test_options_of_a_model_without_slot_state_are_not_changed(self, tmp_path: Path) -> None:
        from transformers import LlamaConfig

        config = LlamaConfig(vocab_size=VOCAB, **SHAPE, max_position_embeddings=256)
        config.architectures = ["LamellaLlamaForCausalLM"]
        config.save_pretrained(tmp_path)
        made = configured(tmp_path, speculative_config=NGRAM)
        assert not made.model_config.is_hybrid
        assert not ON_CPU or made.cache_config.block_size == 128

    def test_a_canon_without_canons_has_no_state(self, tmp_path: Path) -> None:
        folder = canon(tmp_path, canon_set="")
        assert not configured(folder).model_config.is_hybrid
        with running(folder) as llm:
            assert_right(oracle(folder), generate(llm, prompts_of(1, 30)))
