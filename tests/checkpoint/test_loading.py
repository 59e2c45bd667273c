"""Loading: every tensor is read once, every parameter filled once, and errors name what does not fit."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, Qwen3Config

from helpers import VOCAB, canon_checkpoint, canon_config, hf_checkpoint, plain_logits, shard, write_index
from lamella import LLM
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.loader import fill
from lamella.checkpoint.tensors import INDEX
from lamella.errors import CheckpointError, ConfigError
from lamella.layers.local_kit import LocalKit

SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
Q, LAST = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Return a checkpoint of each family: folder and, except for canon, the transformers model."""
    folder = tmp_path_factory.mktemp("originals")
    tied = LlamaConfig(**SHAPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
    models = {
        "llama": hf_checkpoint(folder / "llama", LlamaConfig(**SHAPE)),
        "tied": hf_checkpoint(folder / "tied", tied),
        "qwen3": hf_checkpoint(folder / "qwen3", Qwen3Config(**SHAPE, attention_bias=True)),
        "canon": None,
    }
    canon_checkpoint(folder / "canon", qk_norm=True, canon_bias=True)
    return folder, models


@pytest.fixture
def edit(originals, tmp_path):
    """Return a function that copies a checkpoint with tensors replaced, added, or (None) removed."""

    def edited(family, changes=(), config=()):
        folder = tmp_path / family
        shutil.copytree(originals[0] / family, folder)
        tensors = load_file(folder / "model.safetensors") | dict(changes)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(tensors, folder / "model.safetensors")
        values = json.loads((folder / "config.json").read_text()) | dict(config)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return edited


def refused(folder, *names: str, error=CheckpointError):
    with pytest.raises(error) as caught:
        load_model(open_checkpoint(folder))
    message = str(caught.value)
    assert "\n" not in message
    for name in names:
        assert name in message


@pytest.mark.parametrize("family", ["llama", "tied", "qwen3"])
@pytest.mark.parametrize("sharded", [False, True])
def test_one_file_or_many(originals, edit, family, sharded):
    folder, theirs = edit(family), originals[1][family]
    if sharded:
        shard(folder)
    ids = torch.arange(40)[None]
    ours = load_model(open_checkpoint(folder))
    torch.testing.assert_close(plain_logits(ours, ids), theirs(ids).logits.detach(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "tied", "qwen3", "canon"])
def test_each_tensor_is_read_once_and_each_parameter_filled_once(originals, family):
    checkpoint = open_checkpoint(originals[0] / family)
    model = checkpoint.allocate(checkpoint.read_config(), LocalKit())
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    reads = []

    class Counted:
        def __init__(self, tensors):
            self.names, self.shape, self._load = tensors.names, tensors.shape, tensors.load

        def load(self, name, splits=()):
            reads.append(name)
            # Filled before means read into twice: nothing of this tensor's share may hold numbers yet.
            missing.append(sum(int(p.isnan().sum()) for p in model.parameters()))
            return self._load(name, splits)

    missing = []
    with checkpoint.tensors.opened() as tensors:
        names = tensors.names()
        sizes = {name: tensors.load(name).numel() for name in names}
        fill(model, checkpoint, Counted(tensors))
    assert sorted(reads) == sorted(names)
    left = sum(parameter.numel() for parameter in model.parameters())
    for name, before in zip(reads, missing, strict=True):
        assert before == left
        left -= sizes[name]
    assert left == 0
    assert not any(parameter.isnan().any() for parameter in model.parameters())


@pytest.mark.parametrize("family", ["llama", "qwen3", "canon"])
def test_missing_and_unexpected_tensors_are_listed(edit, family):
    refused(
        edit(family, {Q: None, LAST: None, "extra.weight": torch.ones(2)}), Q, LAST, "missing", "unexpected", "extra"
    )


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.layers.0.self_attn.q_proj.bias"),
        ("llama", "model.layers.2.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.self_attn.q_norm.weight"),
        ("llama", "model.layers.0.mlp.canonD.weight"),
        ("llama", "layers.0.self_attn.q_proj.weight"),
        ("llama", "model.layers.0.self_attn.qkv_proj.weight"),
        ("llama", "rotary_emb.inv_freqs"),
        ("canon", "model.layers.0.canonE.weight"),
    ],
)
def test_unexpected_tensors(edit, family, name):
    refused(edit(family, {name: torch.ones(32)}), f"unexpected: {name}")


