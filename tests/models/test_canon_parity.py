"""LlamaCanon equals its formulas for every subset of canons and every option, on every path."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from helpers import assert_engine_parity, assert_plain_parity, canon_checkpoint, logprobs
from models.canon_oracle import CanonReferenceModel, read_hf

LENGTHS = (1, 2, 5, 70, 300)
SUBSETS = ["".join(letters) for count in range(5) for letters in combinations("ABCD", count)]
BIASES = {"attention_bias": True, "mlp_bias": True}
OPTIONS = {
    "residual off": {"canon_residual": False},
    "activation": {"canon_activation": True},
    "kernel 1": {"canon_kernel": 1},
    "kernel 1, bias, activation": {"canon_kernel": 1, "canon_bias": True, "canon_activation": True},
    "kernel 2": {"canon_kernel": 2},
    "letters that mean nothing": {"canon_set": "AbbCDx"},
    "kernel 3, bias": {"canon_kernel": 3, "canon_bias": True},
    "kernel 5, activation, no residual": {"canon_kernel": 5, "canon_activation": True, "canon_residual": False},
    "half rotation": {"rope_dim": 8, "partial_rotary_factor": 0.5},
    "no rotation": {"rope_dim": 0},
    "rope_dim beyond the head": {"rope_dim": 64},
    "qk_norm": {"qk_norm": True},
    "lingua rotation": {"rope_version": "lingua"},
    "lingua half rotation, qk_norm": {"rope_version": "lingua", "rope_dim": 8, "qk_norm": True},
    "biases, tied": BIASES | {"tie_word_embeddings": True},
    "groups of 4, qk_norm": {"num_attention_heads": 8, "num_key_value_heads": 2, "qk_norm": True},
    "one kv head": {"num_key_value_heads": 1},
    "no grouping": {"num_key_value_heads": None},
    "head_dim from hidden_size": {"head_dim": None, "num_attention_heads": 2},
    "intermediate_size from hidden_size": {"intermediate_size": None},
    "everything": BIASES
    | {"rope_version": "lingua", "rope_dim": 4, "qk_norm": True, "canon_bias": True, "canon_activation": True}
    | {"canon_kernel": 3, "tie_word_embeddings": True, "rope_theta": 1e5, "rms_norm_eps": 1e-3},
}
CASES = {f"set {letters or 'empty'}": {"canon_set": letters} for letters in SUBSETS} | OPTIONS


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = canon_checkpoint(tmp_path_factory.mktemp("canon"), **CASES[request.param])
    return folder, CanonReferenceModel(*read_hf(folder))


def test_plain_forward(case):
    assert_plain_parity(*case, LENGTHS)


def test_engine(case):
    assert_engine_parity(*case, LENGTHS, count=5)


@pytest.mark.parametrize(
    "change",
    [
        *({"canon_set": "ABCD".replace(letter, "")} for letter in "ABCD"),
        {"canon_residual": False},
        {"canon_activation": True},
        {"rope_dim": 8},
        {"rope_dim": 0},
        {"rope_version": "lingua"},
        {"qk_norm": False},
    ],
    ids=str,
)
def test_each_option_changes_the_logits(change, tmp_path):
    """An implementation that ignores an option would fail the tests above."""
    tensors, config = read_hf(canon_checkpoint(tmp_path, qk_norm=True))
    ids = torch.arange(100)[None]
    difference = logprobs(CanonReferenceModel(tensors, config | change)(ids)) - logprobs(
        CanonReferenceModel(tensors, config)(ids)
    )
    assert difference.abs().max() > 0.1
