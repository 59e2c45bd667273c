"""What vLLM asks of a model with slot state, and what is refused; the arithmetic of slots; strict loading."""

from __future__ import annotations

import json
import math
import random
import shlex
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4TextConfig

pytest.importorskip("vllm", reason="vLLM is not installed")
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from checkpoint.test_lingua import lingua_checkpoint
from helpers import VOCAB, canon_config, hf_checkpoint
from lamella.config.hf_config import HFConfig
from lamella.errors import CheckpointError, ConfigError
from lamella.models.registry import architectures, resolve_architecture
from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import add_rms_norm
from lamella.ops.short_conv.reference import short_conv
from lamella.parallel.sharding import Share
from lamella.parity.scorers.hf import why_not
from lamella.parity.subject import Subject
from lamella.vllm_plugin import PREFIX, compat
from lamella.vllm_plugin.model import model_class
from lamella.vllm_plugin.registration import OPERATIONS, register_all, served_names
from lamella.vllm_plugin.state.state_blocks import StateManager, StateSpec
from lamella.vllm_plugin.state.state_layer import (
    StateLayer,
    StateLayout,
    StateMetadata,
    StateMetadataBuilder,
    _first_blocks,
    advance_window,
)
from vllm_plugin.plugin_helpers import (
    DEVICE,
    NGRAM,
    ON_CPU,
    SHAPE,
    assert_right,
    built,
    canon,
    generate,
    needs_exact_int8,
    oracle,
    prompts_of,
    running,
    scheduler_of,
)

register_all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return canon(tmp_path_factory.mktemp("canon"))


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

    def test_both_runners_hand_accepted_counts_to_the_builder(self) -> None:
        from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
        from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder

        wanted = ShortConvAttentionMetadataBuilder if compat.at_least(0, 29) else GDNAttentionMetadataBuilder
        assert issubclass(StateMetadataBuilder, wanted)

    def test_what_a_request_of_an_8b_model_holds(self) -> None:
        """One holder a layer fills its pages; one for each convolution would pad every one to the widest's."""
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
        layout = StateLayout.of(config, Share(), torch.bfloat16)
        assert layout is not None and layout.dtype == torch.bfloat16
        size = math.prod(layout.shape) * 2
        assert 32 * size == 8_257_536
        kv_page = 16 * 2 * 8 * 128 * 2  # of the fewest tokens that a block has

        def held(holders: int, most: int) -> int:
            return 32 * holders * math.ceil(most / kv_page) * kv_page

        assert held(1, size) == 8_388_608
        assert held(4, 3 * 2 * 14336 * 2) == 25_165_824


def test_a_registered_config_is_no_model_of_transformers(folder: Path) -> None:
    """Parity's truth must come from elsewhere."""
    assert "no language model for LlamaCanon" in why_not(Subject.open(folder))


@pytest.fixture(
    scope="class",
    params=[
        {},
        pytest.param(
            {"speculative_config": NGRAM, "enable_prefix_caching": False},
            marks=pytest.mark.skipif(not compat.speculation_is_sound(), reason="this vLLM's speculation is refused"),
        ),
    ],
    ids=["", "drafts"],
)
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Any]:
    with running(folder, **request.param) as llm:
        yield llm


class TestEngine:
    def test_pages_have_the_shape_that_was_announced(self, engine: Any) -> None:
        config = engine.llm_engine.vllm_config
        cls = model_class("LlamaCanonForCausalLM")
        ((rows, channels),) = cls.get_mamba_state_shape_from_config(config)
        assert rows == 3 + compat.num_speculative_tokens(config)
        assert channels == 64 + 8 * 32 + 64 + 2 * 96
        holders = state_layers(engine)
        assert len(holders) == 3
        for holder in holders:
            assert holder.get_state_shape() == ((rows, channels),)
            assert holder.get_state_dtype() == cls.get_mamba_state_dtype_from_config(config) == (torch.float32,)
            assert holder.kv_cache[0].shape[1:] == (rows, channels)
            assert holder.kv_cache[0].shape[0] >= config.cache_config.num_gpu_blocks

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


@pytest.fixture(scope="class")
def unfilled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with built(configured(folder), tmp_path_factory.mktemp("group")) as model:
        yield model


