"""Llama 4 files: with or without images, experts in one tensor or separate, and shards of ranks."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4TextConfig

from helpers import hf_checkpoint, plain_logits, randomize
from lamella import LLM
from lamella.checkpoint import load_model, loader, open_checkpoint
from lamella.errors import CheckpointError, ConfigError
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition
from lamella.parity.reference_model import ReferenceModel
from lamella.parity.tested_model import ModelUnderTest

TEXT = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "intermediate_size_mlp": 40, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 3,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 8, "pad_token_id": 0, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 28,
    "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
}  # fmt: skip
EXPERTS = "model.layers.1.feed_forward.experts"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Return tensors by name, config values and model of a text checkpoint."""
    folder = tmp_path_factory.mktemp("original")
    hf_checkpoint(folder, Llama4TextConfig(**TEXT))
    values = json.loads((folder / "config.json").read_text())
    return load_file(folder / "model.safetensors"), values, load_model(open_checkpoint(folder))


def write(folder: Path, tensors, values) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def separate_experts(tensors):
    """Return the tensors with separate experts, in the row order of projections."""
    found = {}
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        if leaf not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        parts = zip(("gate_proj", "up_proj"), tensor.chunk(2, -1), strict=True)
        for part, weights in parts if leaf == "gate_up_proj" else [(leaf, tensor)]:
            found |= {f"{parent}.{index}.{part}.weight": weight.T for index, weight in enumerate(weights)}
    return found


def around(values):
    text = {key: value for key, value in values.items() if key != "architectures"}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "text_config": text,
        "vision_config": {"hidden_size": 8},
        "image_token_index": 92,
    }


def with_images(tensors):
    images = {
        "vision_model.class_embedding": torch.zeros(3),
        "multi_modal_projector.linear_1.weight": torch.zeros(2, 2),
    }
    # Of a type that no loader of ours takes: these are not read.
    images["vision_model.model.layers.0.mlp.fc1.weight"] = torch.zeros(2, dtype=torch.int8)
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()} | images


