"""Layers of Apriel2's config files: RoPE, biases, norms, supernets; where the tensors contradict the file."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from apriel2_configs import (
    BIAS,
    BLOCKS,
    DROP,
    FILE,
    LAYERS,
    NO_BIAS,
    changed,
    first,
    mixer,
    mlp,
    read,
    refused,
    tensors_of,
    warnings,
    with_mlp,
)
from apriel2_models import ATTENTION, MIXERS, SUPERNET, fixed
from lamella.config import Llama3Scaling, MLPConfig, NormConfig, RopeConfig, StochasticConfig, YarnScaling
from lamella.layers.rotary import inverse_frequencies

pytestmark = pytest.mark.unit


class TestRotary:
    @staticmethod
    def rope(**rotary: Any) -> RopeConfig | None:
        return mixer(ATTENTION | {"rotary": rotary}).rope

    @pytest.mark.parametrize("kind", ["mistral_1d", "default", None])
    def test_the_plain_one(self, kind):
        rope = self.rope(type=kind, theta=1e6)
        assert rope == RopeConfig(dim=16, theta=1e6)
        torch.testing.assert_close(inverse_frequencies(rope), 1e6 ** (-torch.arange(0, 16, 2) / 16))

    def test_none(self):
        assert self.rope(type="none") is None and self.rope(type="none", theta=1e4) is None

    def test_llama3(self):
        rope = self.rope(
            type="llama3",
            theta=1e4,
            scale_factor=4.0,
            low_frequency_factor=2.0,
            high_frequency_factor=8.0,
            original_context_length=1024,
        )
        assert rope.scaling == Llama3Scaling(
            factor=4.0, low_freq_factor=2.0, high_freq_factor=8.0, original_length=1024
        )
        expected = []
        for index in range(8):
            frequency = 1e4 ** (-index / 8)
            length = 2 * math.pi / frequency
            partition = (1024 / length - 2.0) / (8.0 - 2.0)
            if length < 1024 / 8.0:
                expected.append(frequency)
            elif length > 1024 / 2.0:
                expected.append(frequency / 4.0)
            else:
                expected.append((1 - partition) * frequency / 4.0 + partition * frequency)
        assert expected[2] == 1e4 ** (-2 / 8) and 4 * expected[7] == 1e4 ** (-7 / 8)
        torch.testing.assert_close(inverse_frequencies(rope), torch.tensor(expected))
        assert self.rope(type="llama3", theta=1e4).scaling == Llama3Scaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
        )

    def test_yarn(self):
        rope = self.rope(
            type="yarn",
            theta=1e4,
            scale_factor=4.0,
            attention_factor=1.5,
            beta_fast=16.0,
            beta_slow=2.0,
            original_context_length=512,
        )
        assert rope.scaling == YarnScaling(
            factor=4.0, original_length=512, attention_factor=1.5, beta_fast=16.0, beta_slow=2.0
        )

        def pair(turns: float) -> float:
            return 16 * math.log(512 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

        low, high = max(math.floor(pair(16.0)), 0), min(math.ceil(pair(2.0)), 15)
        assert low < high < 8
        expected = []
        for index in range(8):
            frequency, ramp = 1e4 ** (-index / 8), min(max((index - low) / (high - low), 0.0), 1.0)
            expected.append(frequency / 4.0 * ramp + frequency * (1 - ramp))
        torch.testing.assert_close(inverse_frequencies(rope), torch.tensor(expected))
        default = self.rope(type="yarn", theta=1e4).scaling
        assert default == YarnScaling(
            factor=8.0, original_length=8192, attention_factor=0.1 * math.log(8.0) + 1.0, beta_fast=32.0, beta_slow=1.0
        )

    def test_keys_of_another_kind_are_refused(self):
        refused(
            fixed(ATTENTION | {"rotary": {"type": "mistral_1d", "theta": 1e4, "scale_factor": 4.0}}),
            "mixer: rotary: unknown keys may change what the model computes: scale_factor=4.0",
        )


class TestBiases:
    """Tensors decide which projections have a bias; a contradicting config is logged."""

    @pytest.mark.parametrize("present", ["", "q", "k", "v", "o", "qk", "qkv", "qkvo"])
    def test_attention(self, present, caplog):
        """Each projection alone, with a config without bias keys."""
        tensors = tensors_of(fixed(ATTENTION)) | {
            f"{BLOCKS}.{layer}.mixer.{name}_proj.bias" for layer in range(2) for name in present
        }
        found = mixer(ATTENTION, tensors)
        parts = [f"{name}_proj" for name in "qkv" if name in present]
        assert found.qkv_bias == (tuple(parts) if 0 < len(parts) < 3 else bool(parts))
        assert found.output_bias == ("o" in present)
        assert warnings(caplog) == [
            f"{FILE}: the config says False of mixer.{name}_proj.bias, the tensors say True, which counts"
            for name in "qkvo"
            if name in present
        ]

    @pytest.mark.parametrize("name", "qkvo")
    def test_a_declared_but_missing_bias_is_logged(self, name, caplog):
        values = ATTENTION | {LAYERS[name]: BIAS}
        assert mixer(values, tensors_of(fixed(ATTENTION))) == mixer(ATTENTION)
        message = f"{FILE}: the config says True of mixer.{name}_proj.bias, the tensors say False, which counts"
        assert warnings(caplog) == [message]

    @pytest.mark.parametrize("inherited", [False, True])
    @pytest.mark.parametrize("name", "qkvo")
    def test_without_tensors_the_projections_own_section_decides(self, name, inherited, caplog):
        values = ATTENTION | {"add_linear_biases": inherited, LAYERS[name]: NO_BIAS if inherited else BIAS}
        found = mixer(values)
        has = {part for part in "qkv" if found.qkv_bias is True or f"{part}_proj" in (found.qkv_bias or ())}
        has |= {"o"} if found.output_bias else set()
        assert has == ({*"qkvo"} - {name} if inherited else {name})
        assert read(fixed(values), tensors_of(fixed(values))) == read(fixed(values))
        assert warnings(caplog) == []

    def test_layers_may_differ(self, caplog):
        tensors = tensors_of(fixed(ATTENTION)) | {f"{BLOCKS}.1.mixer.q_proj.bias"}
        found = [layer.mixer.qkv_bias for layer in read(fixed(ATTENTION), tensors).layers]
        assert found == [False, ("q_proj",)]
        assert len(warnings(caplog)) == 1

    def test_in_a_supernet(self, caplog):
        at = "mixer.mixers.sliding_window.v_proj.bias"
        tensors = tensors_of(fixed(SUPERNET)) | {f"{BLOCKS}.{layer}.{at}" for layer in range(2)}
        found = dict(first(fixed(SUPERNET), tensors).mixer.mixers)
        assert found["sliding_window"].qkv_bias == ("v_proj",) and found["attention"].qkv_bias is False
        assert warnings(caplog) == [f"{FILE}: the config says False of {at}, the tensors say True, which counts"]

    @pytest.mark.parametrize(("tensor", "field"), [("up_proj", "gate_up_bias"), ("down_proj", "down_bias")])
    @pytest.mark.parametrize("gated", [False, True])
    def test_feed_forward(self, tensor, field, gated, caplog):
        values = with_mlp(gated=gated)
        tensors = tensors_of(values) | {f"{BLOCKS}.{layer}.mlp.{tensor}.bias" for layer in range(2)}
        found = mlp(tensors, gated=gated)
        assert {name: getattr(found, name) for name in ("gate_up_bias", "down_bias")} == {
            "gate_up_bias": False,
            "down_bias": False,
        } | {field: True}
        message = f"{FILE}: the config says False of mlp.{tensor}.bias, the tensors say True, which counts"
        assert warnings(caplog) == [message]

    @pytest.mark.parametrize(("layer", "field"), [("layer_1", "gate_up_bias"), ("layer_2", "down_bias")])
    def test_feed_forward_biases_follow_the_config_without_tensors(self, layer, field):
        assert mlp(**{layer: BIAS}) == MLPConfig(intermediate_size=48, gated=False, **{field: True})
        both = {"gate_up_bias": True, "down_bias": True} | {field: False}
        assert mlp(add_linear_biases=True, **{layer: NO_BIAS}) == MLPConfig(intermediate_size=48, gated=False, **both)

    def test_declared_biases_of_a_gated_feed_forward_are_ignored_without_tensors(self, caplog):
        """As in the published class: no biases, whatever the config declares."""
        values = with_mlp(gated=True, add_linear_biases=True)
        assert first(values, tensors_of(with_mlp(gated=True))).feed_forward == MLPConfig(intermediate_size=48)
        assert len(warnings(caplog)) == 2

    @pytest.mark.parametrize(
        ("key", "tensor", "field"),
        [
            ("conv_bias", "conv1d", "conv_bias"),
            ("dt_proj_bias", "dt_proj", "dt_bias"),
            ("add_linear_biases", "in_proj", "linear_bias"),
        ],
    )
    @pytest.mark.parametrize("there", [False, True])
    @pytest.mark.parametrize("stated", [False, True, None])
    def test_mamba(self, key, tensor, field, there, stated, caplog):
        values = MIXERS["mamba"] | {key: there}
        tensors = tensors_of(fixed(values))
        assert (f"{BLOCKS}.0.mixer.{tensor}.bias" in tensors) is there
        demanded = stated is True and key != "add_linear_biases"  # so that the loader names what is lost
        assert getattr(mixer(values | {key: stated}, tensors), field) is (there or demanded)
        claimed = False if stated is None and key == "add_linear_biases" else stated
        message = f"{FILE}: the config says {claimed} of mixer.{tensor}.bias, the tensors say {there}, which counts"
        assert warnings(caplog) == ([] if demanded or claimed in (None, there) else [message])


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("stated", [False, True, None])
def test_tensors_decide_if_a_feed_forward_is_gated(there, stated, caplog):
    """The tensors say it where the config does not, in which programs differ, or denies it; where it does, a gate that
    is not there is the loader's to name."""
    tensors = tensors_of(with_mlp(gated=there))
    assert (f"{BLOCKS}.0.mlp.gate_proj.weight" in tensors) is there
    assert mlp(tensors, gated=stated).gated is (there or stated is True)
    claim = f"{FILE}: the config says False of mlp.gate_proj.weight, the tensors say True, which counts"
    assert warnings(caplog) == ([claim] if there and stated is False else [])
    assert mlp(None, gated=stated).gated is bool(stated)