@pytest.mark.parametrize(
    "name", [Q, LAST, "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.up_proj.weight"]
)
@pytest.mark.parametrize("shape", [(33, 32), (31,), (1, 32, 32), ()])
def test_wrong_shapes(edit, name, shape):
    refused(edit("llama", {name: torch.ones(shape)}), name, str(shape))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_tensors_that_are_not_floats(edit, dtype):
    refused(edit("llama", {Q: torch.ones(32, 32).to(dtype)}), Q, str(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tensors_of_another_float_dtype_are_converted(originals, edit, dtype):
    value = load_file(originals[0] / "llama/model.safetensors")[Q].to(dtype)
    model = load_model(open_checkpoint(edit("llama", {Q: value})))
    assert torch.equal(model.model.layers[0].mixer.qkv_proj.weight[:32], value.float())


class TestTiedHead:
    def test_equal_copy_of_a_tied_head_is_accepted(self, edit, caplog):
        folder = edit("tied")
        embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        save_file(
            load_file(folder / "model.safetensors") | {"lm_head.weight": embedding.clone()},
            folder / "model.safetensors",
        )
        with caplog.at_level(logging.WARNING, logger="lamella"):
            model = load_model(open_checkpoint(folder))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert not caplog.records

    def test_untied_head_in_the_files_is_used_despite_the_config(self, edit, caplog):
        folder = edit("tied", {"lm_head.weight": torch.ones(VOCAB, 32)})
        with caplog.at_level(logging.WARNING, logger="lamella"):
            model = load_model(open_checkpoint(folder))
        assert torch.equal(model.lm_head.weight, torch.ones(VOCAB, 32))
        assert not torch.equal(model.model.embed_tokens.weight, model.lm_head.weight)
        (record,) = caplog.records
        assert "lm_head.weight differs from the embedding: the files' own head is used" in record.message

    def test_one_different_row_unties_the_head(self, edit):
        folder = edit("tied")
        head = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": head}
        save_file(tensors, folder / "model.safetensors")
        assert torch.equal(load_model(open_checkpoint(folder)).lm_head.weight, head)

    def test_an_untied_head_is_needed(self, edit):
        refused(edit("tied", config={"tie_word_embeddings": False}), "missing: lm_head.weight")


def test_rotary_tables_are_ignored(edit):
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)] + ["model.rotary_emb.inv_freq"]
    load_model(open_checkpoint(edit("llama", {name: torch.ones(4) for name in names})))


class TestFiles:
    def test_an_indexed_file_is_missing(self, edit):
        folder = edit("llama")
        shard(folder)
        (folder / "model-00002-of-00003.safetensors").unlink()
        refused(folder, str(folder), INDEX, "model-00002-of-00003.safetensors")

    def test_an_indexed_tensor_is_missing(self, edit):
        folder = edit("llama")
        weight_map = shard(folder)
        write_index(folder, weight_map | {"model.ghost.weight": weight_map[Q]})
        refused(folder, INDEX, "model.ghost.weight")

    @pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
    def test_a_broken_index(self, edit, text):
        folder = edit("llama")
        (folder / INDEX).write_text(text)
        refused(folder, str(folder / INDEX))

    def test_files_beside_the_index_are_not_read(self, edit):
        folder = edit("llama")
        shard(folder)
        (folder / "consolidated.safetensors").write_bytes(b"another format")
        load_model(open_checkpoint(folder))

    def test_tensor_in_two_files_raises(self, edit):
        folder = edit("llama")
        (folder / "model.safetensors").rename(folder / "all.safetensors")
        save_file({Q: torch.ones(32, 32)}, folder / "more.safetensors")
        refused(folder, Q, "more.safetensors", "delete one of them")

    @pytest.mark.parametrize("content", [b"", b"not safetensors", None])
    def test_a_corrupt_file(self, edit, content):
        folder = edit("llama")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100] if content is None else content)
        refused(folder, str(file), "not a readable safetensors file")

    def test_no_weights(self, edit):
        folder = edit("llama")
        (folder / "model.safetensors").unlink()
        refused(folder, str(folder), "no weights there")


