"""Config files are read strictly: unknown keys that could change the model are rejected by name."""

from __future__ import annotations

import json
import math

import pytest
from transformers import LlamaConfig, Qwen3Config

from helpers import SHAPE, VOCAB, canon_checkpoint, canon_config
from lamella.checkpoint import open_checkpoint
from lamella.config import (
    AttentionConfig,
    CanonConfig,
    DynamicScaling,
    LayerConfig,
    LinearScaling,
    Llama3Scaling,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
    YarnScaling,
)
from lamella.config.config_keys import KeyRules
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError
from lamella.models import LlamaCanonForCausalLM, LlamaForCausalLM, Qwen3ForCausalLM

BASE = SHAPE | {"head_dim": 16}
CLASSES = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM, "canon": LlamaCanonForCausalLM}
ALL = pytest.mark.parametrize("family", CLASSES)


def read(family: str = "llama", without: str = "", max_length: int | None = None, **changes: object) -> ModelConfig:
    values = {key: value for key, value in (BASE | changes).items() if key != without}
    return CLASSES[family].read_config(HFConfig(values, "folder/config.json", max_length))


def mixers(config: ModelConfig) -> list[AttentionConfig]:
    return [layer.mixer for layer in config.layers]


def refused(match: str, family: str = "llama", **changes: object) -> None:
    with pytest.raises(ConfigError, match=match) as caught:
        read(family, **changes)
    assert "\n" not in str(caught.value)


@ALL
def test_unknown_keys_are_named_with_their_file(family):
    refused(
        r"^folder/config\.json: unknown keys may .*: logit_cap=30\.0, made_up=4; "
        r"to compute without: --hf-overrides '\{\"logit_cap\": null, \"made_up\": null\}'$",
        family,
        logit_cap=30.0,
        made_up=4,
    )


@ALL
def test_nulls_underscores_and_bookkeeping_are_ignored_silently(family):
    silent = {"logit_cap": None, "_name_or_path": "x", "is_encoder_decoder": False, "pruned_heads": {}}
    assert read(family, **dict.fromkeys(KeyRules.read().silent, "x"), **silent) == read(family)


@ALL
@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"])
def test_missing_sizes_are_named(family, key):
    # Qwen3 has no use for hidden_size until the end; the error is the same.
    with pytest.raises(ConfigError, match=rf"^folder/config\.json: {key} is missing$"):
        read(family, without=key)


@ALL
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("hidden_size", value) for value in ("64", 64.5, True, 0, -64, [64], math.inf, math.nan)),
        *(("rms_norm_eps", value) for value in ("1e-5", True, [1e-5], math.inf, math.nan)),
        *(("tie_word_embeddings", value) for value in ("true", 2, [])),
        *(("attention_bias", value) for value in ("false", 0.5)),
        *(("eos_token_id", value) for value in ("2", -1, 2.0, [2, "3"], True)),
        *(("rope_scaling", value) for value in ("linear", ["linear", 2.0])),
        ("rope_parameters", "default"),
        ("hidden_act", "prelu"),
        ("hidden_act", "identity"),
        ("hidden_act", ["silu"]),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_unusable_values(family, key, value):
    refused(rf"^folder/config\.json: .*{key}=", family, **{key: value})


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama", {"logit_scale": 0.5}, "logit_scale"),
        ("llama", {"is_causal": False}, "is_causal"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads=3"),
        ("llama", {"num_key_value_heads": 8}, "num_kv_heads=8"),
        ("llama", {"num_attention_heads": 6, "head_dim": None}, "num_attention_heads=6"),
        ("canon", {"num_attention_heads": 6, "head_dim": None}, "num_attention_heads=6"),
        ("llama", {"head_dim": 15}, "rope.dim=15"),
        ("llama", {"rope_theta": 0}, "rope.theta"),
        ("llama", {"sliding_window": 8}, "sliding_window=8"),
        ("llama", {"layer_types": ["full_attention"] * 3}, "layer_types"),
        ("llama", {"layer_types": 2}, "layer_types"),
        ("llama", {"layer_types": "full_attention"}, "layer_types"),
        ("llama", {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "no sliding_window"),
        ("llama", {"qk_norm": True}, "qk_norm=True"),
        ("llama", {"canon_set": "A"}, "canon_set='A'"),
        ("qwen3", {"mlp_bias": True}, "mlp_bias=True"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, "no sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
        ("canon", {"canon_set": ["A"]}, "canon_set"),
        ("canon", {"canon_set": True}, "canon_set"),
        ("canon", {"canon_kernel": 0}, "canon_kernel=0"),
        ("canon", {"rope_version": "meta"}, "rope_version='meta'"),
        ("canon", {"rope_dim": 7}, "rope.dim=7"),
        ("canon", {"rope_dim": -2}, "rope_dim=-2"),
    ],
)
def test_unusable_values_of_one_family(family, changes, match):
    refused(match, family, **changes)


@ALL
def test_whole_numbers_in_any_form(family):
    spelled = {key: float(value) for key, value in BASE.items()} | {"tie_word_embeddings": 1, "attention_bias": 0}
    assert read(family, **spelled, rope_theta=10000) == read(family, tie_word_embeddings=True, rope_theta=1e4)


def test_end_tokens():
    assert read(bos_token_id=1, eos_token_id=2).eos_token_ids == (2,)
    config = read(bos_token_id=[128000], eos_token_id=[128001, 128009])
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128009))
    assert (read().bos_token_id, read().eos_token_ids) == (None, ())


