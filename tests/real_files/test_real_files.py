"""Files of public models, each read as it should be; transformers is the reference where it knows the model."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from transformers import LlamaConfig, Qwen3Config

from helpers import hf_checkpoint, logprobs, plain_logits
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.names import targets
from lamella.config import AttentionConfig, LinearScaling, Llama3Scaling, ModelConfig, YarnScaling
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import CheckpointError, ConfigError, LamellaError
from lamella.layers.local_kit import LocalKit

HERE = Path(__file__).parent
RECORDS = {path.stem: json.loads(path.read_text()) for path in sorted(HERE.glob("*.json"))}
CONFIGS = {"LlamaForCausalLM": LlamaConfig, "LLaMAForCausalLM": LlamaConfig, "Qwen3ForCausalLM": Qwen3Config}


def having(name: str) -> Iterator[tuple[str, Any]]:
    """Records with a file of this name, and the file."""
    return ((stem, record["files"][name]) for stem, record in RECORDS.items() if name in record["files"])


def architecture(values: dict[str, Any]) -> str:
    return (values.get("architectures") or [values.get("model_type")])[0]


ALL = {stem: values for stem, values in having("config.json") if isinstance(values, dict)}
QUANTIZED = {stem: values for stem, values in ALL.items() if "quantization_config" in values}
SUPPORTED = {stem: v for stem, v in ALL.items() if architecture(v) in CONFIGS and stem not in QUANTIZED}
UNSUPPORTED = {stem: v for stem, v in ALL.items() if architecture(v) not in CONFIGS}


def folder_of(stem: str, folder: Path, **changes: Any) -> Path:
    """The record's files, written out; `changes` are keys of config.json."""
    for name, content in RECORDS[stem]["files"].items():
        if name == "config.json" and changes:
            content = content | changes
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_there_are_enough_and_each_says_where_it_is_from():
    assert all(record["source"].startswith("https://github.com/") for record in RECORDS.values())
    kinds = [name for record in RECORDS.values() for name in record["files"]]
    assert len(kinds) >= 300 and kinds.count("config.json") >= 60 and kinds.count("tokenizer_config.json") >= 50
    assert len(SUPPORTED) >= 25 and len(UNSUPPORTED) >= 25


def without_null(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def facts(config: ModelConfig) -> dict[str, Any]:
    """Return what a config says, in transformers' words."""
    mixer, mlp = config.layers[0].mixer, config.layers[0].feed_forward
    assert isinstance(mixer, AttentionConfig) and mixer.rope is not None
    kinds = {type(None): "default", Llama3Scaling: "llama3", LinearScaling: "linear", YarnScaling: "yarn"}
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": mlp.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "rms_norm_eps": config.norm.eps,
        "rope_theta": mixer.rope.theta,
        "rope_type": kinds[type(mixer.rope.scaling)],
        "factor": getattr(mixer.rope.scaling, "factor", None),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": mixer.output_bias,
    }


@pytest.mark.parametrize("stem", SUPPORTED)
def test_configs_say_what_transformers_reads(stem, tmp_path):
    values = SUPPORTED[stem]
    theirs = CONFIGS[architecture(values)].from_dict(values)
    rope = theirs.rope_parameters
    expected = {name: getattr(theirs, name) for name in facts(open_checkpoint(folder_of(stem, tmp_path)).read_config())
                if hasattr(theirs, name)}  # fmt: skip
    expected |= {"rope_theta": rope["rope_theta"], "rope_type": rope["rope_type"], "factor": rope.get("factor")}
    assert facts(open_checkpoint(tmp_path).read_config()) == pytest.approx(expected)


@pytest.mark.parametrize("stem", SUPPORTED)
def test_every_end_of_text_is_known(stem, tmp_path):
    checkpoint = open_checkpoint(folder_of(stem, tmp_path))
    config = checkpoint.read_config()
    expected: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        stated = RECORDS[stem]["files"].get(name, {}).get("eos_token_id")
        expected |= set(stated if isinstance(stated, list) else [] if stated is None else [stated])
    assert set(checkpoint.eos_token_ids(config)) == expected


# What people's tools left in configs, each with its warning.
IGNORED = {
    "is_llama_config": 1, "rope_interleaved": 1, "max_sequence_length": 2, "sequence_parallel_enabled": 5,
    "selective_checkpoint_enabled": 5, "badwordsids": 1, "pad_token": 1,
}  # fmt: skip