class TestFolders:
    def test_no_such_folder(self, tmp_path):
        refused(tmp_path / "absent", str(tmp_path / "absent"))

    def test_path_of_a_file_raises(self, originals):
        refused(originals[0] / "llama/config.json", "config.json", "no such folder")

    def test_no_config(self, tmp_path):
        refused(tmp_path, str(tmp_path), "config.json")

    @pytest.mark.parametrize("text", ["", "{", "[1]", "null", '"llama"'])
    def test_a_broken_config(self, edit, text):
        folder = edit("llama")
        (folder / "config.json").write_text(text)
        refused(folder, str(folder / "config.json"))

    @pytest.mark.parametrize("changes", [{"architectures": []}, {"architectures": None}])
    def test_model_type_replaces_missing_architectures(self, edit, changes):
        load_model(open_checkpoint(edit("llama", config=changes)))

    @pytest.mark.parametrize("changes", [{"architectures": "LlamaForCausalLM"}, {"architectures": [3]}])
    def test_bad_architectures_raise(self, edit, changes):
        refused(edit("llama", config=changes), "architectures")

    def test_neither_architectures_nor_model_type(self, edit):
        refused(edit("llama", config={"architectures": None, "model_type": None}), "architectures")

    def test_an_unknown_architecture(self, edit):
        refused(edit("llama", config={"architectures": ["GPT2LMHeadModel"]}), "GPT2LMHeadModel", error=ConfigError)

    def test_end_tokens_of_the_generation_config_are_added(self, edit):
        folder = edit("llama", config={"eos_token_id": [5, 6]})
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [6, 7], "temperature": 0.6}))
        checkpoint = open_checkpoint(folder)
        assert checkpoint.eos_token_ids(checkpoint.read_config()) == (5, 6, 7)


class TestOptions:
    def test_dummy_weights_are_seeded_and_need_no_file(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(canon_config(canon_bias=True)))
        states = [
            load_model(open_checkpoint(tmp_path), load_format="dummy", seed=seed).state_dict() for seed in (1, 1, 2)
        ]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        name = "model.layers.0.mixer.qkv_proj.weight"
        assert not torch.equal(states[0][name], states[2][name])
        prompts = [{"prompt_token_ids": [1, 2, 3]}]
        texts = [
            LLM(tmp_path, device="cpu", load_format="dummy", seed=7).generate(prompts, use_tqdm=False) for _ in range(2)
        ]
        assert texts[0][0].outputs == texts[1][0].outputs

    @pytest.mark.parametrize(
        ("dtype", "stated", "expected"),
        [
            ("auto", "bfloat16", torch.bfloat16),
            ("auto", "torch.float16", torch.float16),
            ("auto", None, torch.float32),  # dtype in the file
            ("float32", "bfloat16", torch.float32),
            ("half", "float32", torch.float16),
            (torch.bfloat16, "float32", torch.bfloat16),
        ],
    )
    @pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
    def test_dtypes(self, edit, key, dtype, stated, expected):
        folder = edit("llama", config={"dtype": None, "torch_dtype": None} | {key: stated})
        model = load_model(open_checkpoint(folder), dtype=dtype)
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if "norm" in name else expected)

    @pytest.mark.parametrize("dtype", ["float8", "int8", torch.int8, torch.float64, ""])
    def test_bad_dtypes_raise(self, originals, dtype):
        with pytest.raises(ConfigError, match=r"dtype=.* must be"):
            load_model(open_checkpoint(originals[0] / "llama"), dtype=dtype)

    def test_bad_dtype_in_config_raises(self, edit):
        refused(edit("llama", config={"dtype": "float8_e4m3fn"}), "float8_e4m3fn", error=ConfigError)

    def test_bad_load_format_raises(self, originals):
        with pytest.raises(ConfigError, match="load_format='pickle': must be one of auto, dummy"):
            load_model(open_checkpoint(originals[0] / "llama"), load_format="pickle")

    def test_loaded_model_has_no_gradients(self, originals):
        model = load_model(open_checkpoint(originals[0] / "llama"))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["sparse", "nested", "quantized", "meta"])
def test_torch_files_with_other_than_dense_tensors_are_one_line(tmp_path, kind):
    dense = torch.ones(4, 4)
    match kind:
        case "sparse":
            tensor = dense.to_sparse()
        case "nested":
            tensor = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
        case "quantized":
            tensor = torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8)
        case _:
            tensor = dense.to("meta")
    canon_checkpoint(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": tensor}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.weight is not a dense tensor|not a readable"):
        load_model(open_checkpoint(tmp_path / "model"))
