"""Registry of architectures: built-in names, aliases, and architectures of other packages."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

import lamella
from helpers import canon_config, greedy, plain_logits, random_prompts, randomize, save_lamella
from lamella import LLM, SamplingParams
from lamella.config import AttentionConfig, CanonConfig, LayerConfig, MLPConfig, NormConfig, RopeConfig
from lamella.config.hf_layers import read_model
from lamella.errors import ConfigError
from lamella.models import (
    Architecture,
    CausalLM,
    LlamaForCausalLM,
    architectures,
    register_architecture,
    registry,
    resolve_architecture,
)

pytestmark = pytest.mark.unit

BUILT_IN = [
    "Apriel2ForCausalLM",
    "Apriel2ForConditionalGeneration",
    "Llama4ForCausalLM",
    "Llama4ForConditionalGeneration",
    "LlamaCanonForCausalLM",
    "LlamaForCausalLM",
    "Qwen3ForCausalLM",
]
VALUES = {"vocab_size": 128, "hidden_size": 32, "depth": 3, "architectures": ["StripesForCausalLM"]}


class StripesForCausalLM(CausalLM):
    """Model whose layers all differ, with its own checkpoint names."""

    checkpoint_names = {"mixer": "mix", "feed_forward": "ffn", "qkv_proj": "in"}  # noqa: RUF012

    @classmethod
    def read_config(cls, config):
        norm = NormConfig(eps=1e-5)

        def layer(index):
            canon = CanonConfig(kernel=index + 2)
            attention = AttentionConfig(
                num_heads=4,
                num_kv_heads=2**index,
                head_dim=16,
                scale=0.2,
                window=(None, 7, 20)[index],
                rope=(None, RopeConfig(dim=8), RopeConfig(dim=16, interleaved=True))[index],
                canon=canon,
            )
            return LayerConfig(
                mixer=attention,
                feed_forward=MLPConfig(intermediate_size=16 * (index + 1), canon=canon if index else None),
                norm=norm,
            )

        return read_model(config, "StripesForCausalLM", map(layer, range(config.int("depth"))), norm.eps, 512)


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Undo registrations after the test, and install only the test's entry points."""
    monkeypatch.setattr(registry, "_targets", dict(registry._targets))
    monkeypatch.setattr(registry, "_aliases", dict(registry._aliases))
    monkeypatch.setattr(registry, "entry_points", lambda group: [])


@pytest.mark.parametrize("name", [*BUILT_IN, "llama", "qwen3", "LlamaCanon"])
def test_names_and_aliases(name):
    cls = resolve_architecture(name)
    assert cls.__name__.lower().startswith(name.lower().removesuffix("forconditionalgeneration"))
    assert cls.__name__ in BUILT_IN


def test_unknown_names_list_what_there_is():
    with pytest.raises(
        ConfigError, match=f"'GPT2LMHeadModel' is not known; there are: {', '.join(BUILT_IN)}; to add one"
    ):
        resolve_architecture("GPT2LMHeadModel")


def test_an_architecture_from_outside_runs(tmp_path):
    lamella.register_architecture("StripesForCausalLM", StripesForCausalLM, aliases=("stripes",))
    assert resolve_architecture("stripes") is StripesForCausalLM
    assert architectures() == [*BUILT_IN, "StripesForCausalLM"]
    model = StripesForCausalLM.from_config(VALUES)
    randomize(model, 0)
    llm = LLM(save_lamella(model, VALUES, tmp_path), device="cpu", max_num_batched_tokens=16, max_num_seqs=2)
    prompts = random_prompts([1, 9, 60])
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = greedy(lambda ids: plain_logits(model, ids), prompt["prompt_token_ids"], 10)
        assert output.outputs[0].token_ids == expected


def test_an_architecture_needs_only_a_description(tmp_path):
    """The engine must need neither a class nor its attributes."""
    description = Architecture(
        "StripesForCausalLM", StripesForCausalLM.read_config, checkpoint_names=StripesForCausalLM.checkpoint_names
    )
    register_architecture("StripesForCausalLM", description, aliases=("stripes",))
    assert registry.find_architecture("stripes") is description
    cls = resolve_architecture("stripes")
    assert cls is resolve_architecture("StripesForCausalLM") and issubclass(cls, CausalLM)
    assert (cls.__name__, cls.checkpoint_names) == ("StripesForCausalLM", description.checkpoint_names)
    model = cls.from_config(VALUES)
    randomize(model, 0)
    folder = save_lamella(model, VALUES, tmp_path)
    llm = LLM(folder, device="cpu", max_num_batched_tokens=16)
    assert type(llm.engine.model) is cls
    (prompt,) = random_prompts([30])
    (output,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=6), use_tqdm=False)
    expected = greedy(lambda ids: plain_logits(model, ids), prompt["prompt_token_ids"], 6)
    assert output.outputs[0].token_ids == expected
    assert isinstance(cls.from_pretrained(folder), cls)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_class_has_the_attributes_of_its_description(name):
    cls, description = resolve_architecture(name), registry.find_architecture(name)
    assert cls.description is description and cls.__name__ == description.name
    assert cls.checkpoint_names is description.checkpoint_names
    assert cls.packed_modules_mapping is description.packed_modules
    assert (cls.outer_prefix, cls.has_slot_state) == (description.outer_prefix, description.has_slot_state)
    assert cls.read_config is description.read_config and cls.own_name is description.own_name


