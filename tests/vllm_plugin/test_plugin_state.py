"""Slot state in vLLM: convolution windows, batches, blocks, and runs without blocks."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import add_rms_norm
from lamella.ops.short_conv.reference import short_conv
from lamella.vllm_plugin.registration import register_all
from lamella.vllm_plugin.state.metadata_builder import _first_blocks
from lamella.vllm_plugin.state.state_blocks import StateManager, StateSpec
from lamella.vllm_plugin.state.windows import advance_window
from vllm_plugin.plugin_helpers import DEVICE, running, scheduler_of
from vllm_plugin.state_steps import assert_same_tensors, described, drafted, metadata, starts_of

register_all()


class TestRehearsal:
    """vLLM's memory profiling runs a model before blocks exist, and without metadata."""

    def test_kernels_run_as_on_one_prompt(self, unfilled: Any, folder: Path) -> None:
        from vllm.forward_context import set_forward_context

        unfilled.load_weights(load_file(folder / "model.safetensors").items())
        layer = unfilled.model.layers[0]
        channels = layer.mixer_canon.size
        x, residual = torch.randn(2, 9, channels, device=DEVICE).unbind()
        with torch.inference_mode(), set_forward_context(None, unfilled.vllm_config):
            y, total = layer.mixer_canon.after_norm(x, residual, layer.mixer_norm)
        plain = RaggedBatch.from_lengths([9], [9], DEVICE)
        weight, bias = layer.mixer_canon.weight.squeeze(1), layer.mixer_canon.bias
        norm = ResidualNorm(residual, layer.mixer_norm.weight, layer.mixer_norm.eps)
        normed, expected_total = add_rms_norm(x, norm)
        torch.testing.assert_close(y, short_conv(normed, ConvWeights(weight, bias, residual=True), plain))
        torch.testing.assert_close(total, expected_total)

    def test_dummy_runs_compute_nothing_once_blocks_exist(self, unfilled: Any) -> None:
        from vllm.forward_context import set_forward_context

        state_module = unfilled.model.layers[0].history.state_module
        layer = state_module.layer
        blocks = torch.full((2, *layer.shape), torch.nan, device=DEVICE)
        layer.kv_cache, unbound = (blocks,), layer.kv_cache
        with set_forward_context(None, unfilled.vllm_config):
            assert not state_module.run("mixer_canon", (torch.randn(4, 64, device=DEVICE),), 64).any()
        layer.kv_cache = unbound
        assert blocks.isnan().all()


class TestWindows:
    """Slots with spare rows, which speculation needs."""

    @pytest.mark.parametrize("seed", range(12))
    def test_a_window_is_the_last_accepted_inputs(self, seed: int) -> None:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        size, spare, channels = rng.randint(1, 4), rng.randint(1, 4), 3
        rows = torch.full((9, size + spare, channels), torch.nan)
        slots = rng.sample(range(9), 5)
        seen: list[list[Tensor]] = [[] for _ in slots]
        accepted, drafting = [1] * 5, [False] * 5
        for _ in range(40):
            chosen = rng.sample(range(5), rng.randint(1, 5))
            for request in chosen:
                drafting[request] |= bool(seen[request]) and rng.random() < 0.5
            decodes = [request for request in chosen if drafting[request]]
            order = decodes + [request for request in chosen if not drafting[request]]
            lengths = [rng.randint(1, 1 + spare) if drafting[request] else rng.randint(1, 6) for request in order]
            x = torch.randn(sum(lengths), channels, generator=generator)
            found, index = advance_window(
                ConvState(rows, torch.tensor([slots[request] for request in order])),
                size,
                x,
                starts_of(lengths),
                torch.tensor([len(seen[r]) + i for r, n in zip(order, lengths, strict=True) for i in range(n)]),
                metadata(
                    num_decodes=len(decodes),
                    num_accepted_tokens=torch.tensor([accepted[request] for request in decodes], dtype=torch.int32),
                ),
            )
            assert index.tolist() == list(range(len(order)))
            for request, window, new in zip(order, found, x.split(lengths), strict=True):
                for position, known in list(enumerate(seen[request]))[-size:]:
                    assert torch.equal(window[position % size], known)
                accepted[request] = rng.randint(1, len(new)) if drafting[request] else 1
                seen[request] += new[: accepted[request] if drafting[request] else len(new)]
        untouched = [slot for slot in range(9) if slot not in slots]
        assert rows[untouched].isnan().all()

    def test_a_padding_request_has_no_effect(self) -> None:
        """In a captured step, padding requests have length 0 and the reserved slot 0."""
        rows = torch.arange(60.0).view(4, 5, 3)
        before, x = rows.clone(), -torch.arange(6.0).view(2, 3)
        accepted = torch.tensor([2, 1, 1])
        history, _ = advance_window(
            ConvState(rows, torch.tensor([2, 0, 0])),
            3,
            x,
            torch.tensor([0, 2, 2, 2]),
            torch.tensor([6, 7]),
            metadata(num_decodes=3, num_accepted_tokens=accepted),
        )
        assert torch.equal(history[0], before[2, 1:4])
        assert torch.equal(rows[2, :4], torch.cat([before[2, 2:4], x]))
        assert torch.equal(rows[[1, 3]], before[[1, 3]])