class TestLoading:
    def test_what_is_loaded_is_all_that_there_is(self, unfilled: Any, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        assert unfilled.load_weights(tensors.items()) == {name for name, _ in unfilled.named_parameters()}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("model.layers.1.self_attn.k_proj.weight"), r"missing: model\.layers\.1\.self_attn\.k_pr"),
            (lambda t: t.pop("model.layers.2.canonA.weight"), r"missing: model\.layers\.2\.canonA\.weight$"),
            (lambda t: t.update({"model.layers.0.canonE.weight": torch.ones(3)}), r"unexpected: .*\.0\.canonE\.weight"),
            (lambda t: t.update({"model.norm.weight": torch.ones(65)}), r"model\.norm\.weight has shape \(65,\), .*64"),
            (lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.ones(96, 63)}), r"up_proj.* \(96, 63\)"),
        ],
        ids=["missing projection", "missing convolution", "unexpected", "norm's shape", "projection's shape"],
    )
    def test_tensors_that_do_not_fit_are_named(
        self, unfilled: Any, folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str
    ) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        with pytest.raises(CheckpointError, match=message):
            unfilled.load_weights(tensors.items())

    def test_a_tensor_that_stands_twice_is_named(self, unfilled: Any, folder: Path) -> None:
        tensors = list(load_file(folder / "model.safetensors").items())
        with pytest.raises(CheckpointError, match=f"tensor {tensors[0][0]} stands in the checkpoint twice"):
            unfilled.load_weights([*tensors, tensors[0]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_tied_heads_own_copy_is_compared(
        self, unfilled: Any, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Files of a Hub id, for instance, are there only when the model has been built."""
        monkeypatch.setattr(unfilled, "config", replace(unfilled.config, tie_word_embeddings=True))
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].to(dtype)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float().clone()
        unfilled.load_weights(tensors.items())
        tensors["lm_head.weight"][-1, -1] += 1
        for order in (list, reversed):
            with pytest.raises(CheckpointError, match=r"^tensor lm_head\.weight differs from the embedding") as caught:
                unfilled.load_weights(order(list(tensors.items())))
            assert way_out_of(caught.value) == {"tie_word_embeddings": False}
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1]
        with pytest.raises(CheckpointError, match=r"^tensor lm_head\.weight differs from the embedding"):
            unfilled.load_weights(tensors.items())


def way_out_of(error: Exception) -> dict[str, Any]:
    """The overrides that an error of one line names."""
    assert "\n" not in str(error)
    _, text = shlex.split(str(error)[str(error).index("--hf-overrides") :])
    overrides: dict[str, Any] = json.loads(text)
    return overrides


def with_own_head(folder: Path, source: Path, **changes: Any) -> Path:
    """The model with a config that ties the head that its file has."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True} | changes))
    return folder


class TestOwnHead:
    """A config that ties the head, and a file with a head that differs from the embedding."""

    @pytest.fixture(autouse=True)
    def older_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Newer versions untie such a head before it comes to that, for safetensors under the usual name."""
        monkeypatch.setattr("vllm.config.model.checkpoint_has_lm_head", lambda *_, **__: None, raising=False)

    def test_it_is_computed_with(self, folder: Path, tmp_path: Path) -> None:
        tied = with_own_head(tmp_path / "tied", folder)
        with running(tied) as llm:
            assert_right(oracle(folder), generate(llm, prompts_of(3, 20), 6))

    def test_lingua_files(self, tmp_path: Path) -> None:
        source = lingua_checkpoint(tmp_path, **SHAPE, rope_version="lingua")
        file = source / "default" / "params.json"
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"model": values["model"] | {"weight_tying": True}}))
        with running(source, config_format="lamella", load_format="lamella") as llm:
            assert_right(oracle(tmp_path / "hf"), generate(llm, prompts_of(3, 20), 6))

    def test_a_copy_of_the_embedding_stays_tied(self, folder: Path, tmp_path: Path) -> None:
        tied = with_own_head(tmp_path / "tied", folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        (tied / "model.safetensors").unlink()
        save_file(tensors, tied / "model.safetensors")
        with built(configured(tied), tmp_path) as model:
            assert model.config.tie_word_embeddings
            model.load_weights(tensors.items())
            assert model.lm_head.weight is model.model.embed_tokens.weight

    @pytest.mark.parametrize("nested", [False, True])
    def test_the_way_out_works_where_files_cannot_be_looked_at(
        self, tmp_path: Path, nested: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = SHAPE | {"intermediate_size_mlp": 96, "moe_layers": [], "attention_chunk_size": 32}
        hf_checkpoint(tmp_path / "source", Llama4TextConfig(vocab_size=VOCAB, max_position_embeddings=256, **sizes))
        values = json.loads((tmp_path / "source" / "config.json").read_text()) | {"tie_word_embeddings": True}
        name = "Llama4ForConditionalGeneration" if nested else "Llama4ForCausalLM"
        changes = {"text_config": values, "tie_word_embeddings": True} if nested else values
        tied = with_own_head(tmp_path / "tied", tmp_path / "source")
        around = {"architectures": [name], "model_type": "llama4" if nested else "llama4_text"}
        (tied / "config.json").write_text(json.dumps(changes | around))
        tensors = load_file(tied / "model.safetensors")
        ours = {"architectures": [f"{PREFIX}{name}"]}
        with monkeypatch.context() as blind:
            blind.setattr("lamella.vllm_plugin.model.untie_own_head", lambda config, *_: config)
            with (
                built(configured(tied, hf_overrides=ours), tmp_path) as model,
                pytest.raises(CheckpointError, match=r"^tensor lm_head\.weight differs") as caught,
            ):
                model.load_weights(tensors.items())
            (tmp_path / "group").unlink(missing_ok=True)
            overrides = ours | way_out_of(caught.value)
            with built(configured(tied, hf_overrides=overrides), tmp_path) as model:
                model.load_weights(tensors.items())
                head = model.lm_head.weight[:VOCAB].cpu()
        assert torch.equal(head, tensors["lm_head.weight"])


class TestRehearsal:
    """vLLM runs a model for memory's sake before there are blocks, and without metadata."""

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

    def test_nothing_is_computed_once_there_are_blocks(self, unfilled: Any) -> None:
        from vllm.forward_context import set_forward_context

        holder = unfilled.model.layers[0].history.holder
        layer = holder.layer
        blocks = torch.full((2, *layer.shape), torch.nan, device=DEVICE)
        layer.kv_cache, unbound = (blocks,), layer.kv_cache
        with set_forward_context(None, unfilled.vllm_config):
            assert not holder.run("mixer_canon", (torch.randn(4, 64, device=DEVICE),), 64).any()
        layer.kv_cache = unbound
        assert blocks.isnan().all()


def test_a_revision_is_refused_by_the_own_format(folder: Path) -> None:
    from lamella.vllm_plugin.loading.formats import Parser

    with pytest.raises(ConfigError, match="revision='v2'"):
        Parser().parse(folder, False, revision="v2")


def test_an_engine_does_not_start_with_half_a_checkpoint(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.canonD.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"missing: model\.layers\.0\.mlp\.canonD\.weight$"), running(tmp_path):
        pass


@needs_exact_int8
def test_quantised_projections_beside_whole_convolutions(folder: Path, tmp_path: Path) -> None:
    """Those of layer 1's attention are left whole, under the names that they have in the file."""
    pytest.importorskip("compressed_tensors")
    tensors, whole, kept = load_file(folder / "model.safetensors"), {}, []
    stored = {}
    for name, tensor in tensors.items():
        whole[name] = stored[name] = tensor
        if not name.endswith("_proj.weight"):
            continue
        if "layers.1.self_attn" in name:
            kept.append(name.removesuffix(".weight"))
            continue
        scale = tensor.abs().amax(1, keepdim=True) / 127
        stored[name] = (tensor / scale).round().to(torch.int8)
        stored[f"{name}_scale"] = scale
        whole[name] = stored[name] * scale
    config = json.loads((folder / "config.json").read_text())
    grid = {"num_bits": 8, "type": "int", "symmetric": True}
    scheme = {
        "targets": ["Linear"],
        "weights": grid | {"strategy": "channel", "dynamic": False},
        "input_activations": grid | {"strategy": "token", "dynamic": True},
    }
    quantisation = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head", *kept],
    }
    for name, files, values in (
        ("whole", whole, config),
        ("stored", stored, config | {"quantization_config": quantisation}),
    ):
        (tmp_path / name).mkdir()
        save_file(files, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps(values))
    with running(tmp_path / "stored", dtype="bfloat16") as llm:
        # What becomes of a weight differs from CPU to CPU; who computes with it does not.
        (methods,) = llm.apply_model(
            lambda model: {
                name.removeprefix("model.layers."): type(module.quant_method).__name__
                for name, module in model.named_modules()
                if name.endswith("_proj")
            }
        )
        outputs = generate(llm, prompts_of(3, 20), 1)
    assert methods["1.mixer.qkv_proj"] == methods["1.mixer.o_proj"] == "UnquantizedLinearMethod"
    assert methods["0.mixer.qkv_proj"] == methods["1.feed_forward.gate_up_proj"] == "CompressedTensorsLinearMethod"
    for output in outputs:
        ((token, said),) = output.outputs[0].logprobs[0].items()
        truth = oracle(tmp_path / "whole")(output.prompt_token_ids)[-1].log_softmax(-1)
        assert said.logprob == pytest.approx(float(truth[token]), abs=0.1)


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

    def test_a_padding_request_has_neither_tokens_nor_effects(self) -> None:
        """In a captured step they have length 0, and the reserved slot 0."""
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
    def test_a_step_in_our_terms(self, seed: int, tokens_per_block: int | None) -> None:
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
        if expected.num_decodes < len(query):  # else nobody asks
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

    def test_it_is_made_once_a_step(self) -> None:
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
        """In a pool that others empty, too."""
        from vllm.v1.core.block_pool import BlockPool
        from vllm.v1.core.single_type_kv_cache_manager import MambaManager

        size = 64 if mode == "none" else 8
        spec = MambaSpec(shapes=((3, 4),), dtypes=(torch.float32,), block_size=size, mamba_cache_mode=mode)
        managers = []
        for kind, described in ((MambaManager, spec), (StateManager, StateSpec.of(spec))):
            assert KVCacheSpecRegistry.get_manager_class(described) is kind
            pool = BlockPool(num_gpu_blocks=24, enable_caching=mode == "align", hash_block_size=size)
            options = {"enable_caching": mode == "align", "kv_cache_group_id": 0, "scheduler_block_size": size}
            managers.append(kind(described, block_pool=pool, **options))
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

    def test_a_layers_state_is_described_by_ours(self, folder: Path) -> None:
        with running(folder) as llm:
            groups = scheduler_of(llm).kv_cache_config.kv_cache_groups
            kinds = {type(group.kv_cache_spec) for group in groups}
            assert len(groups) == 2 and StateSpec in kinds
            managers = scheduler_of(llm).kv_cache_manager.coordinator.single_type_managers
            assert [type(m) for m in managers if isinstance(m.kv_cache_spec, MambaSpec)] == [StateManager]


def assert_same_tensors(made: RaggedBatch, expected: RaggedBatch) -> None:
    for name in ("positions", "query_start_loc", "seq_lens", "token_request"):
        assert getattr(made, name).tolist() == getattr(expected, name).tolist(), name


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def metadata(**values: Any) -> StateMetadata:
    """A step's, of which the test says what counts."""
    return StateMetadata(
        **(dict.fromkeys(field.name for field in fields(StateMetadata) if field.default is MISSING) | values)
    )


def described(
    query: list[int], context: list[int], slots: list[int], tokens_per_block: int | None = None, padding: int = 0
) -> StateMetadata:
    """What the builder makes of a step without drafts, as either runner describes it."""
    builder = StateMetadataBuilder.__new__(StateMetadataBuilder)
    builder._index, builder._spare_rows, builder._tokens_per_block = torch.arange(100), 0, tokens_per_block
    requests = len(query) + padding
    table = torch.full((requests, 8), -1, dtype=torch.int32)
    for row in range(requests):
        column = (context[row] - 1) // tokens_per_block if tokens_per_block and row < len(query) else 0
        table[row, column] = slots[row] if row < len(query) else 0
    starts = starts_of([*query, *[0] * padding])
    step = SimpleNamespace(
        num_reqs=requests,
        num_actual_tokens=sum(query) + padding,
        max_query_len=max(query),
        query_start_loc=starts,
        query_start_loc_cpu=torch.cat([starts, starts[-1:]]),  # the newer runner has more room there
        seq_lens=torch.tensor([*context, *[0] * (padding + 1)], dtype=torch.int32),
        block_table_tensor=table,
    )
    return builder.build(0, step)


def drafted(query: list[int], context: list[int], slots: list[int], decodes: int, padding: int = 0) -> StateMetadata:
    """What the builder makes of a step of a model that takes up to three drafts a request."""
    return metadata(
        block_table=torch.tensor(slots, dtype=torch.int32)[:, None],
        num_tokens=sum(query),
        num_decodes=decodes,
        query_lens=tuple(query) if len(query) + padding > decodes else (),
        seq_lens=torch.tensor([*context, *[0] * padding], dtype=torch.int32),
        query_start_loc=starts_of([*query, *[0] * padding]),
        index=torch.arange(100),
        spare_rows=3,
    )


def configured(folder: Path, **options: Any) -> Any:
    """vLLM's config of an engine that is not built."""
    from vllm import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    return EngineArgs(model=str(folder), **(settings | options)).create_engine_config()


def refused(message: str) -> Any:
    """vLLM's config classes turn a `ConfigError` into an error of their own, which has its text."""
    return pytest.raises(ValueError, match=message)


class TestChecks:
    def test_nothing_is_wrong_with_the_defaults(self, folder: Path) -> None:
        config = configured(folder)
        assert config.model_config.is_hybrid
        assert not ON_CPU or config.cache_config.block_size == 32

    def test_a_block_size_that_was_asked_for_stays(self, folder: Path) -> None:
        assert configured(folder, block_size=64).cache_config.block_size == 64

    def test_state_of_another_dtype(self, folder: Path) -> None:
        configured(folder, mamba_cache_dtype="auto")
        with refused("mamba_cache_dtype='float32': state has the model's dtype"):
            configured(folder, dtype="bfloat16", mamba_cache_dtype="float32")

    def test_the_other_order_of_rows(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from vllm.model_executor.layers.mamba import mamba_utils

        monkeypatch.setattr(mamba_utils, "is_conv_state_dim_first", lambda: True)
        with refused("VLLM_SSM_CONV_STATE_LAYOUT=DS"):
            configured(folder)

    @pytest.mark.skipif(compat.at_least(0, 32), reason="this vLLM has no such mode")
    def test_states_at_every_block(self, folder: Path) -> None:
        with refused("mamba_cache_mode='all'"):
            configured(folder, mamba_cache_mode="all")

    @pytest.mark.skipif(compat.has_sound_partial_hits(), reason="in this vLLM they are right, or absent")
    def test_hits_within_a_block(self, folder: Path) -> None:
        with refused("prefix_match_unit=16: .*leave it out"):
            configured(folder, prefix_match_unit=16, enable_prefix_caching=True)

    @pytest.mark.skipif(not ON_CPU, reason="a fault of vLLM's on CPUs")
    def test_adapters(self, folder: Path) -> None:
        with refused("enable_lora on CPU"):
            configured(folder, enable_lora=True)

    @pytest.mark.skipif(not ON_CPU, reason="a fault of vLLM's on CPUs")
    def test_eager_stages(self, folder: Path) -> None:
        with refused("enforce_eager with pipeline_parallel_size > 1"):
            configured(folder, pipeline_parallel_size=2, enforce_eager=True)

    def test_drafts_of_a_model(self, folder: Path) -> None:
        drafts = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 2}
        with refused(r"speculative_config: method 'draft_model' .* there are ngram, "):
            configured(folder, speculative_config=drafts)

    def test_drafts_in_a_vllm_that_forgets_what_was_accepted(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(compat, "speculation_is_sound", lambda: False)
        with refused(r"speculative_config: up to 0\.31"):
            configured(folder, speculative_config=NGRAM)

    @pytest.mark.skipif(not compat.speculation_is_sound(), reason="this vLLM's speculation is refused")
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
    def test_a_model_is_compiled_whole_unless_otherwise_asked(
        self, folder: Path, options: dict[str, Any], whole: bool
    ) -> None:
        from vllm.config import CUDAGraphMode

        made = configured(folder, **options).compilation_config
        assert (made.splitting_ops == []) == whole
        if options == {}:
            assert made.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
        assert whole or OPERATIONS[0] in made.splitting_ops

    def test_a_model_without_state_is_left_alone(self, tmp_path: Path) -> None:
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
    """What a canon model asks the newer runner to keep of its requests."""
    cache = SimpleNamespace(mamba_cache_mode=mode)
    model = SimpleNamespace(vllm_config=SimpleNamespace(cache_config=cache, speculative_config=None))
    return model_class("LlamaCanonForCausalLM").get_model_state_cls(model)


@pytest.mark.parametrize("name", ["LlamaCanonForCausalLM", f"{PREFIX}LlamaForCausalLM"])
def test_only_where_it_costs_is_a_runners_state_replaced(name: str) -> None:
    replaced = compat.has_costly_runner_state() and name == "LlamaCanonForCausalLM"
    assert hasattr(model_class(name), "get_model_state_cls") == replaced
