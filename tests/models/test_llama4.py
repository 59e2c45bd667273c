"""Llama 4 equals `transformers` on every path, and changed settings are detected."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Llama4TextConfig

from helpers import VOCAB, assert_engine_parity, assert_plain_parity, hf_checkpoint, logprobs, plain_logits
from lamella.checkpoint import load_model, open_checkpoint
from lamella.config import AttentionConfig, RopeConfig
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.moe import MoE
from lamella.layers.rotary import Rotary, inverse_frequencies
from lamella.ops.moe import reference
from lamella.ops.operands import Rope
from lamella.ops.rotary import rotate

LENGTHS = (1, 15, 16, 17, 70, 200)
CHUNK = 16
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "attention_chunk_size": CHUNK,
    "floor_scale": 24,
    "attn_scale": 0.3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
}
SCOUT_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES = {
    "scout": {"rope_parameters": SCOUT_ROPE},
    "maverick": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_local_experts": 8},
    "top 2": {"num_experts_per_tok": 2},
    "top 3 of 3": {"num_experts_per_tok": 3, "num_local_experts": 3},
    "llama3": {"rope_parameters": SCOUT_ROPE | {"factor": 8.0, "high_freq_factor": 4.0}},
    "explicit moe_layers": {"moe_layers": [0, 3]},
    "dense": {"moe_layers": [], "attention_bias": True},
    "explicit no_rope_layers": {"no_rope_layers": [0, 1, 1, 0]},
    "explicit layer_types": {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"] * 2},
    "chunk beyond the text": {"attention_chunk_size": 4096},
    "chunk that no block ends with": {"attention_chunk_size": 21},
    "temperature off": {"attn_temperature_tuning": False},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}
CASES["explicit layer_types"]["num_hidden_layers"] = 6
CONFIGS = {name: Llama4TextConfig(**SHAPE | changes) for name, changes in CASES.items()}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request, tmp_path_factory):
    """(folder, logits of the transformers model)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = hf_checkpoint(folder, CONFIGS[request.param])
    return folder, lambda ids: model(ids, use_cache=False).logits


def test_plain_forward(case):
    assert_plain_parity(*case, LENGTHS)


def test_engine(case):
    assert_engine_parity(*case, LENGTHS)


# What makes it another model: each of these is a mistake that one may make.


@pytest.fixture(scope="module", params=["scout", "maverick", "top 2"])
def scout(request, tmp_path_factory):
    """(our model, logits of the transformers model, tokens)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = hf_checkpoint(folder, CONFIGS[request.param])
    ids = torch.randint(VOCAB, (1, 90), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = logprobs(model(ids, use_cache=False).logits)[0]
    return load_model(open_checkpoint(folder)), expected, ids


def errors(model: LanguageModel, expected: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the largest error of every position."""
    return (logprobs(plain_logits(model, ids))[0] - expected).abs().amax(-1)


def with_mixers(model: LanguageModel, change: Callable[[AttentionConfig], dict[str, Any]]) -> LanguageModel:
    """Return a model with the same weights and other attention settings."""
    layers = tuple(replace(layer, mixer=replace(layer.mixer, **change(layer.mixer))) for layer in model.config.layers)
    other = LanguageModel(replace(model.config, layers=layers), LocalKit())
    other.load_state_dict(model.state_dict())
    return other


def test_unchanged_settings_give_the_reference(scout):
    assert errors(with_mixers(scout[0], lambda mixer: {}), *scout[1:]).max() <= 1e-4


def test_rotating_halves_changes_the_logits(scout):
    def halves(mixer):
        return {"rope": None if mixer.rope is None else replace(mixer.rope, interleaved=False)}

    found = errors(with_mixers(scout[0], halves), *scout[1:])
    assert found[0] <= 1e-4 and found[1:].max() > 0.3


def test_without_chunks_the_first_chunk_is_right(scout):
    found = errors(with_mixers(scout[0], lambda mixer: {"chunk": None}), *scout[1:])
    assert found[:CHUNK].max() <= 1e-4 and found[CHUNK:].max() > 0.3


