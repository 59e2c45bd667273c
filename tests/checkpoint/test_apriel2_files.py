"""Apriel2 files and supernets: every tensor is used once and every parameter filled once, or an error names it."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from apriel2_models import ATTENTION, MIXERS, SUPERNET, block, checkpoint, config, fixed
from helpers import VOCAB, plain_logits, shard
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.tensors import INDEX
from lamella.cli import main
from lamella.config import read_placement
from lamella.errors import CheckpointError, ConfigError
from lamella.models import Apriel2ForCausalLM, CausalLM

FILE = "model.safetensors"
AT = "model.decoder.blocks.1."
BIAS = {"bias": {"enabled": True}}
IDS = torch.arange(12)[None]
WIDE = ("A_log", "dt_bias", "D", "dt_proj.bias", "norm.weight")

H, INNER, V = 32, 48, VOCAB
# As the published modules have them.
AROUND = {
    "model.embed_tokens.weight": (V, H),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
}
OF_A_BLOCK = {
    "input_layernorm.weight": (H,),
    "post_attention_layernorm.weight": (H,),
    "mlp.gate_proj.weight": (INNER, H),
    "mlp.up_proj.weight": (INNER, H),
    "mlp.down_proj.weight": (H, INNER),
}
OF_ATTENTION = {
    "q_proj.weight": (64, H),
    "k_proj.weight": (32, H),
    "v_proj.weight": (32, H),
    "o_proj.weight": (H, 64),
}
OF_A_MIXER = {
    "attention": OF_ATTENTION,
    "sliding_window": OF_ATTENTION,
    "gdn": {
        "in_proj_qkvz.weight": (2 * 16 + 2 * 64, H),
        "in_proj_ba.weight": (8, H),
        "convolution.weight": (2 * 16 + 64, 1, 4),
        "A_log": (4,),
        "dt_bias": (4,),
        "norm.weight": (16,),
        "out_proj.weight": (H, 64),
    },
    "kda": {
        "q_proj.weight": (32, H),
        "k_proj.weight": (32, H),
        "v_proj.weight": (32, H),
        "o_proj.weight": (H, 32),
        "q_conv.weight": (32, 1, 4),
        "k_conv.weight": (32, 1, 4),
        "v_conv.weight": (32, 1, 4),
        "f_a_proj.weight": (16, H),
        "f_b_proj.weight": (32, 16),
        "g_a_proj.weight": (16, H),
        "g_b_proj.weight": (32, 16),
        "beta_proj.weight": (2, H),
        "A_log": (2,),
        "dt_bias": (32,),
        "norm.weight": (16,),
    },
    "mamba": {
        "in_proj.weight": (2 * 64 + 2 * 32, H),
        "dt_in_proj.weight": (4, H),
        "dt_proj.weight": (64, 4),
        "dt_proj.bias": (64,),
        "conv1d.weight": (64, 1, 4),
        "conv1d.bias": (64,),
        "A_log": (64, 8),
        "D": (64,),
        "out_proj.weight": (H, 64),
    },
}


def shapes_of_a_supernet(layers: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the published format, written by hand."""
    mixers = {f"mixer.mixers.{name}.{part}": s for name, parts in OF_A_MIXER.items() for part, s in parts.items()}
    every = OF_A_BLOCK | mixers
    return AROUND | {f"model.decoder.blocks.{i}.{name}": shape for i in range(layers) for name, shape in every.items()}


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.15 for name, shape in shapes.items()}


def write(folder: Path, values: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / FILE)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def edit(folder: Path, changes: dict[str, Tensor | None]) -> Path:
    """Replace, add, or (None) remove tensors."""
    tensors = load_file(folder / FILE) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE)
    return folder


def load(folder: Path, **options: Any) -> CausalLM:
    return load_model(open_checkpoint(folder), **options)


def refused(folder: Path, *names: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(folder))
    for name in names:
        assert name in message
    return message


@pytest.fixture(scope="module")
def supernet(tmp_path_factory) -> Path:
    shapes = shapes_of_a_supernet(2)
    return write(tmp_path_factory.mktemp("supernet"), fixed(SUPERNET), random_tensors(shapes))


@pytest.fixture
def copy(supernet, tmp_path) -> Path:
    return write(tmp_path / "copy", fixed(SUPERNET), load_file(supernet / FILE))