def test_a_read_model_in_full():
    """Check every field of one model, so that other tests need not."""
    norm = NormConfig(eps=1e-5)
    canon = CanonConfig(kernel=3, bias=True, activation=True, residual=False)
    config = read(
        "canon", canon_set="DBA", canon_kernel=3, canon_bias=True, canon_activation=True, canon_residual=False,
        qk_norm=True, rope_dim=8, rope_version="lingua", rope_theta=5e5, rms_norm_eps=1e-5, attention_bias=True,
        mlp_bias=True, tie_word_embeddings=True, eos_token_id=2,
    )  # fmt: skip
    layer = LayerConfig(
        mixer=AttentionConfig(
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            scale=0.25,
            qkv_bias=True,
            output_bias=True,
            qk_norm=norm,
            qk_norm_scope="full",
            rope=RopeConfig(dim=8, theta=5e5, interleaved=True),
            canon=canon,
        ),
        feed_forward=MLPConfig(intermediate_size=96, gate_up_bias=True, down_bias=True, canon=canon),
        norm=norm,
        mixer_canon=canon,
    )
    assert config == ModelConfig(
        architecture="LlamaCanonForCausalLM",
        vocab_size=VOCAB,
        hidden_size=64,
        layers=(layer, layer),
        norm=norm,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        eos_token_ids=(2,),
    )


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}
YARN = {"factor": 4, "original_max_position_embeddings": 128}
SCALINGS = {
    "linear": ({"factor": 4}, LinearScaling(factor=4.0)),
    "dynamic": ({"factor": 2}, DynamicScaling(factor=2.0, original_length=512, length=512)),
    "llama3": (LLAMA3, Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_length=64)),
    "yarn": (YARN, YarnScaling(factor=4, original_length=128, attention_factor=0.1 * math.log(4) + 1)),
}


