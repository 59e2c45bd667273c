"""Apriel2 against an fp64 oracle that reads the files by itself: each mixer, hybrids, supernets under placements."""

from __future__ import annotations

import pytest
import torch
from apriel2_oracle import Apriel2ReferenceModel

from apriel2_models import ATTENTION, MIXERS, SUPERNET, checkpoint, fixed, pattern
from covering import covering, mostly_slow
from helpers import assert_engine_parity, assert_plain_parity, logprobs, plain_logits
from lamella.checkpoint import load_model, open_checkpoint
from lamella.parity import assert_parity, compare

LENGTHS = (1, 3, 4, 21)
BIASED = {name: {"bias": {"enabled": True}} for name in ("query_layer", "key_layer", "value_layer")}
MODELS = {
    "attention": fixed(MIXERS["attention"]),
    "attention, query and value biases": fixed(
        {**ATTENTION, "query_layer": BIASED["query_layer"], "value_layer": BIASED["value_layer"]}
    ),
    "attention, all biases": fixed({**ATTENTION, "add_linear_biases": True}),
    "one key head": fixed({**ATTENTION, "head_groups": 1}),
    "sliding window": fixed(MIXERS["sliding_window"]),
    "gdn": fixed(MIXERS["gdn"]),
    "gdn, one key head": fixed({**MIXERS["gdn"], "key_heads": 1, "norm_eps": 1e-3}),
    "gdn, kernel 2": fixed({**MIXERS["gdn"], "convolution_layer": {"kernel_size": 2}}),
    "kda": fixed(MIXERS["kda"]),
    "kda, sigmoid": fixed({**MIXERS["kda"], "normalization": {"activation": "sigmoid", "epsilon": 1e-3}}),
    "mamba": fixed(MIXERS["mamba"]),
    "mamba, repeated behind the convolution": fixed({**MIXERS["mamba"], "repeat_kv_before_conv": False}),
    "mamba, no biases": fixed({**MIXERS["mamba"], "conv_bias": False, "dt_proj_bias": False}),
    "mamba, linear biases": fixed({**MIXERS["mamba"], "add_linear_biases": True}),
    "layer norms": fixed(MIXERS["gdn"], normalization={"type": "layer_norm", "epsilon": 1e-3}),
    "block's own epsilon": fixed(MIXERS["attention"], normalization={"type": "rms_norm", "epsilon": 1e-2}),
    "not gated": fixed(
        MIXERS["kda"],
        mlp={"type": "mlp", "intermediate_size": 48, "activation": "relu2", "add_linear_biases": True},
    ),
    "gated gelu": fixed(
        MIXERS["mamba"],
        mlp={"type": "mlp", "intermediate_size": 48, "activation": "gelu_pytorch_tanh", "gated": True},
    ),
    "hybrid": pattern(["attention", "gdn", "kda", "mamba", "sliding_window"]),
    "tiled pattern": pattern(["kda", "attention"], layers=5),
    "tied head": fixed(MIXERS["gdn"]) | {"tie_word_embeddings": True},
    "supernet": fixed(SUPERNET),
}
PLACEMENTS = {
    "all-gdn": ["gdn"] * 3,
    "mamba,attention,kda": ["mamba", "attention", "kda"],
    "swa,mamba,attn": ["sliding_window", "mamba", "attention"],
    "every2nd-gdn": ["attention", "gdn", "attention"],
}


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_forward_equals_the_reference(tmp_path, name):
    folder = checkpoint(tmp_path, MODELS[name])
    assert_plain_parity(folder, Apriel2ReferenceModel(folder), LENGTHS)


@pytest.mark.parametrize("name", ["gdn", "kda", "mamba", "hybrid", "sliding window"])
def test_the_engine_equals_the_reference(tmp_path, name):
    folder = checkpoint(tmp_path, MODELS[name])
    assert_engine_parity(folder, Apriel2ReferenceModel(folder), (1, 3, 40, 70), count=4)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_placement_chooses_the_mixers(tmp_path, placement):
    folder = checkpoint(tmp_path, fixed(SUPERNET, layers=3))
    model = load_model(open_checkpoint(folder), dtype="float32")
    model.set_placement(placement)
    ids = torch.randint(0, 128, (1, 15))
    expected = Apriel2ReferenceModel(folder, PLACEMENTS[placement])(ids)
    assert (logprobs(plain_logits(model, ids)) - logprobs(expected)).abs().max() <= 1e-4


def test_a_single_bias_in_mamba_would_be_detected(tmp_path):
    """Control of the formula that looks like a mistake: with a single bias the reference differs."""
    folder = checkpoint(tmp_path, MODELS["mamba"])
    ids = torch.randint(0, 128, (1, 12))
    oracle = Apriel2ReferenceModel(folder)
    expected = logprobs(oracle(ids))
    for layer in range(2):
        oracle.tensors[f"model.decoder.blocks.{layer}.mixer.dt_proj.bias"] /= 2
    assert (logprobs(oracle(ids)) - expected).abs().max() > 1e-3


@covering(
    {"name": ["gdn", "kda", "mamba", "sliding window", "every5th kda"], "dtype": ["float32", "bfloat16"]}, strength=1
)
def test_parity_kit(tmp_path, name, dtype):
    """Check every path with its states, every operation, and the bf16 error against the reference's own."""
    values = MODELS.get(name) or pattern(["attention"] * 4 + ["kda"])
    folder = checkpoint(tmp_path, values)
    assert_parity(str(folder), dtype=dtype, prompts="random", count=8)


@pytest.mark.parametrize(
    "placement", mostly_slow([None, "all-gdn", "gdn,kda,mamba", "swa,attention,kda"], fast=["gdn,kda,mamba"])
)
def test_parity_kit_of_a_supernet(tmp_path, placement):
    folder = checkpoint(tmp_path, fixed(SUPERNET, layers=3))
    assert_parity(str(folder), dtype="bfloat16", prompts="random", count=8, placement=placement)


def test_the_tokenizers_end_of_text_ends_texts_beside_the_configs_default(tmp_path, caplog):
    """Exported configs contain the config class's 1 and 2 whatever the tokenizer."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    folder = checkpoint(tmp_path, MODELS["gdn"])
    Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "<end>": 3}, "a")).save(str(folder / "tokenizer.json"))
    opened = open_checkpoint(folder)
    model = opened.read_config()
    assert opened.eos_token_ids(model) == (2,) and not caplog.records
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<end>"}}')
    assert opened.eos_token_ids(model) == (2, 3)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert opened.eos_token_ids(model) == (2, 7, 3)


@pytest.mark.parametrize("name", ["gdn", "kda", "mamba"])
def test_two_thousand_decode_steps_do_not_drift(tmp_path, name):
    """Log-probabilities of a long continuation, token by token, against one full float64 forward."""
    values = fixed(MIXERS[name], layers=1) | {"embeddings": {"max_position_embeddings": 2048}}
    folder = checkpoint(tmp_path, values)
    result = compare(folder, dtype="float32", prompts="random", count=1, prompt_len=10, decode_len=1990, top=16)
    assert result.engine.max <= 1e-4


@pytest.mark.parametrize("length", [50, 51, 59, 60, 70])
def test_prompts_on_which_a_published_plugin_was_wrong(tmp_path, length):
    folder = checkpoint(tmp_path, MODELS["gdn"])
    assert_engine_parity(folder, Apriel2ReferenceModel(folder), [length], count=4)