class TestBatches:
    @pytest.mark.parametrize("seed", range(12))
    @pytest.mark.parametrize("tokens_per_block", [None, 16])
    def test_a_step_becomes_a_forward_batch(self, seed: int, tokens_per_block: int | None) -> None:
        rng = random.Random(seed)
        query = [1] * rng.randint(0, 4)
        query += [rng.randint(1, 9) for _ in range(rng.randint(0 if query else 1, 3))]
        context = [length + rng.randint(1, 50) * (rng.random() < 0.7) for length in query]
        slots = rng.sample(range(1, 30), len(query))
        batch = described(query, context, slots, tokens_per_block).batch()
        expected = RaggedBatch.from_lengths(query, context)
        assert_same_tensors(batch.ragged, expected)
        assert batch.ragged.positions.dtype == torch.int64
        assert batch.ragged.num_decodes == expected.num_decodes
        if expected.num_decodes < len(query):  # not needed otherwise
            assert batch.ragged.query_lens == tuple(query)
        assert batch.slots is not None and batch.slots.tolist() == slots
        assert batch.slots.dtype == torch.int64

    @pytest.mark.parametrize("tokens_per_block", [None, 16])
    def test_padding_requests_of_a_captured_step(self, tokens_per_block: int | None) -> None:
        made = described([1, 1], [9, 20], [5, 7], tokens_per_block, padding=2).batch()
        assert made.ragged.positions[:2].tolist() == [8, 19]
        assert made.ragged.query_start_loc.tolist() == list(range(5))
        assert made.slots is not None and made.slots.tolist() == [5, 7, 0, 0]

    @pytest.mark.parametrize("seed", range(12))
    def test_a_step_with_drafts(self, seed: int) -> None:
        rng = random.Random(seed)
        decodes, prefills = rng.choice([(0, 3), (4, 0), (3, 2), (1, 1)])
        query = [rng.randint(1, 4) for _ in range(decodes)] + [rng.randint(1, 9) for _ in range(prefills)]
        context = [length + rng.randint(1, 50) * (rng.random() < 0.7) for length in query]
        slots = rng.sample(range(1, 30), len(query))
        batch = drafted(query, context, slots, decodes).batch()
        expected = RaggedBatch.from_lengths(query, context)
        assert_same_tensors(batch.ragged, expected)
        assert batch.ragged.num_decodes == 0
        assert batch.slots is not None and batch.slots.tolist() == slots

    def test_padding_requests_of_a_captured_step_with_drafts(self) -> None:
        made = drafted([4, 4], [9, 20], [5, 7, 0, 0], 4, padding=2).batch()
        expected = RaggedBatch.from_lengths([4, 4], [9, 20])
        assert made.ragged.positions.tolist() == expected.positions.tolist()
        assert made.ragged.token_request.tolist() == expected.token_request.tolist()
        assert made.slots is not None and made.slots[:2].tolist() == [5, 7]

    def test_where_vllm_keeps_the_first_blocks_with_drafts(self) -> None:
        decodes, prefills = torch.tensor([[3, 103], [1, 101]]), torch.tensor([4, 9])
        for d, p, expected in (
            (decodes, prefills, [[3], [1], [4], [9]]),
            (decodes, prefills[:0], [[3], [1]]),
            (decodes[:0], prefills, [[4], [9]]),
        ):
            theirs = SimpleNamespace(state_indices_tensor_d=d, state_indices_tensor_p=p)
            assert _first_blocks(theirs).tolist() == expected
        captured = _first_blocks(SimpleNamespace(state_indices_tensor_d=decodes, state_indices_tensor_p=None))
        assert captured.data_ptr() == decodes.data_ptr()  # a graph reads what vLLM writes there

    def test_the_batch_is_built_once_per_step(self) -> None:
        made = described([1, 4], [3, 4], [1, 2])
        assert made.batch() is made.batch()

    def test_a_captured_step_reads_the_runners_tensors(self) -> None:
        made = described([1, 1], [3, 4], [1, 2])
        made.block_table.fill_(5)
        made.seq_lens.fill_(9)
        batch = made.batch()
        assert batch.slots is not None and batch.slots.tolist() == [5, 5]
        assert batch.ragged.positions.tolist() == [8, 8]