def test_a_class_without_a_description_is_described_by_its_attributes():
    class Fewer(StripesForCausalLM):
        outer_prefix, has_slot_state = "inner.", False

        @classmethod
        def own_name(cls, name):
            return name.removeprefix(cls.outer_prefix)

    description = Fewer.description
    assert (description.name, description.outer_prefix, description.has_slot_state) == ("Fewer", "inner.", False)
    assert description.checkpoint_names is StripesForCausalLM.checkpoint_names
    assert description.own_name("inner.norm.weight") == "norm.weight"
    assert description.leftovers(["a"], []) == set()
    assert StripesForCausalLM.description.outer_prefix == ""


def test_an_image_model_method_is_rejected():
    """Older classes had such a method; without an error they would silently ignore images."""
    with pytest.raises(TypeError, match=r"Sees\.image_model: must be None or 'module:Class'"):

        class Sees(StripesForCausalLM):
            @classmethod
            def image_model(cls, checkpoint, load_format="auto"):
                return None


STRIPES = Architecture("Stripes", StripesForCausalLM.read_config)


def read_nothing(config):
    raise AssertionError


PINNED = Architecture("Held", read_nothing)


def test_other_processes_get_the_path_of_a_description():
    register_architecture("Held", PINNED)
    register_architecture("Stripes", STRIPES)
    register_architecture("Path", "elsewhere:PATH")
    register_architecture("Local", Architecture("Local", read_nothing))
    paths = registry.registered()
    assert paths["Held"] == f"{__name__}:PINNED" and paths["Stripes"] == f"{__name__}:STRIPES"
    assert paths["Path"] == "elsewhere:PATH" and paths["llama"] == "lamella.models.llama:LLAMA"
    assert "Local" not in paths


def test_tensor_parallelism_needs_an_importable_description(tmp_path):
    description = Architecture("StripesForCausalLM", StripesForCausalLM.read_config)
    register_architecture("StripesForCausalLM", description)
    (tmp_path / "config.json").write_text(json.dumps(VALUES))
    with pytest.raises(ConfigError, match="StripesForCausalLM is defined in the main script or in no module"):
        LLM(tmp_path, device="cpu", load_format="dummy", tensor_parallel_size=2)


def test_a_description_is_the_same_under_each_of_its_paths():
    for target in (LlamaForCausalLM, LlamaForCausalLM.description, "lamella.models.llama:LLAMA"):
        register_architecture("LlamaForCausalLM", target)
    register_architecture("Held", PINNED)
    register_architecture("Held", replace(PINNED))  # the module was executed again
    with pytest.raises(ConfigError, match="is registered already"):
        register_architecture("Held", replace(PINNED, name="Other"))


def test_registering_the_same_target_again_has_no_effect():
    for target in (StripesForCausalLM, f"{__name__}:StripesForCausalLM"):
        register_architecture("StripesForCausalLM", target, aliases=("stripes",))
    register_architecture("LlamaForCausalLM", "lamella.models.llama:LlamaForCausalLM", aliases=("llama",))


@pytest.mark.parametrize(
    ("name", "aliases"),
    [("LlamaForCausalLM", ()), ("llama", ()), ("New", ("qwen3",)), ("New", ("Qwen3ForCausalLM",))],
)
def test_a_registered_name_cannot_be_replaced(name, aliases):
    with pytest.raises(ConfigError, match="is registered already"):
        register_architecture(name, StripesForCausalLM, aliases)
    assert architectures() == BUILT_IN
    with pytest.raises(ConfigError, match="is not known"):
        resolve_architecture("New")


def test_entry_points(monkeypatch):
    asked = []

    def entry_points(group):
        asked.append(group)
        return [EntryPoint("StripesForCausalLM", f"{__name__}:StripesForCausalLM", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert resolve_architecture("StripesForCausalLM") is StripesForCausalLM
    assert architectures() == [*BUILT_IN, "StripesForCausalLM"]
    assert set(asked) == {"lamella.architectures"}
    with pytest.raises(ConfigError, match="StripesForCausalLM"):
        resolve_architecture("Unknown")


def test_built_in_names_do_not_read_entry_points(monkeypatch):
    monkeypatch.setattr(registry, "entry_points", lambda group: pytest.fail("looked"))
    assert resolve_architecture("llama").from_config(canon_config(canon_set=None, model_type="llama")) is not None
