"""Lingua checkpoints: loading, and exact conversion to Hugging Face files and back."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from helpers import assert_engine_parity, assert_plain_parity, canon_checkpoint, hf_checkpoint, logprobs, plain_logits
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.convert import convert
from lamella.checkpoint.lingua import read_params
from lamella.checkpoint.tensors import INDEX
from lamella.errors import CheckpointError, ConfigError
from models.canon_oracle import LINGUA, CanonReferenceModel, from_lingua_name, read_hf, read_lingua

FULL = {"qk_norm": True, "rope_dim": 8, "rope_version": "lingua"}
IDS = torch.arange(1, 61)[None]
PARAMS = {"dim": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 128}


def to_lingua_name(name: str) -> str:
    stem, leaf = name.rsplit(".", 1)
    parts = {theirs: ours for ours, theirs in LINGUA.items()}
    if not stem.startswith("model.layers."):
        return f"{parts[stem]}.{leaf}"
    _, _, index, part = stem.split(".", 3)
    return f"layers.{index}.{parts[part]}.{leaf}"


def lingua_params(values: dict) -> dict:
    """Return params.json of a model that `canon_config` describes, with further keys of training."""
    model = {
        "dim": values["hidden_size"],
        "n_layers": values["num_hidden_layers"],
        "head_dim": values["head_dim"],
        "n_heads": values["num_attention_heads"],
        "n_kv_heads": values["num_key_value_heads"],
        "hidden_dim": values["intermediate_size"],
        "ffn_dim_multiplier": None,
        "multiple_of": 256,
        "norm_eps": values["rms_norm_eps"],
        "rope_theta": values["rope_theta"],
        "init_base_std": None,
        "init_std_factor": "disabled",
        "max_seqlen": 512,
        "seed": 42,
        "vocab_size": values["vocab_size"],
        "weight_tying": values.get("tie_word_embeddings", False),
        "sliding_window": None,
        "canon_set": values["canon_set"],
        "qk_norm": values.get("qk_norm", False),
        "rope_dim": values.get("rope_dim"),
    }
    return {"name": "run", "steps": 10, "optim": {"lr": 3e-3}, "data": {"seq_len": 512}, "model": model}


def write_lingua(folder: Path, tensors: dict[str, torch.Tensor], values: dict, where: str = "default") -> Path:
    state = {to_lingua_name(name): tensor for name, tensor in tensors.items()}
    if values.get("tie_word_embeddings"):
        state["output.tied_module.weight"] = state["tok_embeddings.weight"]
    (folder / where).mkdir(parents=True)
    (folder / where / "params.json").write_text(json.dumps(lingua_params(values)))
    torch.save({"model": state}, folder / where / "consolidated.pth")
    return folder


def lingua_checkpoint(folder: Path, where: str = "default", **changes) -> Path:
    """Write a random lingua checkpoint."""
    return write_lingua(folder / "lingua", *read_hf(canon_checkpoint(folder / "hf", **changes)), where)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        "lingua": lingua_checkpoint(folder / "a", **FULL),
        "hf, lingua rotation": canon_checkpoint(folder / "b", **FULL, attention_bias=True, canon_bias=True),
        "hf": canon_checkpoint(folder / "c", qk_norm=True, tie_word_embeddings=True, num_key_value_heads=1),
        "no rotation": canon_checkpoint(folder / "d", rope_dim=0),
    }


def logits(folder: Path) -> torch.Tensor:
    return plain_logits(load_model(open_checkpoint(folder)), IDS)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edit_params(folder: Path, where: str = "default", **changes: Any) -> None:
    """Change keys of the section `model`."""
    file = folder / where / "params.json"
    params = json.loads(file.read_text())
    params["model"] |= changes
    file.write_text(json.dumps(params))


class TestLoading:
    @pytest.mark.parametrize("where", ["default", "."])
    @pytest.mark.parametrize(
        "changes", [FULL, FULL | {"tie_word_embeddings": True, "rope_dim": None}], ids=["", "tied"]
    )
    def test_parity(self, tmp_path, where, changes):
        folder = lingua_checkpoint(tmp_path, where, **changes)
        oracle = CanonReferenceModel(read_lingua(folder / where), json.loads((tmp_path / "hf/config.json").read_text()))
        assert_plain_parity(folder, oracle, (1, 5, 200))
        assert_engine_parity(folder, oracle, (1, 5, 200))

    @pytest.mark.parametrize("kernel", ["sdpa", "fmha", "flex_attention", None])
    def test_attn_impl_changes_nothing(self, tmp_path, sources, kernel):
        """The trainer's dataclass writes `attn_impl` into every file."""
        folder = shutil.copytree(sources["lingua"], tmp_path / "model")
        edit_params(folder, attn_impl=kernel, z_loss=True, max_seqlen=4096)
        assert torch.equal(logits(folder), logits(sources["lingua"]))

    @pytest.mark.parametrize("kernel", ["sdpa", "fmha", "flex_attention"])
    def test_window_applies_only_with_fmha(self, tmp_path, sources, kernel, caplog):
        folder = shutil.copytree(sources["lingua"], tmp_path / "model")
        edit_params(folder, attn_impl=kernel, sliding_window=7)
        windows = [layer.mixer.window for layer in open_checkpoint(folder).read_config().layers]
        assert windows == [7 if kernel == "fmha" else None] * 2
        assert torch.equal(logits(folder), logits(sources["lingua"])) is (kernel != "fmha")
        assert ("sliding_window=7: ignored" in caplog.text) is (kernel != "fmha")

    @pytest.mark.parametrize(
        "where", ["consolidated", "0000001000/consolidated", "checkpoints/0000001000/consolidated", "0000001000"]
    )
    def test_steps_of_the_trainer_are_found(self, tmp_path, sources, where):
        shutil.copytree(sources["lingua"] / "default", tmp_path / where)
        (tmp_path / "0000000900").mkdir(exist_ok=True)
        (tmp_path / "0000000900" / "params.json").write_text("{}")
        assert torch.equal(logits(tmp_path), logits(sources["lingua"]))

    def test_last_training_step_is_read(self, tmp_path, sources):
        for step in ("0000000900", "0000010000"):
            shutil.copytree(sources["lingua"] / "default", tmp_path / step / "consolidated")
        edit_params(tmp_path / "0000010000", "consolidated", rope_theta=5e5)
        assert open_checkpoint(tmp_path).values["rope_theta"] == 5e5

    def test_unconsolidated_step_raises(self, tmp_path):
        (tmp_path / "params.json").write_text(json.dumps({"model": PARAMS}))
        (tmp_path / "__0_0.distcp").touch()
        with pytest.raises(CheckpointError, match=r"consolidated\.pth is not: download it, or consolidate the step"):
            open_checkpoint(tmp_path)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
    def test_prefixed_names_load(self, tmp_path, sources, prefix):
        folder = shutil.copytree(sources["lingua"], tmp_path / "model")
        state = torch.load(folder / "default/consolidated.pth")["model"]
        torch.save({"model": {prefix + name: t for name, t in state.items()}}, folder / "default/consolidated.pth")
        assert torch.equal(logits(folder), logits(sources["lingua"]))

    @pytest.mark.parametrize(
        ("overrides", "key", "value"),
        [
            ({"model": {"rope_theta": 5e5}}, "rope_theta", 5e5),
            ({"model": {"made_up": None}}, "rope_theta", 1e4),
            ({"data": {"seq_len": 99}, "model": {"made_up": None}}, "max_position_embeddings", 99),
            ({"max_position_embeddings": 77, "model": {"made_up": None}}, "max_position_embeddings", 77),
        ],
    )
    def test_overrides_of_lingua_and_config_keys(self, tmp_path, sources, overrides, key, value):
        folder = shutil.copytree(sources["lingua"], tmp_path / "model")
        if "made_up" in overrides.get("model", {}):
            edit_params(folder, made_up=1)
            with pytest.raises(
                ConfigError, match=r"made_up=1; .*--hf-overrides '\{\"model\": \{\"made_up\": null\}\}'"
            ):
                open_checkpoint(folder)
        assert open_checkpoint(folder, overrides).values[key] == value

    def test_rope_pairing_matters(self, sources):
        tensors = read_lingua(sources["lingua"] / "default")
        _, values = read_hf(sources["lingua"].parent / "hf")
        half_split = CanonReferenceModel(tensors, values | {"rope_version": "huggingface"})(IDS)
        assert (logprobs(half_split) - logprobs(logits(sources["lingua"]))).abs().max() > 0.1

    def test_safetensors_are_preferred_to_lingua(self, tmp_path):
        folder = lingua_checkpoint(tmp_path)
        for name in ("config.json", "model.safetensors"):
            (folder / name).write_bytes((tmp_path / "hf" / name).read_bytes())
        assert "n_layers" not in open_checkpoint(folder).values
        assert open_checkpoint(folder).tensors.__class__.__name__ == "SafetensorsFolder"

    def test_tensors_are_named_in_errors(self, tmp_path):
        folder = lingua_checkpoint(tmp_path)
        file = folder / "default/consolidated.pth"
        state = torch.load(file, weights_only=True)["model"]
        state["layers.0.attention.canonE.weight"] = state.pop("layers.0.attention.wq.weight")
        torch.save({"model": state}, file)
        missing = "missing: layers.0.attention.wq.weight; unexpected: layers.0.attention.canonE.weight$"
        with pytest.raises(CheckpointError, match=missing):
            load_model(open_checkpoint(folder))

    @pytest.mark.parametrize("content", [{"model": {"norm.weight": 3}}, {"model": 3}, [1], torch.ones(2)], ids=str)
    def test_files_without_state_dict_raise(self, tmp_path, content):
        self.refused(tmp_path, content)

    def test_pickled_code_is_not_executed(self, tmp_path):
        mark = tmp_path / "mark"

        class Code:
            def __reduce__(self):
                return Path.touch, (mark,)

        self.refused(tmp_path, {"model": {"norm.weight": Code()}})
        assert not mark.exists()

    @pytest.mark.parametrize("content", [b"", b"not a torch file"])
    def test_files_that_are_not_torch_raise(self, tmp_path, content):
        self.refused(tmp_path, content)

    @staticmethod
    def refused(tmp_path, content):
        folder = lingua_checkpoint(tmp_path)
        file = folder / "default/consolidated.pth"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(CheckpointError) as caught:
            load_model(open_checkpoint(folder))
        assert str(caught.value).startswith(str(file))
        assert "\n" not in str(caught.value)


