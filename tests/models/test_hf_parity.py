"""Llama and Qwen3 compute what `transformers` computes, for every rotation, bias and head layout, on every path."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpers import (
    SHAPE,
    assert_engine_parity,
    assert_plain_parity,
    hf_checkpoint,
    logprobs,
    plain_logits,
    random_prompts,
)
from lamella import LLM, SamplingParams
from lamella.checkpoint import load_model, open_checkpoint
from lamella.layers.norm import RMSNorm
from lamella.models import LlamaForCausalLM
from lamella.ops.rms_norm import rms_norm

LENGTHS = (1, 3, 70, 300)
TRAINED = 128  # tokens
BIASES = {"attention_bias": True, "mlp_bias": True}
TIED = {"tie_word_embeddings": True}
ONE_KV_HEAD = {"num_key_value_heads": 1}
WIDE_GROUPS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16}


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8.0, "beta_slow": 1.0}
ROPES = {
    "linear": rope("linear", factor=4.0) | {"max_position_embeddings": 128},
    "llama3": rope("llama3", **LLAMA3),
    "llama3 step": rope("llama3", **LLAMA3 | {"high_freq_factor": 1.0}),
    "yarn": rope("yarn", **YARN),
    "yarn default betas": rope("yarn", factor=4.0, original_max_position_embeddings=128),
    "yarn mscale": rope("yarn", **YARN, mscale=1.0, mscale_all_dim=0.5),
    "yarn attention_factor": rope("yarn", **YARN, attention_factor=1.3),
    "yarn untruncated": rope("yarn", **YARN, truncate=False),
}
LLAMA = {
    "plain": {},
    "biases": BIASES,
    "tied": TIED,
    "groups of 4": WIDE_GROUPS,
    "one kv head, biases, tied": ONE_KV_HEAD | BIASES | TIED,
    "other theta and eps": rope("default") | {"rms_norm_eps": 1e-2},
    "linear": ROPES["linear"],
    "linear, biases, tied": ROPES["linear"] | BIASES | TIED,
    "llama3": ROPES["llama3"] | WIDE_GROUPS,
    "llama3, biases": ROPES["llama3"] | BIASES,
    "llama3 step": ROPES["llama3 step"] | ONE_KV_HEAD,
    "yarn": ROPES["yarn"] | BIASES,
    "yarn default betas": ROPES["yarn default betas"] | TIED,
    "yarn mscale": ROPES["yarn mscale"] | WIDE_GROUPS,
    "yarn attention_factor": ROPES["yarn attention_factor"] | ONE_KV_HEAD,
    "yarn untruncated": ROPES["yarn untruncated"],
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# head_dim 32 is twice hidden_size / num_attention_heads.
QWEN3 = {
    "plain": {},
    "biases, tied": {"attention_bias": True} | TIED,
    "one kv head, yarn": ONE_KV_HEAD | ROPES["yarn"],
    "linear": ROPES["linear"],
    "llama3": ROPES["llama3"],
    "window from layer 1": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "window of 1": {"use_sliding_window": True, "sliding_window": 1, "max_window_layers": 1},
    "mixed layer_types": {
        "use_sliding_window": True,
        "sliding_window": 33,
        "layer_types": MIXED,
        "attention_bias": True,
    },
    "window without its switch": {"sliding_window": 20, "max_window_layers": 0},
}
QWEN3 = {name: {"head_dim": 32, "num_hidden_layers": 3, **changes} for name, changes in QWEN3.items()}
CASES = {f"llama: {k}": LlamaConfig(**SHAPE | v) for k, v in LLAMA.items()} | {
    f"qwen3: {k}": Qwen3Config(**SHAPE | v) for k, v in QWEN3.items()
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(folder, logits of the transformers model)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = hf_checkpoint(folder, CASES[request.param])
    return folder, lambda ids: model(ids, use_cache=False).logits


def test_plain_forward(case):
    assert_plain_parity(*case, LENGTHS)


def test_engine(case):
    assert_engine_parity(*case, LENGTHS)


@pytest.mark.parametrize("name", ROPES)
def test_each_rope_scaling_changes_the_logits(name, tmp_path):
    """Control: different RoPE scalings give clearly different logits."""
    logits_of = hf_checkpoint(tmp_path, LlamaConfig(**SHAPE | ROPES[name]))
    ours = load_model(open_checkpoint(tmp_path))
    unscaled = LlamaForCausalLM.from_config(LlamaConfig(**SHAPE))
    unscaled.load_state_dict(ours.state_dict())
    ids = torch.arange(100)[None]
    assert (logprobs(plain_logits(unscaled, ids)) - logprobs(logits_of(ids).logits)).abs().max() > 0.1


def test_a_whole_number_as_factor(tmp_path):
    model = hf_checkpoint(tmp_path, LlamaConfig(**SHAPE | ROPES["linear"]))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"]["factor"] == 4.0
    config["rope_parameters"] |= {"factor": 4, "rope_theta": 10000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_plain_parity(tmp_path, lambda ids: model(ids).logits, LENGTHS)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """(folder, logits of the transformers model), scaled beyond TRAINED tokens.

    transformers scales by the longest position so far, lamella by the engine's `max_model_len`.
    """
    folder = tmp_path_factory.mktemp("dynamic")
    config = SHAPE | {"max_position_embeddings": TRAINED} | rope("dynamic", factor=3.0) | BIASES
    model = hf_checkpoint(folder, LlamaConfig(**config))

    def logits_of(ids):
        model(torch.zeros(1, 1, dtype=torch.long))  # a short text takes the rotation back to the trained one
        return model(ids, use_cache=False).logits

    return folder, logits_of


def test_dynamic_within_the_trained_length(dynamic):
    assert_plain_parity(*dynamic, (1, 70, TRAINED))
    assert_engine_parity(*dynamic, (1, 70, TRAINED - 8), max_model_len=TRAINED)


@pytest.mark.parametrize("length", [TRAINED + 1, 300])
def test_dynamic_beyond_the_trained_length(dynamic, length):
    folder, logits_of = dynamic
    assert_plain_parity(folder, logits_of, (length,), max_length=length)

    def at_full_length(ids):
        """Return logits with the rotation for `length` tokens; later tokens do not change the logits of a token."""
        filled = torch.nn.functional.pad(ids, (0, length - ids.shape[1]))
        return logits_of(filled)[:, : ids.shape[1]]

    assert_engine_parity(folder, at_full_length, (1, 70, length - 8), max_model_len=length)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_norms_that_round_twice(tmp_path, device):
    """With `round_norms_twice`, every norm in an engine's steps is bitwise equal to transformers' norm."""
    hf_checkpoint(tmp_path, Qwen3Config(**SHAPE)).to(torch.bfloat16).save_pretrained(tmp_path)
    # Without graphs, in whose replays no hook is called.
    llm = LLM(tmp_path, device=device, num_blocks=32, round_norms_twice=True, enforce_eager=True)
    seen, once_differs = set(), False

    def check(norm, inputs, result):
        nonlocal once_differs
        seen.add(norm)
        normed, total = (result, inputs[0]) if len(inputs) == 1 else result
        assert torch.equal(total, sum(inputs[1:], inputs[0]))
        theirs = Qwen3RMSNorm(norm.weight.shape[0], norm.eps).to(device)
        theirs.weight.data = norm.weight.to(torch.bfloat16)
        assert torch.equal(normed, theirs(total))
        once_differs |= not torch.equal(normed, rms_norm(total, norm.weight, norm.eps))

    norms = [module for module in llm.engine.model.modules() if isinstance(module, RMSNorm)]
    for norm in norms:
        norm.register_forward_hook(check)
    llm.generate(random_prompts([5, 20]), SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)
    assert seen == set(norms) and len(norms) == 4 * SHAPE["num_hidden_layers"] + 1
    assert once_differs
