"""Folders in practice: stale indices, files of other tools, name prefixes, unreadable files."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from helpers import canon_checkpoint, hf_checkpoint, plain_logits, shard
from lamella.checkpoint import load_model, open_checkpoint
from lamella.errors import CheckpointError

INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 123\n"
IDS = torch.arange(12)[None]
EMBEDDING = "model.embed_tokens.weight"
SIZE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return two models with equal configs, and their logits."""
    folder = tmp_path_factory.mktemp("originals")
    models = [hf_checkpoint(folder / str(seed), LlamaConfig(**SIZE), seed) for seed in (0, 1)]
    return folder, [model(IDS).logits.detach() for model in models]


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    return shutil.copytree(originals[0] / "0", tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(folder: Path) -> Tensor:
    return plain_logits(load_model(open_checkpoint(folder), "float32"), IDS)


def assert_is(folder: Path, expected: Tensor) -> None:
    torch.testing.assert_close(logits(folder), expected, atol=1e-4, rtol=1e-4)


def refused(folder: Path, *said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_model(open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def age(file: Path, seconds: int) -> None:
    os.utime(file, (file.stat().st_mtime - seconds,) * 2)


class TestStaleIndex:
    @pytest.fixture
    def both(self, originals, folder) -> Path:
        """Return a folder with the first model in shards with an index, and the second in one file."""
        shard(folder, 2)
        shutil.copy(originals[0] / "1/model.safetensors", folder)
        return folder

    @pytest.mark.parametrize("newer", ["file", "shards"])
    def test_newer_weights_are_read_and_logged(self, originals, both, newer, caplog):
        for file in both.glob("model*.safetensors"):
            if (file.name == "model.safetensors") != (newer == "file"):
                age(file, 100)
        assert_is(both, originals[1][newer == "file"])
        said = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert len(said) == 1 and "model.safetensors" in said[0].message and INDEX in said[0].message

    def test_different_weights_of_equal_age_raise(self, both):
        for file in both.glob("model*.safetensors"):
            os.utime(file, (1e9, 1e9))
        refused(both, "hold different weights", "delete those")

    def test_equal_weights_are_not_logged(self, originals, folder, caplog):
        whole = (folder / "model.safetensors").read_bytes()
        shard(folder, 2)
        (folder / "model.safetensors").write_bytes(whole)
        assert_is(folder, originals[1][0])
        assert not caplog.records

    def test_partial_file_does_not_replace_shards(self, originals, both):
        save_file({EMBEDDING: torch.zeros(64, 32)}, both / "model.safetensors")
        assert_is(both, originals[1][0])

    def test_single_file_is_read_if_shards_are_missing(self, originals, both, caplog):
        (both / "model-00001-of-00002.safetensors").unlink()
        assert_is(both, originals[1][1])
        assert "some of which are missing" in caplog.text


class TestOtherFiles:
    @pytest.mark.parametrize("layout", ["main", "index", "shards"])
    def test_other_files_are_not_read(self, originals, folder, layout, caplog):
        if layout != "main":
            shard(folder, 2, index=layout == "index")
        others = ["adapter_model.safetensors", "optimizer.safetensors", "consolidated.safetensors", "other.safetensors"]
        for name in others:
            save_file({"something.else": torch.zeros(2)}, folder / name)
        (folder / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07" + bytes(200))
        with caplog.at_level(logging.INFO, "lamella"):
            assert_is(folder, originals[1][0])
        (said,) = [record.message for record in caplog.records if "not part of the model" in record.message]
        assert said == f"{folder}: not part of the model, not read: {', '.join(sorted(others))}"

    def test_single_file_with_another_name_is_read(self, originals, folder):
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
        assert_is(folder, originals[1][0])

    def test_missing_shard_without_index_is_named(self, folder):
        shard(folder, 3, index=False)
        (folder / "model-00002-of-00003.safetensors").unlink()
        refused(folder, "shards are not there: 2 of 3")

    def test_shards_of_two_saves_raise(self, folder):
        shard(folder, 3, index=False)
        save_file({"x": torch.zeros(2)}, folder / "model-00001-of-00002.safetensors")
        refused(folder, "shards of several sets, -of-00002, -of-00003")

    @pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    def test_dispensable_index_entries_are_ignored(self, originals, folder, name, tmp_path):
        config = LlamaConfig(**SIZE, tie_word_embeddings=True)
        model = hf_checkpoint(tmp_path / "tied", config)
        shard(tmp_path / "tied", 2)
        index = json.loads((tmp_path / "tied" / INDEX).read_text())
        index["weight_map"][name] = "model-00001-of-00002.safetensors"
        (tmp_path / "tied" / INDEX).write_text(json.dumps(index))
        assert_is(tmp_path / "tied", model(IDS).logits.detach())


PREFIXES = {
    "none": lambda name: name.removeprefix("model."),
    "twice": lambda name: f"model.{name}",
    "a multimodal wrapper": lambda name: f"language_model.{name}",
    "a newer wrapper": lambda name: name.replace("model.", "model.language_model.", 1),
    "PEFT": lambda name: f"base_model.model.{name}",
    "DDP and torch.compile": lambda name: f"module._orig_mod.{name}",
    "head inside": lambda name: (
        f"model.{name}" if name.startswith("lm_head") else name.replace("model.", "model.lm.", 1)
    ),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixed_names_load(originals, folder, kind, caplog):
    renamed = {PREFIXES[kind](name): tensor for name, tensor in tensors_of(folder).items()}
    save_file(renamed, folder / "model.safetensors")
    with caplog.at_level(logging.INFO, "lamella"):
        assert_is(folder, originals[1][0])
    assert len([r for r in caplog.records if "in place of 'model.'" in r.message]) == 1


def test_prefixed_pytorch_files_load(originals, folder):
    state = {f"module.{name}": tensor for name, tensor in tensors_of(folder).items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_is(folder, originals[1][0])


@pytest.mark.parametrize("family", ["llama", "canon"])
def test_attention_bias_without_tensors_is_ignored(tmp_path, family, caplog):
    """`attention_bias` is also true in files of models with biases only in query, key and value projections."""
    if family == "llama":
        hf_checkpoint(tmp_path, LlamaConfig(**SIZE, attention_bias=True))
    else:
        canon_checkpoint(tmp_path, attention_bias=True)
    tensors = tensors_of(tmp_path)
    zeros = {n: torch.zeros_like(t) if n.endswith("o_proj.bias") else t for n, t in tensors.items()}
    save_file(zeros, tmp_path / "model.safetensors")
    expected = logits(tmp_path)
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("o_proj.bias")}
    save_file(without, tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "lamella"):
        assert torch.equal(logits(tmp_path), expected)
    assert len([r for r in caplog.records if "no o_proj.bias in the files" in r.message]) == 1
    # One layer's alone is a loss.
    save_file(without | {n: t for n, t in tensors.items() if "layers.0" in n}, tmp_path / "model.safetensors")
    refused(tmp_path, "missing: model.layers.1.self_attn.o_proj.bias")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_hub_revision_is_requested(folder, monkeypatch, kind):
    asked = []

    def snapshot(model, revision, allow_patterns, ignore_patterns):
        asked.append((model, revision, allow_patterns))
        if kind == "bin" and len(asked) == 1:
            torch.save(tensors_of(folder), folder / "pytorch_model.bin")
            (folder / "model.safetensors").unlink()
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    load_model(open_checkpoint("org/model", revision="v1.2"))
    assert {(model, revision) for model, revision, _ in asked} == {("org/model", "v1.2")}
    # Files of both formats are not downloaded where one will do.
    assert len(asked) == (1 if kind == "safetensors" else 2)
    assert not any("bin" in pattern for pattern in asked[0][2])


def test_inner_model_without_head_raises(folder):
    inner = {name.removeprefix("model."): t for name, t in tensors_of(folder).items() if not name.startswith("lm_head")}
    save_file(inner, folder / "model.safetensors")
    refused(folder, "missing: lm_head.weight; if the head is the embedding: --hf-overrides")
    overrides = {"tie_word_embeddings": True}
    load_model(open_checkpoint(folder, overrides))


def test_an_unmerged_adapter_is_named(folder):
    extra = {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(4, 32)}
    save_file(tensors_of(folder) | extra, folder / "model.safetensors")
    refused(folder, "an adapter that is not merged", "merge_and_unload")


def test_tied_embedding_named_lm_head_loads(tmp_path):
    """Some tools keep only one name of tensors that share memory."""
    model = hf_checkpoint(tmp_path, LlamaConfig(**SIZE, tie_word_embeddings=True))
    tensors = tensors_of(tmp_path)
    tensors["lm_head.weight"] = tensors.pop(EMBEDDING)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_is(tmp_path, model(IDS).logits.detach())


class TestPytorchFiles:
    @pytest.mark.parametrize("legacy", [False, True])
    def test_one_file(self, originals, folder, legacy):
        state = tensors_of(folder)
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
        (folder / "model.safetensors").unlink()
        assert_is(folder, originals[1][0])

    @pytest.mark.parametrize("index", [False, True])
    def test_shards(self, originals, folder, index):
        items, weight_map = list(tensors_of(folder).items()), {}
        for number in (1, 2):
            name = f"pytorch_model-{number:05d}-of-00002.bin"
            part = dict(items[number - 1 :: 2])
            torch.save(part, folder / name)
            weight_map |= dict.fromkeys(part, name)
        if index:
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        (folder / "model.safetensors").unlink()
        assert_is(folder, originals[1][0])

    def test_safetensors_have_precedence(self, originals, folder):
        torch.save({}, folder / "pytorch_model.bin")
        assert_is(folder, originals[1][0])

    def test_objects_are_not_unpickled(self, folder, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "ran",))

        torch.save({"x": Evil()}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        refused(folder, "pytorch_model.bin", "may run code")
        assert not (tmp_path / "ran").exists()


UNREADABLE = {
    "LFS pointer": (POINTER.encode(), "a Git LFS pointer", "git lfs pull"),
    "git-annex pointer": (b"/annex/objects/MD5E-s1--0.safetensors\n", "a git-annex pointer", "git annex get"),
    "empty": (b"", "an empty file", "download it again"),
    "web page": (b"<!DOCTYPE html><html>", "an HTML page", "download it again"),
    "GGUF": (b"GGUF" + bytes(100), "a GGUF file under another name", "safetensors"),
    "pickle": (b"PK\x03\x04" + bytes(100), "a PyTorch file", "pytorch_model.bin"),
    "AppleDouble": (b"\x00\x05\x16\x07" + bytes(100), "AppleDouble", "delete it"),
    "text": (b"model   ".ljust(100, b"."), "not a readable safetensors file", "download it again"),
    "no header": (
        (1 << 20).to_bytes(8, "little") + b"[]",
        "not a readable safetensors file: Error",
        "download it again",
    ),
    "long header": (
        (1 << 40).to_bytes(8, "little") + b"{}",
        "not a readable safetensors file: Error",
        "download it again",
    ),
    "noise": (b"\x80" * 7 + b"\x00" + bytes(50), "not a readable safetensors file", "download it again"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_unreadable_weights_are_named_with_the_way_out(folder, kind):
    content, what, way_out = UNREADABLE[kind]
    (folder / "model.safetensors").write_bytes(content)
    refused(folder, str(folder / "model.safetensors"), what, way_out)


def test_truncated_file_error_states_missing_bytes(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(folder, "truncated, 100 bytes are missing: download it again")


def test_broken_link_error_names_it(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(".git/annex/objects/a")
    refused(folder, "model.safetensors", "git annex get")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("../blobs/0")
    refused(folder, "config.json", "which is not there: download it again")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_lfs_pointers_instead_of_json_are_named(folder, name):
    (folder / name).write_text(POINTER)
    refused(folder, str(folder / name), "a Git LFS pointer", "git lfs pull")


OTHER_FORMATS = {
    "adapter": ({"adapter_config.json": '{"base_model_name_or_path": "org/base"}', "adapter_model.safetensors": ""},
                "a PEFT adapter of org/base, not a model"),
    "GGUF": ({"m.Q4_K_M.gguf": ""}, "m.Q4_K_M.gguf"),
    "Meta": ({"consolidated.00.pth": "", "params.json": '{"dim": 64}'}, "Meta's own format"),
    "Mistral": ({"consolidated.safetensors": "", "params.json": "{}"}, "Mistral's own format"),
    "steps": ({"__0_0.distcp": "", ".metadata": ""}, "a distributed checkpoint"),
    "TensorFlow": ({"tf_model.h5": ""}, "tf_model.h5 is of a format that is not read"),
    "nested": ({"checkpoint-500/model.safetensors": ""}, "the weights stand in checkpoint-500"),
    "nothing": ({}, "no weights there"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_FORMATS)
@pytest.mark.parametrize("config", [True, False])
def test_other_formats_are_named_in_errors(folder, kind, config):
    (folder / "model.safetensors").unlink()
    if not config:
        (folder / "config.json").unlink()
    files, what = OTHER_FORMATS[kind]
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    refused(folder, what if config or files else "give the folder of a model")


def test_file_paths_are_explained_in_errors(folder):
    (folder / "m.gguf").write_bytes(b"GGUF")
    (folder / "renamed").write_bytes(b"GGUF")
    for name, what in (
        ("m.gguf", "cannot be read as GGUF"),
        ("renamed", "cannot be read as GGUF"),
        ("model.safetensors", "give the folder"),
    ):
        refused(folder / name, what)