class TestParams:
    @staticmethod
    def read(tmp_path, params) -> dict:
        file = tmp_path / "params.json"
        file.write_text(params if isinstance(params, str) else json.dumps(params))
        return read_params(file)

    def test_missing_keys_have_linguas_defaults(self, tmp_path):
        values = self.read(tmp_path, {"model": PARAMS})
        assert values["intermediate_size"] == 256
        assert values["num_key_value_heads"] is None
        assert (values["rms_norm_eps"], values["rope_theta"], values["max_position_embeddings"]) == (1e-5, 1e4, 4096)
        assert (values["canon_set"], values["qk_norm"], values["rope_dim"]) == ("", False, None)
        assert (values["rope_version"], values["tie_word_embeddings"]) == ("lingua", False)

    @pytest.mark.parametrize("heads", [{}, {"n_kv_heads": None}, {"n_kv_heads": 4}])
    def test_without_kv_heads_there_are_as_many_as_heads(self, tmp_path, heads):
        (tmp_path / "consolidated.pth").touch()
        self.read(tmp_path, {"model": PARAMS | heads})
        assert open_checkpoint(tmp_path).read_config().layers[0].mixer.num_kv_heads == 4

    @pytest.mark.parametrize(("dim", "hidden_dim"), [(2048, 5632), (3072, 8192), (4096, 11008), (768, 2048), (96, 256)])
    def test_the_hidden_dim_rule(self, tmp_path, dim, hidden_dim):
        for stated in ({}, {"hidden_dim": None}):
            assert self.read(tmp_path, {"model": PARAMS | {"dim": dim} | stated})["intermediate_size"] == hidden_dim
        assert self.read(tmp_path, {"model": PARAMS | {"dim": dim, "hidden_dim": 100}})["intermediate_size"] == 100

    @pytest.mark.parametrize(
        ("dim", "fields", "hidden_dim"),
        [
            (768, {"multiple_of": 1}, 2048),
            (100, {"multiple_of": 1}, 266),  # 8 * 100 / 3 rounded down
            (100, {"multiple_of": 64}, 320),
            (4096, {"ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 14336),  # Llama 3 8B
            (4096, {"ffn_dim_multiplier": 1.0, "multiple_of": 256}, 11008),
            (100, {"ffn_dim_multiplier": 1.5, "multiple_of": 1}, 399),  # int(1.5 * int(8 * 100 / 3))
            (100, {"ffn_dim_multiplier": 0.5, "multiple_of": 32, "hidden_dim": None}, 160),
            (100, {"ffn_dim_multiplier": 0.5, "multiple_of": 32, "hidden_dim": 77}, 77),
        ],
    )
    def test_hidden_dim_follows_the_trainer(self, tmp_path, dim, fields, hidden_dim):
        assert self.read(tmp_path, {"model": PARAMS | {"dim": dim} | fields})["intermediate_size"] == hidden_dim

    def test_heads_follow_from_their_size(self, tmp_path):
        fields = {"n_heads": None, "head_dim": 32}
        assert self.read(tmp_path, {"model": PARAMS | fields})["num_attention_heads"] == 2
        with pytest.raises(ConfigError, match="n_heads is missing"):
            self.read(tmp_path, {"model": PARAMS | {"n_heads": None}})

    @pytest.mark.parametrize(("vocab_size", "bos", "eos"), [(128256, 128000, 128001), (32000, 1, 2)])
    def test_end_tokens_follow_the_vocabulary(self, tmp_path, vocab_size, bos, eos):
        (tmp_path / "consolidated.pth").touch()
        self.read(tmp_path, {"model": PARAMS | {"vocab_size": vocab_size}})
        config = open_checkpoint(tmp_path).read_config()
        assert (config.bos_token_id, config.eos_token_ids) == (bos, (eos,))

    @pytest.mark.parametrize(
        ("params", "match"),
        [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            ({}, "no section 'model'"),
            ({"model": {"n_layers": 2}}, "dim is missing"),
            ({"model": PARAMS | {"n_experts": 4}}, "n_experts=4"),
            ({"model": PARAMS | {"sliding_window": "64"}}, "sliding_window='64'"),
            ({"model": PARAMS | {"attn_impl": "flash3"}}, "attn_impl='flash3'"),
            ({"model": PARAMS | {"model_name": "GDN2"}}, "model_name='GDN2' is a linear model"),
            ({"model": PARAMS | {"mamba_ssm": 128}}, "mamba_ssm=128 belongs to a Mamba 2 model"),
            ({"model": PARAMS | {"state_dim": 128}}, "state_dim=128 belongs to a Mamba 2 model"),
            ({"model": PARAMS | {"n_future_head": 2}}, "n_future_head=2 belongs to"),
            ({"model": PARAMS | {"lru_dim_multiplier": 1.5}}, "lru_dim_multiplier=1.5 belongs to a Hawk model"),
            ({"model": PARAMS | {"dim": "64"}}, "dim='64'"),
            ({"model": PARAMS, "data": 3}, "data"),
        ],
    )
    def test_unusable_params(self, tmp_path, params, match):
        with pytest.raises((CheckpointError, ConfigError), match=match) as caught:
            self.read(tmp_path, params)
        assert str(tmp_path / "params.json") in str(caught.value)


SOURCES = pytest.mark.parametrize("source", ["lingua", "hf, lingua rotation", "hf", "no rotation"])


class TestConvert:
    @SOURCES
    @pytest.mark.parametrize("rope", ["keep", "huggingface", "lingua"])
    def test_converted_model_computes_equal_logits(self, sources, tmp_path, source, rope):
        before, files = logits(sources[source]), digest(sources[source])
        folder = convert(sources[source], tmp_path / "new/converted", rope)
        assert folder == tmp_path / "new/converted"
        assert digest(sources[source]) == files
        assert [path.name for path in folder.parent.iterdir()] == ["converted"]
        assert (logits(folder) - before).abs().max() <= 1e-5
        tensors, values = read_hf(folder)
        stated = open_checkpoint(sources[source]).values.get("rope_version", "huggingface")
        assert values["rope_version"] == (stated if rope == "keep" else rope)
        # Other programs can read the files: names are right, and an independent model agrees.
        assert (logprobs(CanonReferenceModel(tensors, values)(IDS)) - logprobs(before)).abs().max() <= 1e-4

    @SOURCES
    def test_round_trip_is_bit_identical(self, sources, tmp_path, source):
        kept, _ = read_hf(convert(sources[source], tmp_path / "kept"))
        stated = open_checkpoint(sources[source]).values.get("rope_version", "huggingface")
        other = "huggingface" if stated == "lingua" else "lingua"
        turned, _ = read_hf(convert(sources[source], tmp_path / "turned", other))
        back, values = read_hf(convert(tmp_path / "turned", tmp_path / "back", stated))
        assert kept.keys() == turned.keys() == back.keys()
        assert all(torch.equal(tensor, back[name]) for name, tensor in kept.items())
        assert values["rope_version"] == stated
        if source != "no rotation":
            assert not all(torch.equal(tensor, turned[name]) for name, tensor in kept.items())

    def test_lingua_tensors_get_their_hugging_face_names(self, sources, tmp_path):
        state = torch.load(sources["lingua"] / "default/consolidated.pth", weights_only=True)["model"]
        tensors, _ = read_hf(convert(sources["lingua"], tmp_path / "converted"))
        assert tensors.keys() == {from_lingua_name(name) for name in state}
        assert all(torch.equal(tensors[from_lingua_name(name)], tensor) for name, tensor in state.items())

    def test_only_query_and_key_channels_are_reordered(self, sources, tmp_path):
        """Compare with the formula; omitting any kind of tensor would change the model's results."""
        source = sources["hf, lingua rotation"]
        old, values = read_hf(source)
        new, new_values = read_hf(convert(source, tmp_path / "converted", "huggingface"))
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)])

        def moved(rows):
            return torch.cat([head[order] for head in rows.split(16)])

        heads = 16 * (values["num_attention_heads"] + values["num_key_value_heads"])
        kinds = {"q_proj", "k_proj", "q_norm", "k_norm", "canonB"}
        for name, tensor in old.items():
            kind = name.split(".")[-2]
            expected = tensor
            if kind == "canonB":
                expected = torch.cat([moved(tensor[:heads]), tensor[heads:]])
            elif kind in kinds:
                expected = moved(tensor)
            assert torch.equal(new[name], expected), name
        expected = logprobs(CanonReferenceModel(old, values)(IDS))
        assert (logprobs(CanonReferenceModel(new, new_values)(IDS)) - expected).abs().max() <= 1e-9
        for forgotten in ({"q_norm", "k_norm", "canonB"}, {"q_norm", "k_norm"}, {"canonB"}, {"bias"}, kinds | {"bias"}):
            partly = {
                name: old[name] if forgotten & set(name.split(".")[-2:]) else tensor for name, tensor in new.items()
            }
            assert (logprobs(CanonReferenceModel(partly, new_values)(IDS)) - expected).abs().max() > 0.1, forgotten

    @pytest.mark.parametrize("shard_bytes", [1, 20_000])
    def test_shards(self, sources, tmp_path, shard_bytes):
        folder = convert(sources["lingua"], tmp_path / "converted", "huggingface", shard_bytes)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        files = sorted(folder.glob("*.safetensors"))
        assert sorted(set(weight_map.values())) == [file.name for file in files]
        assert len(files) > 2
        for file in files:
            tensors = load_file(file)
            assert {name for name, place in weight_map.items() if place == file.name} == set(tensors)
            assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= shard_bytes
        assert (logits(folder) - logits(sources["lingua"])).abs().max() <= 1e-5

    def test_dtypes_and_tokenizer_are_kept(self, tmp_path):
        source = canon_checkpoint(tmp_path / "source", **FULL)
        tensors = {name: t.float() if "norm" in name else t.bfloat16() for name, t in read_hf(source)[0].items()}
        save_file(tensors, source / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "notes.txt"):
            (source / name).write_text("{}")
        folder = convert(source, tmp_path / "converted", "huggingface")
        converted, values = read_hf(folder)
        assert {name: t.dtype for name, t in converted.items()} == {name: t.dtype for name, t in tensors.items()}
        assert values["dtype"] in ("bfloat16", "float32")
        names = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
        assert {file.name for file in folder.iterdir()} == names | {"config.json", "model.safetensors"}

    @pytest.mark.parametrize("kind", ["folder", "file", "source"])
    def test_nothing_is_overwritten(self, sources, tmp_path, kind):
        source = canon_checkpoint(tmp_path / "source")
        destination = {"folder": tmp_path / "folder", "file": tmp_path / "file", "source": source}[kind]
        if kind == "folder":
            destination.mkdir()
            (destination / "precious").write_text("x")
        elif kind == "file":
            destination.write_text("x")
        before = digest(tmp_path)
        with pytest.raises(CheckpointError, match=f"^{destination}: exists already"):
            convert(source, destination)
        assert digest(tmp_path) == before

    def test_a_failure_leaves_nothing(self, tmp_path):
        source = canon_checkpoint(tmp_path / "source")
        tensors = load_file(source / "model.safetensors")
        tensors["model.norm.weight"] = torch.ones(5)  # the last to be looked at
        save_file(tensors, source / "model.safetensors")
        before = digest(tmp_path)
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(5,\)"):
            convert(source, tmp_path / "converted", shard_bytes=1)
        assert digest(tmp_path) == before
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_bad_arguments(self, sources, tmp_path):
        with pytest.raises(ConfigError, match="rope='neox': must be one of keep, huggingface, lingua"):
            convert(sources["hf"], tmp_path / "converted", "neox")
        config = LlamaConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
        )
        hf_checkpoint(tmp_path / "llama", config)
        with pytest.raises(CheckpointError, match="only GGUF files and LlamaCanon"):
            convert(tmp_path / "llama", tmp_path / "converted")
        assert not (tmp_path / "converted").exists()