def same(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    return all(torch.equal(ours, other.state_dict()[name]) for name, ours in model.state_dict().items())


@pytest.mark.parametrize("layout", [dict, separate_experts], ids=["fused", "one by one"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_both_expert_layouts_are_equal_on_every_rank(original, layout, size, tmp_path, monkeypatch):
    tensors, values, whole = original
    checkpoint = open_checkpoint(write(tmp_path, layout(tensors), values | {"num_key_value_heads": 2}))
    monkeypatch.setattr(loader, "_PIECE_BYTES", 3000)  # pieces of a few experts, or of less than one
    parts = [load_model(checkpoint, group=Group(Partition(rank, size))) for rank in range(size)]
    if size == 1:
        assert same(parts[0], whole)
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        full, ours = whole.get_parameter(name), [part.get_parameter(name) for part in parts]
        if name.endswith("down_proj"):
            assert torch.equal(torch.cat(ours, 1), full)
        else:
            gates, ups = zip(*(part.chunk(2, -1) for part in ours), strict=True)
            assert torch.equal(torch.cat((*gates, *ups), -1), full)


@pytest.mark.parametrize("layout", [dict, separate_experts], ids=["fused", "one by one"])
def test_whole_experts_on_every_rank(original, layout, tmp_path, monkeypatch):
    """Three experts over two ranks; a rank reads only its own experts, and checks the shapes of all."""
    tensors, values, whole = original
    checkpoint = open_checkpoint(write(tmp_path, layout(tensors), values))
    monkeypatch.setattr(loader, "_PIECE_BYTES", 3000)
    parts = [load_model(checkpoint, group=Group(Partition(rank, 2)), expert_parallel=True) for rank in range(2)]
    for name in (f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"):
        ours = [part.get_parameter(name) for part in parts]
        assert [part.shape[0] for part in ours] == [2, 1]
        assert torch.equal(torch.cat(ours), whole.get_parameter(name))
    if layout is separate_experts:
        tensors = {**separate_experts(tensors), f"{EXPERTS}.2.down_proj.weight": torch.zeros(3, 3)}
        checkpoint = open_checkpoint(write(tmp_path, tensors, values))
        with pytest.raises(CheckpointError, match=r"experts\.2\.down_proj\.weight has shape \(3, 3\)"):
            load_model(checkpoint, group=Group(Partition(0, 2)), expert_parallel=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "enable_expert_parallel=True: without effect with tensor_parallel_size=1"),
        ({"tensor_parallel_size": 4}, "num_local_experts=3: must be at least tensor_parallel_size=4"),
        ({"enable_expert_parallel": 1}, "enable_expert_parallel=1: must be True or False"),
    ],
)
def test_impossible_expert_parallelism_raises(original, options, message, tmp_path):
    tensors, values, _ = original
    write(tmp_path, tensors, values)
    with pytest.raises(ConfigError, match=message):
        LLM(tmp_path, device="cpu", **({"enable_expert_parallel": True} | options))


@pytest.mark.parametrize("stripped", [False, True])
def test_language_model_of_an_image_checkpoint_is_read(original, stripped, tmp_path, caplog):
    tensors, values, whole = original
    tensors = with_images(separate_experts(tensors))
    if stripped:
        tensors = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    write(tmp_path, tensors, around(values))
    with caplog.at_level(logging.INFO, "lamella"):
        assert same(load_model(open_checkpoint(tmp_path)), whole)
    (line,) = (record.message for record in caplog.records if "not read" in record.message)
    assert "multi_modal_projector.linear_1.weight" in line


def test_image_checkpoint_written_by_transformers(tmp_path):
    config = Llama4Config(text_config=TEXT, vision_config=VISION)
    config._attn_implementation = "eager"
    model = Llama4ForConditionalGeneration(config).eval()
    randomize(model, 0)
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    ours = load_model(open_checkpoint(tmp_path))
    torch.testing.assert_close(plain_logits(ours, ids), expected, rtol=1e-4, atol=1e-4)


def test_the_reference_reads_experts_one_by_one(original, tmp_path):
    tensors, values, whole = original
    tested = ModelUnderTest.open(write(tmp_path, separate_experts(tensors), values))
    ids = list(range(3, 33))
    oracle = ReferenceModel(tested.config, tested.weights(torch.device("cpu")), torch.float32)
    torch.testing.assert_close(oracle.logits(ids), plain_logits(whole, torch.tensor(ids)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}.2.up_proj.weight"), rf"missing: {EXPERTS}\.2\.up_proj\.weight$"),
        (lambda t: t.update({f"{EXPERTS}.3.up_proj.weight": torch.zeros(24, 32)}), r"unexpected: .*\.3\.up_proj"),
        (lambda t: t.update({f"{EXPERTS}.1.down_proj.weight": torch.zeros(24, 32)}), r"has shape \(24, 32\), .*32, 24"),
        (lambda t: t.update({f"{EXPERTS}.gate_up_proj": torch.zeros(3, 32, 48)}), r"unexpected: .*experts\.0\.gate"),
        (lambda t: [t.pop(name) for name in list(t) if EXPERTS in name], rf"missing: {EXPERTS}\.down_proj, "),
        (
            lambda t: t.update({"language_model.lm_head.weight": torch.zeros(96, 32)}),
            r"are both lm_head\.weight; delete one of them$",
        ),
    ],
)
def test_misfitting_tensors_are_named(original, change, message, tmp_path):
    tensors, values, _ = original
    changed = separate_experts(tensors)
    change(changed)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(open_checkpoint(write(tmp_path, changed, values)))
    assert "\n" not in str(caught.value)


def test_override_has_precedence(original, tmp_path):
    tensors, values, _ = original
    write(tmp_path, with_images(tensors), around(values))
    overrides = {"text_config": {"attn_temperature_tuning": False}}

    def temperatures(**options):
        llm = LLM(tmp_path, device="cpu", num_blocks=8, limit_mm_per_prompt={"image": 0}, **options)
        return [layer.mixer.temperature is not None for layer in llm.engine.model.config.layers]

    assert temperatures() == [False, False, False, True]
    assert temperatures(hf_overrides=overrides) == [False] * 4
    with pytest.raises(ConfigError, match="hf_overrides='off': must be a mapping"):
        LLM(tmp_path, hf_overrides="off")
    with pytest.raises(ConfigError, match=r"text_config: unknown keys .*made_up=1"):
        LLM(tmp_path, device="cpu", hf_overrides={"text_config": {"made_up": 1}})