class TestCoverage:
    """Missing and unexpected tensors, over all kinds of mixers."""

    def test_the_published_names_and_shapes_fit(self, supernet, caplog):
        model = load(supernet)
        assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in load_file(supernet / FILE).values())
        assert caplog.records == []

    @pytest.mark.parametrize("name", sorted({*AROUND, *(name for name in shapes_of_a_supernet(2) if AT in name)}))
    def test_a_tensor_is_missing(self, copy, name):
        edit(copy, {name: None})
        advice = "; if the head is the embedding: --hf-overrides '{\"tie_word_embeddings\": true}'"
        expected = f"{copy}: tensors do not fit Apriel2ForCausalLM; missing: {name}"
        assert refused(copy) == expected + (advice if name == "lm_head.weight" else "")

    @pytest.mark.parametrize("name", sorted({*AROUND, *(name for name in shapes_of_a_supernet(2) if AT in name)}))
    def test_a_tensor_has_another_shape(self, copy, name):
        shape = load_file(copy / FILE)[name].shape
        edit(copy, {name: torch.ones(shape[0] + 1, *shape[1:])})
        found = (shape[0] + 1, *shape[1:])
        assert refused(copy) == f"{copy}: tensor {name} has shape {found}, the config says {tuple(shape)}"

    @pytest.mark.parametrize(
        "name",
        [
            "model.decoder.blocks.2.input_layernorm.weight",
            "model.decoder.blocks.9.mixer.mixers.gdn.norm.weight",
            AT + "mixer.mixers.gdn.convolution.bias",
            AT + "mixer.mixers.gdn.norm.bias",
            AT + "mixer.mixers.kda.f_b_proj.bias",
            AT + "mixer.mixers.mamba.out_proj.bias",
            AT + "mixer.q_proj.weight",
            AT + "mlp.gate_proj.bias",
            "model.layers.0.input_layernorm.weight",
            "model.vision.weight",
            "score.weight",
        ],
    )
    def test_a_tensor_is_left_over(self, copy, name):
        edit(copy, {name: torch.ones(4)})
        assert refused(copy) == f"{copy}: tensors do not fit Apriel2ForCausalLM; unexpected: {name}"

    def test_pruned_mixers_in_the_files_are_not_read(self, copy, caplog):
        before = plain_logits(load(copy), IDS)
        gone = {AT + f"mixer.mixers.{name}.o_proj.weight": torch.ones(4) for name in ("rwkv", "gone")}
        edit(copy, gone)
        with caplog.at_level(logging.INFO, "lamella"):
            assert torch.equal(plain_logits(load(copy), IDS), before)
        said = [r.message for r in caplog.records if "no longer has" in r.message]
        assert said == [
            f"{copy}: 2 tensors of parts that the config no longer has are not read: {', '.join(sorted(gone))}"
        ]

    def test_all_misfitting_tensors_are_named(self, copy):
        edit(copy, {AT + "mixer.mixers.gdn.A_log": None, "model.norm.weight": None, "extra": torch.ones(1)})
        refused(copy, f"missing: {AT}mixer.mixers.gdn.A_log, model.norm.weight", "unexpected: extra")

    def test_older_shape_of_kimi_decay_rates_is_named(self, copy):
        name = AT + "mixer.mixers.kda.A_log"
        edit(copy, {name: torch.ones(1, 1, 2, 1)})
        assert refused(copy) == f"{copy}: tensor {name} has shape (1, 1, 2, 1), the config says (2,)"

    def test_every_tensor_changes_the_result(self, supernet, copy):
        """A change of any tensor of a mixer changes the output of this mixer only."""
        before = {name: self.logits(supernet, name) for name in MIXERS}
        for name, parts in OF_A_MIXER.items():
            for part in parts:
                tensor = f"{AT}mixer.mixers.{name}.{part}"
                original = load_file(copy / FILE)[tensor]
                edit(copy, {tensor: original + 0.3})
                assert (self.logits(copy, name) - before[name]).abs().max() > 1e-6, tensor
                edit(copy, {tensor: original})
        other = {f"{AT}mixer.mixers.kda.{part}": torch.ones(shape) for part, shape in OF_A_MIXER["kda"].items()}
        edit(copy, other)
        for name in MIXERS:
            assert torch.equal(self.logits(copy, name), before[name]) is (name != "kda")

    @staticmethod
    @torch.no_grad()
    def logits(folder: Path, mixer: str) -> Tensor:
        model = load(folder, dtype="float32")
        model.set_placement(f"all-{mixer}")
        return plain_logits(model, IDS)


