"""Keys unknown to readers, handled by the rules of the data file; overrides; all RoPE variants."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from helpers import SHAPE, VOCAB, canon_checkpoint, hf_checkpoint, plain_logits
from lamella import LLM
from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.overrides import apply_overrides
from lamella.config import LongRopeScaling, ModelConfig, YarnScaling
from lamella.config.config_keys import KeyRules
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError
from lamella.layers.rotary import Rotary, inverse_frequencies
from lamella.models import LlamaCanonForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM
from lamella.parity.reference_model import _frequencies

BASE = SHAPE | {"head_dim": 16}
CLASSES = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "canon": LlamaCanonForCausalLM}
ALL = pytest.mark.parametrize("family", CLASSES)
RULES = KeyRules.read()


def read(family: str = "llama", max_length: int | None = None, **changes: Any) -> ModelConfig:
    return CLASSES[family].read_config(HFConfig(BASE | changes, "config.json", max_length))


def rope(**changes: Any) -> Any:
    return read(**changes).layers[0].mixer.rope


# Of each rule one name that it matches.
def example(pattern: str) -> str:
    return pattern.replace("*", "made_up")


@ALL
@pytest.mark.parametrize("pattern", RULES.ignored)
def test_keys_of_uploaders_and_trainers_are_ignored(family, pattern, caplog):
    key = example(pattern)
    if key == "max_window_layers" and family == "qwen3":
        return  # which it reads
    if key.startswith("_"):
        return
    assert read(family, **{key: "x"}) == read(family)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"{key}='x'" in record.message


OF_FAMILY = {"llama": {"logit_scale"}, "qwen3": {"use_sliding_window"}, "canon": {"qk_norm"}}


@ALL
@pytest.mark.parametrize("key", RULES.inactive)
def test_switches_are_ignored_if_off_and_rejected_if_on(family, key, caplog):
    values, otherwise = RULES.inactive[key]
    if key in OF_FAMILY[family]:
        return
    for value in values:
        caplog.clear()
        assert read(family, **{key: value}) == read(family)
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
    with pytest.raises(ConfigError) as caught:
        read(family, **{key: "on"})
    assert otherwise in str(caught.value) and f"--hf-overrides '{{\"{key}\": null}}'" in str(caught.value)


@ALL
@pytest.mark.parametrize("pattern", RULES.refused)
def test_keys_that_change_the_computation_are_rejected(family, pattern):
    key = example(pattern)
    if family == "canon" and key == "canon_set":
        return
    with pytest.raises(ConfigError) as caught:
        read(family, **{key: {"x": 1}})
    assert RULES.refused[pattern] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("pattern", RULES.refused)
def test_keys_that_change_the_computation_are_ignored_if_false(pattern, caplog):
    assert read(**{example(pattern): False}) == read()
    assert len(caplog.records) == 1


def test_every_key_has_one_rule():
    groups = (set(RULES.silent), set(RULES.ignored), set(RULES.inactive), set(RULES.refused))
    names = [name for group in groups for name in group]
    assert len(names) == len(set(names))


def test_true_is_not_accepted_for_the_number_one():
    """`num_experts: true` is not the number 1, which means no experts."""
    with pytest.raises(ConfigError, match="num_experts=True"):
        read(num_experts=True)


def test_one_warning_per_load_lists_all(tmp_path, caplog):
    folder = canon_checkpoint(tmp_path, unsloth_fixed=True, neftune_noise_alpha=5.0, license="mit")
    for _ in range(2):
        caplog.clear()
        LLM(folder, num_blocks=8)
        (record,) = [r for r in caplog.records if "ignored keys" in r.message]
        assert record.message.endswith(": license='mit', neftune_noise_alpha=5.0, unsloth_fixed=True")


def test_the_suggested_override_works(tmp_path):
    folder = canon_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    changes = {"made_up": 1, "rope_scaling": {"rope_type": "linear", "factor": 2, "odd": 3}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    values, overrides = {}, {}
    for _ in range(3):
        try:
            values = open_checkpoint(folder, overrides).values
            LLM(folder, num_blocks=8, hf_overrides=overrides)
            break
        except ConfigError as error:
            out = json.loads(str(error).partition("--hf-overrides ")[2].strip("'"))
            overrides = {**overrides, **out}
    assert overrides == {"made_up": None, "rope_scaling": {"odd": None}}
    assert "made_up" not in values


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
NEWER = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
OLDER = {"rope_theta": 5e5, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}


class TestOverrides:
    @pytest.mark.parametrize("file", [NEWER, {"rope_theta": 5e5}, {"rope_parameters": LLAMA3}, OLDER])
    @pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
    def test_another_scaling_replaces_the_files_and_keeps_the_base(self, file, place):
        got = rope(**apply_overrides(file, {place: YARN}))
        assert got == rope(rope_theta=5e5, rope_scaling=YARN)
        assert isinstance(got.scaling, YarnScaling) and got.theta == 5e5

    @pytest.mark.parametrize("file", [{"rope_parameters": LLAMA3}, OLDER])
    @pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
    def test_a_part_changes_that_part(self, file, place):
        got = rope(**apply_overrides(file, {place: {"factor": 16.0}}))
        assert (got.scaling.factor, got.scaling.low_freq_factor, got.theta) == (16.0, 1.0, 5e5)

    @pytest.mark.parametrize("file", [{"rope_parameters": LLAMA3}, OLDER])
    def test_null_removes_the_scaling_and_keeps_the_base(self, file):
        got = rope(**apply_overrides(file, {"rope_scaling": None}))
        assert (got.scaling, got.theta) == (None, 5e5)

    @pytest.mark.parametrize("file", [NEWER, {"rope_theta": 5e5}, {"rope_parameters": LLAMA3}, OLDER])
    def test_an_overriding_base_replaces_the_files(self, file):
        assert rope(**apply_overrides(file, {"rope_theta": 1e6})).theta == 1e6
        assert rope(**apply_overrides(file, {"rope_parameters": {"rope_theta": 1e6}})).theta == 1e6

    def test_the_trained_length_of_an_override_replaces_the_top_level(self):
        file = {"original_max_position_embeddings": 64, "rope_scaling": {"type": "yarn", "factor": 2.0}}
        scaling = {"type": "yarn", "original_max_position_embeddings": 128}
        assert rope(**apply_overrides(file, {"rope_scaling": scaling})).scaling.original_length == 128
        assert rope(**apply_overrides(file, {"rope_scaling": {"factor": 8.0}})).scaling.original_length == 64

    def test_nested_sections_have_rotations_of_their_own(self):
        file = {"text_config": {**NEWER, "made_up": 1}}
        changed = apply_overrides(file, {"text_config": {"rope_scaling": YARN, "made_up": None}})
        assert changed == {"text_config": {"rope_parameters": {"rope_theta": 5e5, **YARN}}}

    def test_null_overrides_keys_for_which_null_is_a_value(self):
        """For Qwen3, a missing sliding_window means 4096, and null means no window."""
        file = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
        changed = apply_overrides(BASE | file, {"sliding_window": None})
        assert [layer.mixer.window for layer in read("qwen3", **changed).layers] == [None, None]

    def test_the_files_values_are_not_changed(self):
        file = {"rope_scaling": {"type": "linear", "factor": 2.0}, "a": {"b": 1}}
        before = json.dumps(file)
        apply_overrides(file, {"rope_scaling": {"factor": 4.0}, "a": {"b": None}})
        assert json.dumps(file) == before


LONG = {
    "type": "longrope", "short_factor": [1.0 + i / 10 for i in range(8)], "long_factor": [2.0 + i for i in range(8)],
    "original_max_position_embeddings": 128,
}  # fmt: skip


class TestRotations:
    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({"attn_factor": 1.0}, 0.1 * math.log(4) + 1),
            ({"attn_factor": 2.0}, 2 * (0.1 * math.log(4) + 1)),  # as YaRN's authors and vLLM multiply
            ({"attention_factor": 1.5, "attn_factor": 1.0}, 1.5),
            ({"attention_factor": 1.5, "attn_factor": 1.5}, 1.5),
            ({"finetuned": True}, 0.1 * math.log(4) + 1),
        ],
    )
    def test_yarns_factors(self, fields, expected):
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, **fields}
        assert rope(rope_scaling=scaling).scaling.attention_factor == pytest.approx(expected)

    def test_yarns_extrapolation_factor_weighs_the_unscaled_part(self):
        scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
        unscaled, plain = rope(), rope(rope_scaling=scaling)
        assert rope(rope_scaling=scaling | {"extrapolation_factor": 1.0}) == plain
        none = inverse_frequencies(rope(rope_scaling=scaling | {"extrapolation_factor": 0.0}))
        torch.testing.assert_close(none, inverse_frequencies(unscaled) / 4)
        half = rope(rope_scaling=scaling | {"extrapolation_factor": 0.5})
        torch.testing.assert_close(inverse_frequencies(half), (none + inverse_frequencies(plain)) / 2)
        torch.testing.assert_close(_frequencies(half)[0], inverse_frequencies(half))

    @pytest.mark.parametrize("kind", ["longrope", "su"])
    @pytest.mark.parametrize("length", [None, 100, 128, 129, 512])
    def test_longrope_as_transformers(self, kind, length):
        config = LlamaConfig(**BASE, rope_parameters={**LONG, "rope_type": "longrope", "rope_theta": 1e4})
        theirs, magnitude = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=length or 512)
        ours = Rotary(rope(max_length=length, rope_scaling=LONG | {"type": kind}), torch.device("cpu"))
        torch.testing.assert_close(ours.frequencies, theirs)
        assert ours.magnitude == pytest.approx(magnitude)

    def test_longropes_stated_factors(self):
        assert rope(rope_scaling=LONG | {"attention_factor": 1.25}).scaling.attention_factor == 1.25
        assert rope(rope_scaling=LONG | {"long_mscale": 1.5}).scaling.attention_factor == 1.5
        assert isinstance(rope(rope_scaling=LONG).scaling, LongRopeScaling)

    def test_longrope_in_an_engine_gives_transformers_logits(self, tmp_path):
        config = LlamaConfig(**BASE, rope_parameters={**LONG, "rope_type": "longrope", "rope_theta": 1e4})
        model = hf_checkpoint(tmp_path, config)
        for length in (100, 300):  # below and beyond the trained length of 128
            ids = torch.arange(length)[None] % VOCAB
            ours = load_model(open_checkpoint(tmp_path), "float32", max_length=128 if length <= 128 else 512)
            torch.testing.assert_close(plain_logits(ours, ids), model(ids).logits.detach(), atol=1e-4, rtol=1e-4)


class TestWindows:
    """Qwen models saved as Llama keep a window that is turned off."""

    @pytest.mark.parametrize(
        "keys",
        [
            {"sliding_window": 64, "use_sliding_window": False, "max_window_layers": 21},
            {"sliding_window": 512},  # as long as the context
            {"sliding_window": 4096, "max_window_layers": 2},
            {"sliding_window": None, "use_sliding_window": False},
        ],
    )
    def test_windows_without_effect_are_accepted(self, keys, caplog):
        assert read(**keys) == read()
        assert len(caplog.records) == 1

    def test_an_ambiguous_window_is_rejected_with_the_way_out(self):
        with pytest.raises(ConfigError, match=r"sliding_window=64 .*layer_types.*'\{\"sliding_window\": null\}'"):
            read(sliding_window=64)
        with pytest.raises(ConfigError, match="sliding_window=64"):
            read(sliding_window=64, use_sliding_window=True)


@pytest.mark.parametrize(
    "name",
    """gelu gelu_10 gelu_fast gelu_new gelu_python gelu_pytorch_tanh gelu_python_tanh gelu_accurate hardswish laplace
    leaky_relu linear mish quick_gelu relu relu2 relu6 sigmoid silu sqrtsoftplus swish tanh""".split(),
)
def test_activations_as_transformers(tmp_path, name):
    model = hf_checkpoint(tmp_path, LlamaConfig(**BASE, hidden_act=name))
    ids = torch.arange(20)[None]
    ours = load_model(open_checkpoint(tmp_path), "float32")
    torch.testing.assert_close(plain_logits(ours, ids), model(ids).logits.detach(), atol=2e-4, rtol=1e-3)


def test_every_stateless_activation_of_transformers_is_read():
    from transformers.activations import ACT2CLS

    for name in ACT2CLS:
        if name in ("prelu", "xielu"):  # which have weights
            with pytest.raises(ConfigError, match="hidden_act"):
                read(hidden_act=name)
        else:
            read(hidden_act=name)
