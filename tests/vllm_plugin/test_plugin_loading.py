"""Loading is strict: every tensor of the checkpoint is read once, or an error names it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Llama4TextConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from checkpoint.test_lingua import lingua_checkpoint
from helpers import VOCAB, hf_checkpoint
from lamella.errors import CheckpointError, ConfigError
from lamella.vllm_plugin import PREFIX
from lamella.vllm_plugin.registration import register_all
from vllm_plugin.plugin_helpers import (
    SHAPE,
    assert_right,
    built,
    configured,
    generate,
    needs_exact_int8,
    oracle,
    prompts_of,
    running,
)

register_all()


class TestLoading:
    def test_every_tensor_is_loaded(self, unfilled: Any, folder: Path) -> None:
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

    def test_a_duplicate_tensor_is_named(self, unfilled: Any, folder: Path) -> None:
        tensors = list(load_file(folder / "model.safetensors").items())
        with pytest.raises(CheckpointError, match=f"tensor {tensors[0][0]} stands in the checkpoint twice"):
            unfilled.load_weights([*tensors, tensors[0]])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_tied_heads_own_copy_is_compared(
        self, unfilled: Any, folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """For example, the files of a Hub id exist only after the model has been built."""
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
    """Return the overrides that a one-line error suggests."""
    assert "\n" not in str(error)
    _, text = shlex.split(str(error)[str(error).index("--hf-overrides") :])
    overrides: dict[str, Any] = json.loads(text)
    return overrides


def with_own_head(folder: Path, source: Path, **changes: Any) -> Path:
    """Return a model whose config ties the head although the file has one."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(source / "model.safetensors")
    values = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"tie_word_embeddings": True} | changes))
    return folder


class TestOwnHead:
    """The config ties the head, and the file has a head that differs from the embedding."""

    @pytest.fixture(autouse=True)
    def older_vllm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Newer versions untie such a head earlier, for safetensors under the usual name."""
        monkeypatch.setattr("vllm.config.model.checkpoint_has_lm_head", lambda *_, **__: None, raising=False)

    def test_the_files_own_head_is_used(self, folder: Path, tmp_path: Path) -> None:
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
    def test_the_suggested_override_works_if_files_cannot_be_read_early(
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


def test_the_lamella_format_rejects_a_revision(folder: Path) -> None:
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
    """Projections of layer 1's attention are not quantised, listed by their names in the file."""
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
        expected = oracle(tmp_path / "whole")(output.prompt_token_ids)[-1].log_softmax(-1)
        assert said.logprob == pytest.approx(float(expected[token]), abs=0.1)