class TestBiases:
    @pytest.mark.parametrize("present", ["q", "k", "v", "qv", "kv", "qkv"])
    def test_missing_bias_equals_zero_bias(self, tmp_path, present, caplog):
        """A missing bias equals a zero bias, with and without a statement in the config."""
        heads = {"q": 64, "k": 32, "v": 32}
        folder = checkpoint(tmp_path / "plain", fixed(ATTENTION))
        tensors = load_file(folder / FILE)
        biases = {
            f"model.decoder.blocks.{i}.mixer.{name}_proj.bias": torch.randn(heads[name])
            for i in (0, 1)
            for name in "qkv"
        }
        some = {name: value for name, value in biases.items() if name[-11] in present}
        assert len(some) == 2 * len(present)
        every = {name: value if name in some else torch.zeros_like(value) for name, value in biases.items()}
        stated = ATTENTION | {
            layer: BIAS for name, layer in zip("qkv", ("query_layer", "key_layer", "value_layer"), strict=True)
            if name in present
        }  # fmt: skip
        full = load(write(tmp_path / "full", fixed(ATTENTION), tensors | every))
        quiet = load(write(tmp_path / "stated", fixed(stated), tensors | some))
        assert len(caplog.records) == 3
        loud = load(write(tmp_path / "silent", fixed(ATTENTION), tensors | some))
        assert len(caplog.records) == 3 + len(present)
        expected = plain_logits(full, IDS)
        assert torch.equal(plain_logits(quiet, IDS), expected) and torch.equal(plain_logits(loud, IDS), expected)
        assert (plain_logits(load(folder), IDS) - expected).abs().max() > 1e-3

    def test_dummy_weights_do_not_keep_a_loaded_bias(self, tmp_path):
        """Biases of a model with dummy weights follow the files, if there are any, else the config."""
        values = fixed(ATTENTION | {"query_layer": BIAS})
        (tmp_path / "config.json").write_text(json.dumps(values))
        model = load(tmp_path, load_format="dummy")
        bias = model.model.layers[0].mixer.qkv_proj.bias
        assert bias is not None and torch.equal(bias[64:], torch.zeros(64))


