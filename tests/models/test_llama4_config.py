"""Llama 4's config files of all versions are read; contradictions are rejected by name."""

from __future__ import annotations

import logging

import pytest

from lamella.config import Llama3Scaling, MLPConfig, MoEConfig, TemperatureConfig
from lamella.config.hf_config import HFConfig
from lamella.errors import ConfigError
from lamella.models import Llama4ForCausalLM, Llama4ForConditionalGeneration

pytestmark = pytest.mark.unit

BASE = {
    "architectures": ["Llama4ForCausalLM"],
    "model_type": "llama4_text",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "attention_chunk_size": 32,
}
# What the released checkpoints say beside their sizes, as they were written first.
EARLY = {
    "attention_bias": False, "attention_dropout": 0.0, "attn_scale": 0.1, "attn_temperature_tuning": 4,
    "bos_token_id": 200000, "cache_implementation": "hybrid", "eos_token_id": [200001, 200007, 200008],
    "floor_scale": 8192, "for_llm_compressor": False, "hidden_act": "silu", "initializer_range": 0.02,
    "interleave_moe_layer_step": 1, "max_position_embeddings": 10485760, "moe_layers": list(range(8)),
    "no_rope_layers": [], "num_experts_per_tok": 1, "num_local_experts": 16, "output_router_logits": False,
    "pad_token_id": 200018, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "use_cache": True, "use_qk_norm": True,
    "rope_scaling": {
        "factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
AROUND = {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "boi_token_index": 200080,
    "eoi_token_index": 200081, "image_token_index": 200092, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0", "vision_config": {"hidden_size": 1408},
}  # fmt: skip


def read(**changes):
    return Llama4ForCausalLM.read_config(HFConfig(BASE | changes, "config.json"))


def refused(match, **changes):
    with pytest.raises(ConfigError, match=match) as caught:
        read(**changes)
    assert "\n" not in str(caught.value)


def turns(config):
    return [int(layer.mixer.rope is not None) for layer in config.layers]


def chunks(config):
    return [layer.mixer.chunk for layer in config.layers]


def with_experts(config):
    return [index for index, layer in enumerate(config.layers) if isinstance(layer.feed_forward, MoEConfig)]


def test_defaults_for_rotation_chunks_and_experts():
    config = read()
    assert turns(config) == [1, 1, 1, 0] * 2 and chunks(config) == [32, 32, 32, None] * 2
    assert with_experts(config) == list(range(8))
    first, fourth = config.layers[0], config.layers[3]
    assert first.feed_forward == MoEConfig(num_experts=16, top_k=1, intermediate_size=48, shared_size=48)
    assert first.mixer.rope.theta == 500000.0 and first.mixer.rope.interleaved and first.mixer.rope.dim == 16
    assert first.mixer.qk_norm is not None and not first.mixer.qk_norm_weight and first.mixer.temperature is None
    assert fourth.mixer.qk_norm is None and fourth.mixer.temperature == TemperatureConfig(scale=0.1, floor_scale=8192)


def test_early_files_and_files_of_image_models_are_read():
    flat = read(**EARLY)
    scaling = flat.layers[0].mixer.rope.scaling
    assert scaling == Llama3Scaling(factor=16, low_freq_factor=1, high_freq_factor=1, original_length=8192)
    assert flat.layers[3].mixer.temperature == TemperatureConfig()
    assert flat.eos_token_ids == (200001, 200007, 200008) and flat.bos_token_id == 200000
    values = AROUND | {"text_config": BASE | EARLY}
    assert Llama4ForConditionalGeneration.read_config(HFConfig(values)) == flat
    outside = {key: EARLY[key] for key in ("bos_token_id", "eos_token_id")}
    inside = {key: value for key, value in (BASE | EARLY).items() if key not in outside}
    assert Llama4ForConditionalGeneration.read_config(HFConfig(AROUND | outside | {"text_config": inside})) == flat


@pytest.mark.parametrize("value", [4, True, 1.0, 0, False, 0.0, None])
def test_temperature_tuning_may_be_a_bool_or_a_number(value, caplog):
    with caplog.at_level(logging.INFO, "lamella"):
        config = read(attn_temperature_tuning=value, floor_scale=16.0, attn_scale=1)
    on = value is None or bool(value)
    assert config.layers[3].mixer.temperature == (TemperatureConfig(scale=1.0, floor_scale=16) if on else None)
    (line,) = (record.message for record in caplog.records if "temperature" in record.message)
    assert ("on" if on else "off") in line and ("the default" if value is None else repr(value)) in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"interleave_moe_layer_step": 2}, [1, 3, 5, 7]),
        ({"interleave_moe_layer_step": 3}, [2, 5]),
        ({"interleave_moe_layer_step": 0}, []),
        ({"interleave_moe_layer_step": 0, "moe_layers": []}, []),
        ({"moe_layers": [], "num_local_experts": 0, "num_experts_per_tok": 0}, []),
        ({"moe_layers": [6, 1], "interleave_moe_layer_step": 1}, [1, 6]),
    ],
)
def test_layers_with_experts(changes, expected):
    config = read(**changes)
    assert with_experts(config) == expected
    others = {layer.feed_forward for index, layer in enumerate(config.layers) if index not in expected}
    assert others <= {MLPConfig(intermediate_size=96)}