def test_marks_of_tools_are_ignored_with_a_warning(tmp_path, caplog):
    seen: dict[str, int] = {}
    for stem in SUPPORTED:
        caplog.clear()
        (tmp_path / stem).mkdir()
        open_checkpoint(folder_of(stem, tmp_path / stem)).read_config()
        said = [r.message for r in caplog.records if r.levelno >= logging.WARNING and "ignored keys" in r.message]
        assert len(said) <= 1
        for key in IGNORED:
            seen[key] = seen.get(key, 0) + any(f"{key}=" in message for message in said)
    assert all(seen[key] >= least for key, least in IGNORED.items()), seen


@pytest.mark.parametrize("stem", [*UNSUPPORTED, *QUANTIZED])
def test_what_is_not_supported_is_one_line_with_a_way_out(stem, tmp_path):
    with pytest.raises(LamellaError) as caught:
        open_checkpoint(folder_of(stem, tmp_path)).read_config()
    message = str(caught.value)
    assert "\n" not in message
    assert any(way in message for way in ("docs/adding_a_model.md", "--hf-overrides", "take files of another format"))
    if stem in UNSUPPORTED and architecture(ALL[stem]):
        assert repr(architecture(ALL[stem])) in message


def shrunk(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same model with few and small layers; what else the file says stays."""
    theirs = CONFIGS[architecture(values)].from_dict(values)
    groups = theirs.num_attention_heads // theirs.num_key_value_heads
    groups = groups if groups <= 8 else 4
    sizes = {
        "vocab_size": 96, "hidden_size": 8 * 2 * groups, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2 * groups, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": None,
        "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32", "torch_dtype": None, "max_window_layers": 2,
    }  # fmt: skip
    return without_null(values | sizes)


@pytest.mark.parametrize("stem", SUPPORTED)
def test_shrunk_models_compute_what_transformers_computes(stem, tmp_path):
    values = shrunk(SUPPORTED[stem])
    model = hf_checkpoint(tmp_path, CONFIGS[architecture(values)].from_dict(values))
    (tmp_path / "config.json").write_text(json.dumps(values))
    ids = torch.arange(3, 90)[None]
    ours = logprobs(plain_logits(load_model(open_checkpoint(tmp_path), "float32"), ids))
    assert (ours - logprobs(model(ids).logits.detach())).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_indices_name_the_tensors_that_we_read(name, tmp_path):
    read = 0
    for stem, index in having(name):
        if stem not in SUPPORTED or isinstance(index, str):
            continue
        (tmp_path / stem).mkdir()
        (tmp_path / stem / "config.json").write_text(json.dumps(SUPPORTED[stem]))
        config = open_checkpoint(tmp_path / stem).read_config()
        checkpoint = open_checkpoint(tmp_path / stem)
        model = checkpoint.allocate(config, LocalKit(device="meta"))
        present = {tensor for tensor in index["weight_map"] if not tensor.endswith("rotary_emb.inv_freq")}
        expected = set(targets(model, checkpoint.names))
        assert present - {"lm_head.weight"} == expected - {"lm_head.weight"}
        assert config.tie_word_embeddings or "lm_head.weight" in present
        read += 1
    assert read >= 4


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_without_its_shards_names_them(name, tmp_path):
    for stem, index in having(name):
        if isinstance(index, str) or stem not in SUPPORTED:
            continue
        (tmp_path / stem).mkdir()
        (tmp_path / stem / "config.json").write_text(json.dumps(SUPPORTED[stem]))
        (tmp_path / stem / name).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"names files that are not there: .*; download them"):
            load_model(open_checkpoint(tmp_path / stem, {"num_hidden_layers": 1, "vocab_size": 8}))


TOKENIZERS = {
    stem: values for stem, values in having("tokenizer_config.json")
    if isinstance(values, dict) and isinstance(values.get("added_tokens_decoder"), dict)
}  # fmt: skip


@pytest.mark.parametrize("stem", TOKENIZERS)
def test_added_and_special_tokens_are_read(stem, tmp_path):
    """Over a plain vocabulary in the place of the model's own, in which every other added token is there already."""
    values, files = TOKENIZERS[stem], RECORDS[stem]["files"]
    added = {int(index): token["content"] for index, token in values["added_tokens_decoder"].items()}
    start = min(added)
    late = sorted(index for index in added if index >= start and set(range(index, max(added) + 1)) <= set(added))
    first_late = late[len(late) // 2] if late else max(added) + 1
    vocabulary = {added.get(index, f"<word {index}>"): index for index in range(first_late)}
    if len(vocabulary) < first_late:
        pytest.skip("two ids of one text")
    Library(WordLevel(vocabulary, "<word 0>")).save(str(tmp_path / "tokenizer.json"))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if isinstance(files.get(name), dict):
            (tmp_path / name).write_text(json.dumps(files[name]))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer is not None
    for index, text in added.items():
        assert tokenizer.token_id(text) == index
        if values["added_tokens_decoder"][str(index)].get("special"):
            assert index in tokenizer.special_ids
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        stated = values.get(role)
        text = stated.get("content") if isinstance(stated, dict) else stated
        assert getattr(tokenizer, role) == (text or None)
        if text:
            assert tokenizer.token_id(text) == getattr(tokenizer, f"{role}_id") in tokenizer.special_ids


@pytest.mark.parametrize("stem", [stem for stem, _ in having("adapter_config.json") if stem not in ALL])
def test_adapters_are_told_from_models(stem, tmp_path):
    folder_of(stem, tmp_path)
    base = RECORDS[stem]["files"]["adapter_config.json"]["base_model_name_or_path"]
    with pytest.raises(CheckpointError, match="a PEFT adapter") as caught:
        open_checkpoint(tmp_path)
    assert (base or "not a model") in str(caught.value) and "merge_and_unload" in str(caught.value)


def test_pointers_of_git_lfs_are_named(tmp_path):
    pointers = [(stem, name) for stem, r in RECORDS.items() for name, v in r["files"].items() if isinstance(v, str)]
    assert pointers
    for stem, name in pointers:
        (tmp_path / stem).mkdir(exist_ok=True)
        with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer.*git lfs pull"):
            load_model(open_checkpoint(folder_of(stem, tmp_path / stem), {"num_hidden_layers": 1, "vocab_size": 8}))


# Sizes of the released models, by the table in the repository.
RELEASED = {
    "1B": dict(hidden_size=2048, layers=24, heads=32, kv=32, head_dim=64, width=5632, vocab=32000, theta=1e4, eos=2),
    "3B": dict(hidden_size=3072, layers=26, heads=24, kv=24, head_dim=128, width=8192, vocab=32000, theta=1e4, eos=2),
    "8B": dict(hidden_size=4096, layers=32, heads=32, kv=8, head_dim=128, width=14336, vocab=128256, theta=1e5,
               eos=128001),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS["physicslm4_recipes"]["files"])
def test_the_released_canon_models_read(name, tmp_path):
    """The trainer writes its recipe and its dataclass's other fields into params.json, the vocabulary's size among
    them."""
    recipe = RECORDS["physicslm4_recipes"]["files"][name]
    expected = next(sizes for size, sizes in RELEASED.items() if f"-{size}-" in name)
    others = RECORDS["physicslm4_linear"]["files"]["GLA5Canon-1B-Nemo-1T-lr0.002_model_lingua.json"]
    fields = {key: value for key, value in others.items() if key not in ("model_name", "mlp_type", "mamba_ssm")}
    fields |= {"canon_set": "", "vocab_size": expected["vocab"]} | recipe["model"]
    (tmp_path / "params.json").write_text(json.dumps({"model": fields, "data": recipe["data"], "steps": 10}))
    (tmp_path / "consolidated.pth").touch()
    config = open_checkpoint(tmp_path).read_config()
    mixer = config.layers[0].mixer
    assert isinstance(mixer, AttentionConfig) and mixer.rope is not None and mixer.rope.interleaved
    found = dict(
        hidden_size=config.hidden_size, layers=len(config.layers), heads=mixer.num_heads, kv=mixer.num_kv_heads,
        head_dim=mixer.head_dim, width=config.layers[0].feed_forward.intermediate_size, vocab=config.vocab_size,
        theta=mixer.rope.theta, eos=config.eos_token_ids[0],
    )  # fmt: skip
    assert found == expected
    canon = name.startswith("LlamaCanon")
    assert mixer.rope.dim == (({"1B": 16}.get(name.split("-")[1], 32)) if canon else mixer.head_dim)
    assert (mixer.canon is not None) is (config.layers[0].mixer_canon is not None) is canon
    assert (mixer.qk_norm is not None) is ("8B" not in name)
    assert config.max_position_embeddings == 4096


@pytest.mark.parametrize("name", RECORDS["physicslm4_linear"]["files"])
def test_the_linear_siblings_are_refused_by_name(name, tmp_path):
    values = RECORDS["physicslm4_linear"]["files"][name]
    if name.endswith("_lingua.json"):
        (tmp_path / "params.json").write_text(json.dumps({"model": values, "data": {"seq_len": 4096}}))
        (tmp_path / "consolidated.pth").touch()
    else:
        (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(LamellaError) as caught:
        open_checkpoint(tmp_path).read_config()
    assert repr(values.get("model_name", values.get("model_type"))) in str(caught.value)
    assert isinstance(caught.value, ConfigError) and "\n" not in str(caught.value)