class TestNorms:
    def test_a_blocks_own_epsilon_counts_and_the_log_says_so_once(self, caplog):
        values = fixed(ATTENTION, layers=3, normalization={"type": "rms_norm", "epsilon": 1e-2})
        model = read(values)
        assert model.norm == NormConfig(eps=1e-5)
        assert {layer.norm for layer in model.layers} == {NormConfig(eps=1e-2)}
        said = "block block norms with its own epsilon, as in training; the published class takes the head's"
        assert warnings(caplog) == [f"{FILE}: {said}"]

    @pytest.mark.parametrize("own", [{}, {"type": "rms_norm"}, {"type": "rms_norm", "epsilon": 1e-3}])
    def test_an_epsilon_equal_to_the_heads_is_not_logged(self, own, caplog):
        head = {"normalization": {"type": "rms_norm", "epsilon": 1e-3}}
        assert first(fixed(ATTENTION, normalization=own) | {"head": head}).norm == NormConfig(eps=1e-3)
        assert warnings(caplog) == []

    def test_layer_norms_of_blocks(self):
        values = fixed(MIXERS["gdn"], normalization={"type": "layer_norm", "epsilon": 1e-5})
        assert first(values).norm == NormConfig(eps=1e-5, kind="layer")
        norms = {f"{BLOCKS}.0.{name}_layernorm.{part}" for name in ("input", "post_attention") for part in ("bias",)}
        assert norms <= tensors_of(values) and not norms & tensors_of(fixed(MIXERS["gdn"]))