class TestHead:
    def test_tied(self, tmp_path):
        values = fixed(MIXERS["gdn"]) | {"tie_word_embeddings": True}
        folder = checkpoint(tmp_path, values)
        assert "lm_head.weight" not in load_file(folder / FILE)
        model = load(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_untied_head_in_the_files_is_used_despite_the_config(self, tmp_path, caplog):
        folder = checkpoint(tmp_path, fixed(MIXERS["gdn"]) | {"tie_word_embeddings": True})
        edit(folder, {"lm_head.weight": torch.ones(VOCAB, 32)})
        assert torch.equal(load(folder).lm_head.weight, torch.ones(VOCAB, 32))
        assert "lm_head.weight differs from the embedding: the files' own head is used" in caplog.text

    def test_missing_untied_head_raises(self, tmp_path):
        folder = checkpoint(tmp_path, fixed(MIXERS["gdn"]) | {"tie_word_embeddings": True})
        (folder / "config.json").write_text(json.dumps(fixed(MIXERS["gdn"])))
        refused(folder, "missing: lm_head.weight")


class TestVision:
    VALUES = config(fixed(MIXERS["gdn"])["decoder"], vision_encoder={"hidden_size": 8}, image_token_index=5) | {
        "architectures": ["Apriel2ForConditionalGeneration"],
        "model_type": "apriel2",
    }

    def test_vision_tensors_are_not_read(self, tmp_path, caplog):
        """Vision tensors can have an unsupported dtype, any shape, and NaN values."""
        folder = checkpoint(tmp_path, self.VALUES)
        before = plain_logits(load(folder), IDS)
        garbage = {
            "model.vision_encoder.adapter.linear_1.weight": torch.full((3, 5), torch.nan),
            "model.vision_encoder.embeddings.patch_embeddings.weight": torch.zeros(2, 3, 4, 4, dtype=torch.int8),
            "model.vision_encoder.encoder.blocks.0.mixer.q_proj.weight": torch.ones(1, dtype=torch.float8_e4m3fn),
        }
        edit(folder, garbage)
        with caplog.at_level(logging.INFO, "lamella"):
            assert torch.equal(plain_logits(load(folder), IDS), before)
        said = [record for record in caplog.records if "not read" in record.message]
        assert [record.levelno for record in said] == [logging.INFO]
        listed = ", ".join(sorted(garbage))
        assert said[0].message == f"{folder}: not read for the language model: {listed}"

    def test_vision_bytes_are_not_read(self, tmp_path, monkeypatch):
        folder = edit(checkpoint(tmp_path, self.VALUES), {"model.vision_encoder.adapter.bias": torch.ones(4)})
        opened = open_checkpoint(folder)
        loaded = []
        with opened.tensors.opened() as tensors:
            read = type(tensors).load
            monkeypatch.setattr(
                type(tensors), "load", lambda self, name, *a: loaded.append(name) or read(self, name, *a)
            )
        load_model(opened, dtype="float32")
        assert len(loaded) == len(load_file(folder / FILE)) - 1
        assert not any("vision" in name for name in loaded)

    def test_only_the_full_vision_prefix_is_skipped(self, tmp_path):
        folder = edit(checkpoint(tmp_path, self.VALUES), {"model.vision_encoder_norm.weight": torch.ones(4)})
        refused(folder, "unexpected: model.vision_encoder_norm.weight")


class TestShards:
    def test_shards_equal_one_file(self, supernet, copy):
        shard(copy)
        for mixer in MIXERS:
            assert torch.equal(TestCoverage.logits(copy, mixer), TestCoverage.logits(supernet, mixer))

    def test_biases_are_found_in_all_shards(self, tmp_path, caplog):
        values = fixed(ATTENTION | {"add_linear_biases": True})
        folder = checkpoint(tmp_path, values)
        shard(folder)
        assert load(folder).model.layers[1].mixer.qkv_proj.bias is not None
        assert caplog.records == []

    def test_missing_shard_raises(self, copy):
        shard(copy)
        (copy / "model-00002-of-00003.safetensors").unlink()
        refused(copy, INDEX, "model-00002-of-00003.safetensors")


class TestDtypes:
    """Decay rates and scales stay in fp32 for every dtype of the model."""

    ODD = 1.0 + 2.0**-20  # which bf16 cannot hold

    @pytest.mark.parametrize("name", MIXERS)
    def test_fp32_values_survive_a_bf16_model(self, tmp_path, name):
        folder = checkpoint(tmp_path, fixed(MIXERS[name]) | {"torch_dtype": "bfloat16"})
        tensors = {
            key: torch.full_like(value, self.ODD) if key.endswith(WIDE) else value.bfloat16()
            for key, value in load_file(folder / FILE).items()
        }
        save_file(tensors, folder / FILE)
        model = load(folder)
        fp32 = {key: p for key, p in model.named_parameters() if p.dtype == torch.float32}
        assert {key.rpartition("mixer.")[2] for key in fp32 if ".mixer." in key} == {
            "attention": set(),
            "sliding_window": set(),
            "gdn": {"A_log", "dt_bias", "norm.weight"},
            "kda": {"A_log", "dt_bias", "norm.weight"},
            "mamba": {"A_log", "D", "step_bias"},
        }[name]
        assert sum("norm" in key for key in fp32) == 1 + 2 * 2 + 2 * (name in ("gdn", "kda"))
        assert all(torch.equal(p, torch.full_like(p, self.ODD)) for p in fp32.values())
        assert torch.tensor(self.ODD).bfloat16().float() != self.ODD
        assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
        assert plain_logits(model, IDS).isfinite().all()

    def test_bf16_files_in_an_fp32_model(self, tmp_path):
        folder = checkpoint(tmp_path, fixed(SUPERNET))
        rounded = {key: value.bfloat16() for key, value in load_file(folder / FILE).items()}
        save_file(rounded, folder / FILE)
        model = load(folder, dtype="float32")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        a_log = rounded["model.decoder.blocks.1.mixer.mixers.gdn.A_log"]
        assert torch.equal(model.model.layers[1].mixer.mixers["gdn"].A_log, a_log.float())

    def test_dtype_of_the_largest_tensor_is_used(self, tmp_path):
        """Without a dtype in the config: a few fp32 tensors do not make the model fp32."""
        folder = checkpoint(tmp_path, fixed(SUPERNET) | {"tie_word_embeddings": True})
        mixed = {k: v if k.endswith(WIDE) else v.bfloat16() for k, v in load_file(folder / FILE).items()}
        save_file(mixed, folder / FILE)
        assert load(folder).model.embed_tokens.weight.dtype == torch.bfloat16


TILED = config(
    {
        "type": "pattern",
        "num_blocks": 5,
        "pattern": ["super", "plain"],
        "blocks": {"super": block(SUPERNET), "plain": block(MIXERS["kda"])},
    },
    vision_encoder={"hidden_size": 8},
    auto_map={"AutoConfig": "configuration_apriel2.Apriel2TextConfig"},
    torch_dtype="float32",
    transformers_version="4.57.3",
)


def served(folder: Path, **options: Any) -> list[int]:
    llm = LLM(folder, device="cpu", max_num_seqs=2, num_blocks=32, **options)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    return llm.generate({"prompt_token_ids": list(range(9))}, params, use_tqdm=False)[0].outputs[0].token_ids


class TestPlacements:
    @pytest.fixture
    def tiled(self, tmp_path) -> Path:
        return checkpoint(tmp_path / "tiled", TILED)

    def test_set_placement_of_a_tiled_supernet(self, tiled):
        """Layers 0, 2 and 4 have a choice; 1 and 3 are plain."""
        model = load(tiled)
        assert model.placement == ("attention", None, "attention", None, "attention")
        model.set_placement("gdn,mamba,swa")
        assert model.placement == ("gdn", None, "mamba", None, "sliding_window")

    @pytest.mark.parametrize("placement", ["all-gdn", "gdn,mamba,swa", "every2nd-kda", "attn,attn,gdn", "all-attn"])
    def test_set_placement_changes_nothing_else(self, tiled, placement, capsys):
        before = json.loads((tiled / "config.json").read_text())
        old = open_checkpoint(tiled).read_config()
        weights = (tiled / FILE).read_bytes()
        expected = served(tiled, placement=placement)
        assert main(["placement", "set", str(tiled), placement]) == 0
        assert capsys.readouterr().err == ""
        after = json.loads((tiled / "config.json").read_text())
        assert {key: value for key, value in after.items() if key != "decoder"} == {
            key: value for key, value in before.items() if key != "decoder"
        }
        assert list(after) == list(before)
        assert (tiled / FILE).read_bytes() == weights
        new = open_checkpoint(tiled).read_config()
        assert read_placement(None, new) == read_placement(placement, old)
        assert served(tiled) == expected
        # But for which is the main one, nothing is new.
        for was, now in zip(old.layers, new.layers, strict=True):
            mixers = getattr(was.mixer, "mixers", was.mixer), getattr(now.mixer, "mixers", now.mixer)
            assert mixers[0] == mixers[1] and (was.norm, was.feed_forward) == (now.norm, now.feed_forward)
        # And back: the same model as at first.
        assert main(["placement", "set", str(tiled), "all-attention"]) == 0
        assert open_checkpoint(tiled).read_config() == old

    def test_set_uniform_placement_of_a_fixed_decoder(self):
        values = fixed(SUPERNET | {"sampling_strategy": "full_layout"}, layers=3)
        written = Apriel2ForCausalLM.with_placement(values, ("kda", "kda", "kda"))
        assert written == fixed(SUPERNET | {"sampling_strategy": "full_layout", "main_mixer_name": "kda"}, layers=3)
        assert values == fixed(SUPERNET | {"sampling_strategy": "full_layout"}, layers=3)

    @pytest.mark.parametrize("kind", ["null", "missing", "fixed"])
    def test_set_placement_of_all_forms_of_fixed_decoders(self, tmp_path, kind):
        values = fixed(SUPERNET, layers=2)
        values["decoder"] |= {"type": None} if kind == "null" else {}
        if kind == "missing":
            del values["decoder"]["type"]
        folder = checkpoint(tmp_path, values)
        assert main(["placement", "set", str(folder), "gdn,kda"]) == 0
        assert load(folder).placement == ("gdn", "kda")

    def test_generated_block_names_do_not_collide(self, tmp_path):
        """A plain block "a_gdn" beside a supernet's block "a", whose placement becomes gdn."""
        blocks = {"a": block(SUPERNET), "a_gdn": block(MIXERS["mamba"])}
        decoder = {"type": "pattern", "num_blocks": 4, "pattern": ["a", "a_gdn"], "blocks": blocks}
        folder = checkpoint(tmp_path, config(decoder))
        assert main(["placement", "set", str(folder), "gdn,kda"]) == 0
        model = load(folder)
        assert model.placement == ("gdn", None, "kda", None)
        assert model.config.layers[1] == model.config.layers[3] == open_checkpoint(folder).read_config().layers[1]
        assert not hasattr(model.config.layers[1].mixer, "mixers")

    def test_placement_with_dummy_weights(self, tmp_path):
        """Without weight files; a bad placement raises before anything is allocated."""
        (tmp_path / "config.json").write_text(json.dumps(TILED))
        assert len(served(tmp_path, load_format="dummy", placement="gdn,mamba,swa")) == 6
        with pytest.raises(ConfigError, match="layer 0 has no mixer 'rwkv'"):
            LLM(tmp_path, device="cpu", load_format="dummy", placement="all-rwkv")


def test_truncated_file_is_named(copy):
    """Only the header shows that the file is truncated; the error names the file."""
    file = copy / FILE
    (size,) = struct.unpack("<Q", file.read_bytes()[:8])
    file.write_bytes(file.read_bytes()[: 8 + size + 100])
    with pytest.raises(CheckpointError) as caught:
        load(copy)
    assert str(caught.value).startswith(f"{file}: not a readable safetensors file") and "\n" not in str(caught.value)
