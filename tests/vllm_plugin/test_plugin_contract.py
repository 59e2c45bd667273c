"""vLLM's requirements for a model with slot state: flags, blocks, groups, state of the runner."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from helpers import canon_config
from lamella.config.hf_config import HFConfig
from lamella.models.registry import architectures, resolve_architecture
from lamella.parallel.sharding import Partition
from lamella.parity.scorers.hf import why_unsupported
from lamella.parity.tested_model import ModelUnderTest
from lamella.vllm_plugin import PREFIX, compat
from lamella.vllm_plugin.model import model_class
from lamella.vllm_plugin.registration import OPERATIONS, register_all, served_names
from lamella.vllm_plugin.state.layer import StateLayer
from lamella.vllm_plugin.state.layout import StateLayout
from lamella.vllm_plugin.state.metadata_builder import StateMetadataBuilder
from vllm_plugin.plugin_helpers import DEVICE, NGRAM, ON_CPU, running, scheduler_of

register_all()


class TestClasses:
    @pytest.mark.parametrize("name", served_names())
    def test_flags(self, name: str) -> None:
        from vllm.model_executor.models import interfaces

        cls = model_class(name)
        stateful = resolve_architecture(name.removeprefix(PREFIX)).has_slot_state
        assert stateful == ("Canon" in name or "Apriel2" in name)
        assert interfaces.is_hybrid(cls) == interfaces.has_inner_state(cls) == stateful
        assert interfaces.supports_pp(cls) and interfaces.supports_lora(cls)
        # The flag of another contract, which vLLM's own short convolutions have.
        assert not getattr(cls, "supports_mamba_prefix_caching", False)

    @pytest.mark.parametrize("name", architectures())
    def test_both_names_are_registered(self, name: str) -> None:
        own = compat.module_of(name)
        assert own == "lamella.vllm_plugin.model" or own.startswith("vllm.")
        assert compat.module_of(f"{PREFIX}{name}") == "lamella.vllm_plugin.model"

    def test_graphs_are_split_at_the_operations(self) -> None:
        from vllm.config import CompilationConfig

        assert [CompilationConfig._attention_ops.count(name) for name in OPERATIONS] == [1] * len(OPERATIONS)

    def test_both_runners_pass_accepted_counts_to_the_builder(self) -> None:
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
        from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder

        wanted = ShortConvAttentionMetadataBuilder if compat.is_at_least(0, 29) else GDNAttentionMetadataBuilder
        assert issubclass(StateMetadataBuilder, wanted)

    def test_state_bytes_per_request_of_an_8b_model(self) -> None:
        """One state per layer fills its blocks; one per convolution would pad each to the widest."""
        sizes = {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
        }
        values = canon_config(**sizes)
        config = resolve_architecture("LlamaCanonForCausalLM").read_config(HFConfig(values))
        layout = StateLayout.from_model(config, Partition(), torch.bfloat16)
        assert layout is not None and layout.dtype == torch.bfloat16
        size = math.prod(layout.shape) * 2
        assert 32 * size == 8_257_536
        kv_block = 16 * 2 * 8 * 128 * 2  # of the fewest tokens that a block has

        def held(state_modules: int, most: int) -> int:
            return 32 * state_modules * math.ceil(most / kv_block) * kv_block

        assert held(1, size) == 8_388_608
        assert held(4, 3 * 2 * 14336 * 2) == 25_165_824


def test_a_registered_config_is_no_model_of_transformers(folder: Path) -> None:
    """The parity kit must then use its own reference."""
    assert "no language model for LlamaCanon" in why_unsupported(ModelUnderTest.open(folder))


@pytest.fixture(
    scope="class",
    params=[
        {},
        pytest.param(
            {"speculative_config": NGRAM, "enable_prefix_caching": False},
            marks=pytest.mark.skipif(not compat.has_sound_speculation(), reason="this vLLM's speculation is refused"),
        ),
    ],
    ids=["", "drafts"],
)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with running(folder, **request.param) as llm:
        yield llm


class TestEngine:
    def test_blocks_have_the_shape_that_was_announced(self, engine: Any) -> None:
        config = engine.llm_engine.vllm_config
        cls = model_class("LlamaCanonForCausalLM")
        ((rows, channels),) = cls.get_mamba_state_shape_from_config(config)
        assert rows == 3 + compat.num_speculative_tokens(config)
        assert channels == 64 + 8 * 32 + 64 + 2 * 96
        state_modules = state_layers(engine)
        assert len(state_modules) == 3
        for state_module in state_modules:
            assert state_module.get_state_shape() == ((rows, channels),)
            assert state_module.get_state_dtype() == cls.get_mamba_state_dtype_from_config(config) == (torch.float32,)
            assert state_module.kv_cache[0].shape[1:] == (rows, channels)
            assert state_module.kv_cache[0].shape[0] >= config.cache_config.num_gpu_blocks

    def test_state_is_copied_by_vllms_own_function(self, engine: Any) -> None:
        from vllm.model_executor.layers.mamba.mamba_utils import get_conv_copy_spec

        (functions,) = engine.apply_model(lambda model: model.get_mamba_state_copy_func())
        assert functions == (get_conv_copy_spec,)
        (by_type,) = engine.apply_model(lambda model: model.get_mamba_state_copy_funcs({"a", "b"}))
        assert by_type == dict.fromkeys("ab", functions)

    def test_attention_and_state_are_a_group_each(self, engine: Any) -> None:
        groups = scheduler_of(engine).kv_cache_config.kv_cache_groups
        names = [sorted(group.layer_names) for group in groups]
        assert sorted(names) == [
            [f"model.layers.{index}.mixer.attention.attn" for index in range(3)],
            [f"model.layers.{index}.state" for index in range(3)],
        ]
        assert len({group.kv_cache_spec.page_size_bytes for group in groups}) == 1
        assert not ON_CPU or {group.kv_cache_spec.block_size for group in groups} <= {32, 256}


def state_layers(llm: Any) -> list[StateLayer]:
    (found,) = llm.apply_model(lambda model: [module for module in model.modules() if isinstance(module, StateLayer)])
    return found


replaces_state = pytest.mark.skipif(not compat.has_costly_runner_state(), reason="only 0.26's is known to cost much")


@replaces_state
def test_a_new_request_has_vllms_state_without_a_wait() -> None:
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    def after_a_request(kind: type[Any]) -> list[list[int]]:
        state = kind.__new__(kind)
        state.rope_state, state._align_mode, state.cache_config = None, True, SimpleNamespace(block_size=16)
        state.num_accepted_tokens_gpu, state._mamba_state_idx_gpu = (
            torch.full((4,), 7, dtype=torch.int32, device=DEVICE) for _ in range(2)
        )
        if kind is not MambaHybridModelState and not ON_CPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            state.add_request(2, SimpleNamespace(num_computed_tokens=40))
        finally:
            if not ON_CPU:
                torch.cuda.set_sync_debug_mode("default")
        return [state.num_accepted_tokens_gpu.tolist(), state._mamba_state_idx_gpu.tolist()]

    ours = runner_state("align")
    assert issubclass(ours, MambaHybridModelState)
    assert after_a_request(ours) == after_a_request(MambaHybridModelState) == [[7, 7, 1, 7], [7, 7, 2, 7]]


@replaces_state
def test_without_prefix_caching_a_runner_keeps_nothing() -> None:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    assert runner_state("none") is DefaultModelState


def runner_state(mode: str) -> type[Any]:
    """Return the class in which the newer runner keeps requests of a canon model."""
    cache = SimpleNamespace(mamba_cache_mode=mode)
    model = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache, speculative_config=None))
    return model_class("LlamaCanonForCausalLM").get_model_state_cls(model)


@pytest.mark.parametrize("name", ["LlamaCanonForCausalLM", f"{PREFIX}LlamaForCausalLM"])
def test_a_runners_state_is_replaced_only_in_costly_versions(name: str) -> None:
    replaced = compat.has_costly_runner_state() and name == "LlamaCanonForCausalLM"
    assert hasattr(model_class(name), "get_model_state_cls") == replaced