class TestRope:
    @ALL
    @pytest.mark.parametrize("kind", SCALINGS)
    @pytest.mark.parametrize("type_key", ["type", "rope_type"])
    def test_older_and_newer_keys_agree(self, family, kind, type_key):
        fields, expected = SCALINGS[kind]
        newer = read(family, rope_parameters={"rope_type": kind, "rope_theta": 5e5, **fields})
        assert mixers(newer)[0].rope == RopeConfig(dim=16, theta=5e5, scaling=expected)
        assert read(family, rope_theta=500000, rope_scaling={type_key: kind, **fields}) == newer
        # As a file that was written by one version and edited for another.
        both = {"rope_parameters": {"rope_type": kind, **fields}, "rope_scaling": {type_key: kind, **fields}}
        assert read(family, rope_theta=5e5, **both) == newer

    def test_a_factor_below_one_is_a_factor(self):
        (first, _) = mixers(read(rope_scaling={"rope_type": "linear", "factor": 0.5}))
        assert first.rope.scaling == LinearScaling(factor=0.5)

    @pytest.mark.parametrize(
        "changes",
        [
            {"rope_parameters": {"rope_type": "linear", "factor": 4}, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}},
            {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4},
            {"rope_parameters": {"partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
        ],
    )
    def test_contradictions(self, changes):
        refused(r"config\.json: .* contradicts ", **changes)

    @pytest.mark.parametrize(
        ("scaling", "match"),
        [
            ({"rope_type": "proportional", "factor": 2}, "rope_type='proportional'"),
            ({"rope_type": "longrope", "factor": 2}, "short_factor is missing"),
            ({"rope_type": "longrope", "factor": 2, "short_factor": [1.0], "long_factor": [1.0]}, "short_factor="),
            ({"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": ["2"] * 8}, "long_factor="),
            ({"rope_type": "longrope", "short_factor": [0.0] * 8, "long_factor": [1.0] * 8}, "short_factor="),
            (
                {"rope_type": "yarn", **YARN, "attention_factor": 1.5, "attn_factor": 2.0},
                "contradicts attention_factor",
            ),
            ({"rope_type": "linear"}, "factor is missing"),
            ({"rope_type": "dynamic"}, "factor is missing"),
            ({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}, "high_freq_factor is missing"),
            ({"rope_type": "linear", "factor": "4"}, "factor='4'"),
            ({"rope_type": "linear", "factor": 0}, "rope.factor=0"),
            ({"rope_type": "dynamic", "factor": 0.5}, "rope.factor=0.5"),
            ({"rope_type": "llama3", **LLAMA3, "low_freq_factor": 5}, "rope.low_freq_factor=5"),
            ({"rope_type": "yarn", **YARN, "beta_fast": 0}, "rope.beta_fast=0"),
            ({"rope_type": "yarn", **YARN, "long_factor": [1.0]}, "long_factor"),
            ({"rope_type": "linear", "factor": 2, "low_freq_factor": 1}, "low_freq_factor=1"),
            ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        ],
    )
    def test_unusable_scalings(self, scaling, match):
        refused(match, rope_scaling=scaling)

    @pytest.mark.parametrize(
        ("changes", "attention_factor"),
        [
            ({"attention_factor": 1.5, "mscale": 1.0, "mscale_all_dim": 0.5}, 1.5),
            ({"mscale": 1.0, "mscale_all_dim": 0.5}, (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
            ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
            ({"factor": 1}, 1.0),
            ({"factor": None}, 0.1 * math.log(4) + 1),  # 512 / 128
        ],
    )
    def test_yarn_magnitude(self, changes, attention_factor):
        scaling = mixers(read(rope_scaling={"rope_type": "yarn", **YARN} | changes))[0].rope.scaling
        assert scaling.attention_factor == pytest.approx(attention_factor)

    def test_original_length(self):
        """By default the longest position; the top-level key wins over the nested one."""
        nested = {"rope_type": "llama3", **LLAMA3}
        del nested["original_max_position_embeddings"]
        assert mixers(read(rope_scaling=nested))[0].rope.scaling.original_length == 512
        nested["original_max_position_embeddings"] = 64
        config = read(rope_scaling=nested, original_max_position_embeddings=32)
        assert mixers(config)[0].rope.scaling.original_length == 32

    @pytest.mark.parametrize(("max_length", "length"), [(None, 512), (100, 512), (700, 700)])
    def test_dynamic_scaling_is_for_the_engines_length(self, max_length, length):
        config = read(rope_scaling={"type": "dynamic", "factor": 2.0}, max_length=max_length)
        assert mixers(config)[0].rope.scaling == DynamicScaling(factor=2.0, original_length=512, length=length)

    def test_partial_rotation(self):
        assert mixers(read(partial_rotary_factor=0.5))[0].rope.dim == 8
        # A quotient that binary fractions cannot hold: int(48 * (38 / 48)) would be 37 without care.
        head = {"head_dim": 48, "partial_rotary_factor": 38 / 48}
        assert mixers(read(**head))[0].rope.dim == 38

    @pytest.mark.parametrize(("rope_dim", "dim"), [(None, 16), (8, 8), (16, 16), (99, 16)])
    def test_rope_dim(self, rope_dim, dim):
        # Saved files carry the quotient too.
        factor = {} if rope_dim is None else {"partial_rotary_factor": rope_dim / 16}
        assert mixers(read("canon", rope_dim=rope_dim, **factor))[0].rope.dim == dim

    def test_rope_dim_zero_is_no_rotation(self):
        assert mixers(read("canon", rope_dim=0))[0].rope is None


class TestLlama:
    @pytest.mark.parametrize(
        ("changes", "qkv_bias", "output_bias"),
        [
            ({}, False, False),
            ({"attention_bias": True}, True, True),
            ({"bias": True}, True, True),
            ({"qkv_bias": True}, True, False),
            ({"bias": True, "qkv_bias": False}, False, True),
        ],
    )
    def test_attention_biases(self, changes, qkv_bias, output_bias):
        for mixer in mixers(read(**changes)):
            assert (mixer.qkv_bias, mixer.output_bias) == (qkv_bias, output_bias)

    def test_options_without_effect_are_accepted(self):
        assert read(logit_scale=1.0, is_causal=True, hidden_act="swish", layer_types=["full_attention"] * 2) == read()

    def test_windows(self):
        config = read(layer_types=["sliding_attention", "full_attention"], sliding_window=8)
        assert [mixer.window for mixer in mixers(config)] == [8, None]

    def test_defaults(self):
        config = read(num_key_value_heads=None, head_dim=None, max_position_embeddings=None)
        mixer = config.layers[0].mixer
        assert (mixer.num_kv_heads, mixer.head_dim, mixer.rope.theta) == (4, 16, 10000.0)
        assert (config.max_position_embeddings, config.norm.eps) == (2048, 1e-6)


class TestQwen3:
    def test_defaults(self):
        config = read(
            "qwen3", without="head_dim", max_position_embeddings=None, rope_scaling={"type": "yarn", "factor": 4}
        )
        mixer = config.layers[0].mixer
        assert (mixer.head_dim, mixer.qk_norm_scope) == (128, "head")
        assert mixer.rope.scaling.original_length == config.max_position_embeddings == 32768

    @pytest.mark.parametrize(
        ("changes", "windows"),
        [
            ({"sliding_window": 8, "max_window_layers": 0}, [None, None]),
            ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, [8, 8]),
            ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, [None, 8]),
            ({"use_sliding_window": True, "sliding_window": 8}, [None, None]),
            ({"use_sliding_window": True, "max_window_layers": 1}, [None, 4096]),
            ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None, None]),
            (
                {
                    "use_sliding_window": True,
                    "sliding_window": 8,
                    "layer_types": ["sliding_attention", "full_attention"],
                },
                [8, None],
            ),
        ],
    )
    def test_windows(self, changes, windows):
        assert [mixer.window for mixer in mixers(read("qwen3", **changes))] == windows