class TestBlocks:
    @pytest.mark.parametrize("mode", ["none", "align"])
    @pytest.mark.parametrize("seed", range(6))
    def test_requests_get_the_blocks_that_vllms_manager_gives(self, mode: str, seed: int) -> None:
        """Also in a pool that other requests exhaust."""
        from vllm.v1.core.block_pool import BlockPool
        from vllm.v1.core.single_type_kv_cache_manager import MambaManager

        size = 64 if mode == "none" else 8
        spec = MambaSpec(shapes=((3, 4),), dtypes=(torch.float32,), block_size=size, mamba_cache_mode=mode)
        managers = []
        for kind, state_spec in ((MambaManager, spec), (StateManager, StateSpec.from_spec(spec))):
            assert KVCacheSpecRegistry.get_manager_class(state_spec) is kind
            pool = BlockPool(num_gpu_blocks=24, enable_caching=mode == "align", hash_block_size=size)
            options = {"enable_caching": mode == "align", "kv_cache_group_id": 0, "scheduler_block_size": size}
            managers.append(kind(state_spec, block_pool=pool, **options))
        rng, tokens = random.Random(seed), {}
        for _ in range(200):
            request = f"request {rng.randrange(9)}"
            if request in tokens and rng.random() < 0.1:
                del tokens[request]
                for manager in managers:
                    manager.free(request)
                continue
            done = tokens.get(request, 0)
            wanted = min(done + rng.choice([1, 1, 1, 8]), 64)
            outcomes = []
            for manager in managers:
                manager.remove_skipped_blocks(request, done)
                needed = manager.get_num_blocks_to_allocate(request, wanted, [], done, done, wanted)
                room = manager.block_pool.get_num_free_blocks()
                new = manager.allocate_new_blocks(request, wanted, wanted) if needed <= room else None
                held = [block.block_id for block in manager.req_to_blocks.get(request, [])]
                outcomes.append((needed, room, new and [block.block_id for block in new], held))
            assert outcomes[0] == outcomes[1]
            if outcomes[0][2] is not None:
                tokens[request] = wanted

    def test_a_layers_state_has_lamellas_spec(self, folder: Path) -> None:
        with running(folder) as llm:
            groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
            kinds = {type(group.kv_cache_spec) for group in groups}
            assert len(groups) == 2 and StateSpec in kinds
            managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
            assert [type(m) for m in managers if isinstance(m.kv_cache_spec, MambaSpec)] == [StateManager]