def test_a_window_differs_from_a_chunk(scout):
    found = errors(with_mixers(scout[0], lambda mixer: {"chunk": None, "window": mixer.chunk}), *scout[1:])
    assert found[:CHUNK].max() <= 1e-4 and found[CHUNK:].max() > 0.3


def test_without_temperature_positions_before_the_floor_scale_are_right(scout):
    found = errors(with_mixers(scout[0], lambda mixer: {"temperature": None}), *scout[1:])
    first = SHAPE["floor_scale"] - 1
    assert found[:first].max() <= 1e-4 and found[first] > 1e-3


def test_weighting_outputs_of_experts_changes_the_logits(scout, monkeypatch):
    def weigh_outputs(x, logits, top_k, *weights):
        total = torch.zeros_like(x)
        for expert, factor in zip(*(part.T for part in reference.route(logits, top_k)), strict=True):
            alone = torch.full_like(logits, -1e4).scatter(1, expert[:, None], 1e4)  # whose weight is 1
            total += factor[:, None] * reference.experts(x, alone, 1, *weights)
        return total

    monkeypatch.setattr("lamella.ops.moe.experts", weigh_outputs)
    assert errors(*scout).max() > 0.1


def test_a_head_norm_may_be_applied_before_the_rotation(scout):
    """True for a norm without weight; the GPU kernels rely on it."""
    norm = torch.nn.functional.rms_norm
    for layer in scout[0].model.layers:
        mixer = layer.mixer
        if mixer.config.qk_norm is None:
            continue
        qkv = torch.randn(7, sum(mixer.sizes))
        rope = Rope(*mixer.rotary.angles(torch.arange(7)), interleaved=True)
        q, k, _ = (part.unflatten(-1, (-1, 16)) for part in qkv.split(mixer.sizes, -1))
        before = rotate(norm(q, (16,), eps=1e-5), norm(k, (16,), eps=1e-5), rope)
        after = (norm(part, (16,), eps=1e-5) for part in rotate(q, k, rope))
        for ours, theirs in zip(before, after, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", [1_000_000, 10_000_000])
def test_angles_in_a_chunk_stay_exact_at_large_positions(position):
    """Compare differences of angles within a chunk with fp64, for chunk positions and for absolute positions."""
    rope = RopeConfig(dim=128, theta=500000.0, interleaved=True)
    index = torch.arange(position, position + 8192) // 8192 * 8192 + torch.arange(8192)
    frequencies = inverse_frequencies(rope).double()
    wide = (index % 8192).double()[:, None] * frequencies
    errors = []
    for period in (8192, None):
        cos, sin = Rotary(rope, torch.device("cpu"), period).angles(index)
        turns = torch.complex(cos.double(), sin.double())
        turns = turns * turns[0].conj()  # relative to the chunk's first token
        expected = torch.polar(torch.ones_like(wide), wide - wide[0])
        errors.append(float((turns - expected).abs().max()))
    assert errors[0] < 5e-4 and errors[1] > 50 * errors[0]


def test_names_of_vllms_model_class_exist(scout):
    model, expected, ids = scout
    logits = torch.randn(5, 4)
    weights, experts = MoE.custom_routing_function(torch.empty(5, 64), logits, 2, False)
    assert weights.dtype == torch.float32 and experts.dtype == torch.int32
    torch.testing.assert_close(weights, logits.topk(2).values.sigmoid())
    with pytest.raises(ValueError, match="renormalize=True"):
        MoE.custom_routing_function(torch.empty(5, 64), logits, 2, True)
    assert model.is_heterogeneous

    # Permuted in every layer, unrotated ones too, the weights are those of an engine that turns halves.
    other = with_mixers(model, lambda m: {"rope": None if m.rope is None else replace(m.rope, interleaved=False)})
    for index, layer in enumerate(other.model.layers):
        weight = layer.mixer.qkv_proj.weight
        parts = weight.detach().split(layer.mixer.sizes)
        names = (f"model.layers.{index}.self_attn.{part}_proj.weight" for part in "qkv")
        permuted = [model.permute_qk_weight_for_rotary(*pair)[1] for pair in zip(names, parts, strict=True)]
        assert torch.equal(permuted[2], parts[2])
        with torch.no_grad():
            weight.copy_(torch.cat(permuted))
    assert errors(other, expected, ids).max() <= 1e-4