class TestCanon:
    @pytest.mark.parametrize("letters", ["", None, "A", "CB", "ABCD", "DDCCBBAA"])
    def test_letters(self, letters):
        layer = read("canon", canon_set=letters).layers[0]
        places = {
            "A": layer.mixer_canon,
            "B": layer.mixer.canon,
            "C": layer.feed_forward_canon,
            "D": layer.feed_forward.canon,
        }
        assert {letter for letter, canon in places.items() if canon} == set(letters or "")

    def test_intermediate_size_that_is_null_or_missing(self):
        assert read("canon", intermediate_size=None).layers[0].feed_forward.intermediate_size == 64 * 8 // 3
        assert read("canon", without="intermediate_size").layers[0].feed_forward.intermediate_size == 11008

    def test_rope_dim_and_factor_must_agree(self):
        assert read("canon", rope_dim=4, partial_rotary_factor=0.25).layers[0].mixer.rope.dim == 4
        refused("partial_rotary_factor", "canon", rope_dim=4, partial_rotary_factor=0.5)

    def test_yarn_needs_a_base(self):
        refused("theta", rope_theta=1.0, rope_scaling={"rope_type": "yarn", "factor": 2.0})


@pytest.mark.parametrize("config", [LlamaConfig(), Qwen3Config()], ids=["llama", "qwen3"])
def test_transformers_default_configs_read(config):
    model = CLASSES[config.model_type].read_config(HFConfig(config.to_dict()))
    mixer, feed_forward = model.layers[-1].mixer, model.layers[-1].feed_forward
    assert len(model.layers) == config.num_hidden_layers
    assert (model.vocab_size, model.hidden_size) == (config.vocab_size, config.hidden_size)
    assert model.max_position_embeddings == config.max_position_embeddings
    assert (mixer.num_heads, mixer.num_kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (mixer.head_dim, mixer.rope.theta) == (config.head_dim, config.rope_parameters["rope_theta"])
    assert (feed_forward.intermediate_size, model.norm.eps) == (config.intermediate_size, config.rms_norm_eps)


def test_a_checkpoints_errors_name_its_file(tmp_path):
    folder = canon_checkpoint(tmp_path)
    (folder / "config.json").write_text(json.dumps(canon_config(novelty=1)))
    with pytest.raises(ConfigError, match=rf"^{folder}/config\.json: .*novelty=1"):
        open_checkpoint(folder).read_config()


@pytest.mark.parametrize(
    ("key", "value"), [("num_hidden_layers", 10**9), ("vocab_size", 10**30), ("hidden_size", 2**70)]
)
def test_numbers_of_a_damaged_file_do_not_take_all_memory(key, value):
    config = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    with pytest.raises(ConfigError, match=rf"{key}={value}.*at most"):
        LlamaForCausalLM.from_config(config | {key: value})