def test_layers_with_rope_and_layers_with_chunks():
    assert turns(read(no_rope_layer_interval=2)) == [1, 0] * 4
    assert turns(read(no_rope_layers=[0, 1] * 4)) == [0, 1] * 4
    assert turns(read(no_rope_layers=[0, 1] * 6)) == [0, 1] * 4  # as transformers reads a longer list
    assert chunks(read(no_rope_layers=[0, 1] * 4)) == [None, 32] * 4
    assert chunks(read(attention_chunk_size=None)) == [None] * 8
    kinds = ["full_attention"] * 4 + ["chunked_attention"] * 4
    config = read(layer_types=kinds)
    assert chunks(config) == [None] * 4 + [32] * 4 and turns(config) == [1, 1, 1, 0] * 2
    absent = {key: value for key, value in BASE.items() if key != "attention_chunk_size"}
    assert Llama4ForCausalLM.read_config(HFConfig(absent)).layers[0].mixer.chunk == 8192


def test_contradicting_values_are_rejected():
    refused("moe_layers=.*different layers below num_hidden_layers=8", moe_layers=[1, 8])
    refused("moe_layers=", moe_layers=[1, 1])
    refused("moe_layers=", moe_layers=[True])
    refused("moe_layers=3 .*must be a list", moe_layers=3)
    refused("no_rope_layers=.*a 0 or 1 for each of num_hidden_layers=8", no_rope_layers=[1, 0, 1])
    refused("no_rope_layers=", no_rope_layers=[2] * 8)
    refused("no_rope_layer_interval=0", no_rope_layer_interval=0)
    refused("layer_types=", layer_types=["chunked_attention"])
    refused("layer_types=", layer_types=["sliding_attention"] * 8)
    kinds = ["chunked_attention"] * 8
    refused("layer_types .*attention_chunk_size=null", layer_types=kinds, attention_chunk_size=None)
    refused("num_experts_per_tok=17 .*1 to num_local_experts=16", num_experts_per_tok=17)
    refused("num_experts_per_tok=0", num_experts_per_tok=0)
    refused("interleave_moe_layer_step=-1", interleave_moe_layer_step=-1)
    refused("partial_rotary_factor=0.5", partial_rotary_factor=0.5)
    refused("attn_temperature_tuning='yes'", attn_temperature_tuning="yes")
    refused("hidden_act='gelu'", hidden_act="gelu")
    refused("unknown keys .*quantization_config=", quantization_config={"quant_method": "fbgemm_fp8"})
    refused("text_config: unknown keys .*made_up=1", text_config=BASE | {"made_up": 1}, **dict.fromkeys(BASE))
    tied = {"text_config": BASE | {"tie_word_embeddings": True}, "tie_word_embeddings": False}
    refused("tie_word_embeddings=False contradicts text_config", **tied)


def test_the_scaling_of_early_conversions_is_used_with_a_warning(caplog):
    scaling = EARLY["rope_scaling"] | {"factor": 8.0, "high_freq_factor": 4.0}
    with caplog.at_level(logging.WARNING, "lamella"):
        assert read(rope_scaling=scaling).layers[0].mixer.rope.scaling.factor == 8
    assert "rope factor of 8 for 16 experts" in caplog.text


def test_a_step_of_zero_means_no_experts():
    layers = read(interleave_moe_layer_step=0, num_local_experts=0).layers
    assert all(isinstance(layer.feed_forward, MLPConfig) for layer in layers)


def test_experts_may_be_in_the_first_and_in_the_last_layer():
    layers = read(moe_layers=[0, 7], num_local_experts=4).layers
    assert [index for index, layer in enumerate(layers) if isinstance(layer.feed_forward, MoEConfig)] == [0, 7]