class TestSupernets:
    @pytest.mark.parametrize(
        "changes",
        [
            {"sampling_strategy": "uniform"},
            {"sampling_strategy": "full_layout"},
            {"sampling_strategy": "weighted"},
            {"sampling_strategy": "weighted", "sampling_weights": {"attention": 0.5}},
            {"predefined_layouts": [["gdn", "kda"]], "predefined_layout_probabilities": [0.25], "seed_shift": 3},
        ],
    )
    def test_sampling_options_of_training_are_ignored(self, changes):
        """The published class rejects some of these options even for inference."""
        assert read(fixed(SUPERNET | changes)) == read(fixed(SUPERNET))

    def test_mixers_keep_their_order_and_the_first_is_the_main_one(self):
        found = mixer({"type": "stochastic", "mixers": dict(reversed(MIXERS.items()))})
        assert isinstance(found, StochasticConfig)
        assert found.names == tuple(reversed(MIXERS)) and found.main == "mamba"
        assert mixer(SUPERNET | {"main_mixer_name": "kda"}).main == "kda"
        alone = {name: mixer(values) for name, values in MIXERS.items()}
        assert dict(found.mixers) == alone

    def test_null_mixers_are_skipped(self):
        assert mixer(SUPERNET | {"mixers": MIXERS | {"rwkv": None}}) == mixer(SUPERNET)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"main_mixer_name": "rwkv"}, "mixer: stochastic.main_mixer_name='rwkv'"),
            ({"main_mixer_name": 3}, "mixer: stochastic.main_mixer_name=3"),
            ({"mixers": {}, "main_mixer_name": None}, "mixer: stochastic.mixers=()"),
            ({"mixers": DROP}, "mixer: stochastic.mixers=()"),
            ({"mixers": ["gdn"]}, "mixer: mixers=['gdn']"),
            ({"mixers": MIXERS | {"a.b": ATTENTION}}, "mixer: mixers='a.b' is not supported: must be names without"),
            ({"mixers": MIXERS | {"": ATTENTION}}, "mixer: mixers=''"),
            ({"mixers": MIXERS | {"gdn": "gdn"}}, "mixer: mixers: gdn='gdn' is not supported: must be a mapping"),
            ({"mixers": MIXERS | {"inner": SUPERNET}}, "mixer: mixers: inner: type='stochastic'"),
            ({"mixers": MIXERS | {"inner": {"type": "rwkv"}}}, "mixer: mixers: inner: type='rwkv'"),
        ],
    )
    def test_bad_ones(self, changes, said):
        values = changed(fixed(SUPERNET), ("decoder", "block", "mixer"), **changes)
        refused(values, f"{FILE}: decoder: block: {said}")
