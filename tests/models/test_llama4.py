"""Llama 4 computes what `transformers` computes, on every path; what makes it another model shows."""

from __future__ import annotations

import pytest
from transformers import Llama4TextConfig

from helpers import VOCAB, assert_engine_parity, assert_plain_parity, hf_checkpoint

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
    "chunk that no page ends with": {"attention_chunk_size": 21},
    "temperature off": {"attn_temperature_tuning": False},
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
}
CASES["explicit layer_types"]["num_hidden_layers"] = 6


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(folder, logits of the transformers model)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = hf_checkpoint(folder, Llama4TextConfig(**SHAPE | CASES[request.param]))
    return folder, lambda ids: model(ids, use_cache=False).logits


def test_plain_forward(case):
    assert_plain_parity(*case, LENGTHS)


def test_engine(case):
    assert_engine_parity(*case, LENGTHS)
