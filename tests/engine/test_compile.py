"""Compiled layers: one program per kind of part, results equal to eager ones, and no further compilation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from apriel2_models import ATTENTION, MIXERS, checkpoint, fixed, pattern
from covering import mostly_slow
from helpers import VOCAB, canon_config, poisoned_llm, random_prompts, randomize, save_lamella
from image_models import image, image_checkpoint, image_prompt
from lamella import LLM, SamplingParams
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.layers.compiled.model import CompiledModel
from lamella.layers.context import forward_batch
from lamella.layers.decoder import plain_batch
from lamella.models import CausalLM, resolve_architecture
from lamella.ops.backend import portable_only


def llama(layers: int) -> dict[str, Any]:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, **sizes}


def llama4(layers: int, step: int) -> dict[str, Any]:
    """Return a Llama 4 config: every 4th layer has a temperature and no RoPE or norm; every `step`-th has experts."""
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 40, "interleave_moe_layer_step": step}
    chunks = {"attention_chunk_size": 16, "floor_scale": 4, "attn_scale": 0.5}
    shape = {"architectures": ["Llama4ForCausalLM"], "head_dim": 8, "num_key_value_heads": 2}
    return llama(layers) | experts | chunks | shape


def hybrid(layers: int) -> dict[str, Any]:
    return pattern(["attention", "gdn", "gdn"], layers=layers)


def all_mixers(layers: int) -> dict[str, Any]:
    """Return a supernet config with five mixers; attention and sliding window compile to the same kind of part."""
    return pattern(["attention", "gdn", "kda", "mamba", "sliding_window"], layers=layers)


KINDS: dict[str, tuple[Callable[[int], dict[str, Any]], int]] = {
    "llama": (llama, 2),
    "scout": (lambda layers: llama4(layers, 1), 2),
    "maverick": (lambda layers: llama4(layers, 2), 3),
    "canon": (lambda layers: canon_config(num_hidden_layers=layers), 2),
    "hybrid": (hybrid, 3),
    "all mixers": (all_mixers, 5),
}
PROMPTS = random_prompts([1, 2, 5, 17, 40, 33])
PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=VOCAB, ignore_eos=True)


def build(config: dict[str, Any]) -> CausalLM:
    model = resolve_architecture(config["architectures"][0]).from_config(config).eval().requires_grad_(False)
    randomize(model, 0)
    return model


def graphs() -> int:
    """Return the number of compiled graphs in this process so far."""
    return counters["stats"]["unique_graphs"]


@torch.inference_mode()
def forward(call: Callable, tokens: int) -> torch.Tensor:
    ids = torch.arange(tokens) % VOCAB
    with forward_batch(plain_batch(ids)):
        return call(ids)


def portable(model: CausalLM) -> torch.Tensor:
    with portable_only():
        return forward(model, 40)


def logprobs(outputs: list) -> torch.Tensor:
    """Return the log-probabilities of all tokens at the prompt and output positions."""
    rows = [row for output in outputs for row in [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]]
    return torch.tensor([[row[index].logprob for index in range(VOCAB)] for row in rows])


@pytest.mark.parametrize("name", mostly_slow(list(KINDS), fast=["maverick", "canon", "all mixers"]))
def test_one_program_per_kind_of_part_at_any_depth(name):
    make, kinds = KINDS[name]
    for layers in (5, 9):
        model = build(make(layers))
        sizes = (64, 33, 128, 7, 2, 32, 8)
        expected, exact = [forward(model, size) for size in sizes], portable(model)
        before, compiled = graphs(), CompiledModel(model)
        compiled.warm_up()
        assert graphs() - before == kinds
        for size, hidden in zip(sizes, expected, strict=True):
            torch.testing.assert_close(forward(compiled, size), hidden, rtol=0, atol=1e-4)
        assert graphs() - before == kinds
        assert torch.equal(portable(model), exact)  # parts that a layer was given change no bit


@pytest.mark.parametrize("name", ["maverick", "canon", "all mixers"])
def test_every_path_gives_the_eager_log_probabilities(name, tmp_path):
    config = KINDS[name][0](5)
    folder = save_lamella(build(config), config, tmp_path / "model")
    options = {"dtype": "float32", "max_model_len": 64, "max_num_batched_tokens": 16, "block_size": 4}
    scored = SamplingParams(temperature=0, max_tokens=16, logprobs=VOCAB, prompt_logprobs=VOCAB, ignore_eos=True)
    eager, compiled = (
        poisoned_llm(folder, enable_compile=on, max_num_seqs=6, num_blocks=18, **options) for on in (False, True)
    )
    known = graphs()
    # In chunks, beside others, preempted; alone, with steps of one token; by the prefix cache.
    for prompts, params in (
        (PROMPTS[::-1], scored),
        (PROMPTS[:1], scored),
        (PROMPTS[4:5], PARAMS),
        (PROMPTS[4:5], PARAMS),
    ):
        outputs, expected = (llm.generate(prompts, params, use_tqdm=False) for llm in (compiled, eager))
        assert (logprobs(outputs) - logprobs(expected)).abs().max() < 1e-4
        assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in expected]
    stats = compiled.stats()
    assert stats["preemptions"] > 0
    assert stats["prefix_hit_tokens"] > 0
    assert graphs() == known


def test_image_embeddings_enter_compiled_layers(tmp_path):
    image_checkpoint(tmp_path)
    given, other = (image_prompt(image("2 x 2", seed)) for seed in (0, 1))
    options = {"device": "cpu", "dtype": "float32", "num_blocks": 200, "max_num_batched_tokens": 7}
    eager, compiled = (LLM(tmp_path, **options, enable_compile=wanted) for wanted in (False, True))
    params = replace(PARAMS, prompt_logprobs=5)
    expected, found, another = (
        llm.generate(prompt, params, use_tqdm=False)[0].prompt_logprobs[1:]
        for llm, prompt in ((eager, given), (compiled, given), (compiled, other))
    )
    chosen = [{token: value.logprob for token, value in row.items()} for row in expected]
    assert chosen == [pytest.approx({t: row[t].logprob for t in row}, abs=1e-4) for row in found]
    assert len(another) == len(found) and [set(row) for row in another] != [set(row) for row in found]


def test_further_compilation_raises_with_reason(tmp_path):
    config = llama(3)
    llm = poisoned_llm(save_lamella(build(config), config, tmp_path / "model"), enable_compile=True)
    known = graphs()
    llm.engine.model.model.layers[1].feed_forward_norm.eps = 0.5
    with pytest.raises(RuntimeError, match=r"(?s)_run_feed_forward_0.*eps"):
        llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False)
    assert graphs() == known


def test_placement_switch_compiles_new_mixers(tmp_path):
    supernet = {"type": "stochastic", "main_mixer_name": "attention"}
    mixers = {"attention": ATTENTION, "sliding_window": MIXERS["sliding_window"], "gdn": MIXERS["gdn"]}
    folder = checkpoint(tmp_path / "supernet", fixed({**supernet, "mixers": mixers}, layers=3))
    before = graphs()
    llm = poisoned_llm(folder, enable_compile=True)
    for placement, programs in (
        ("all-attention", 2),
        ("swa,attention,swa", 2),
        ("gdn,attention,gdn", 3),
        ("all-gdn", 3),
        ("all-attention", 3),
    ):
        llm.set_placement(placement)
        expected = poisoned_llm(folder, placement=placement).generate(PROMPTS, PARAMS, use_tqdm=False)
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert (logprobs(outputs) - logprobs(expected)).abs().max() < 1e-4
        assert graphs() - before == programs


def test_uncompilable_models_raise_config_error():
    model = build(llama(2))
    model.model.layers[0].feed_forward.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(ConfigError, match=r"^enable_compile=True: torch.compile fails: .+$"):
        CompiledModel(model).warm_up()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enforce_eager": True}, "enforce_eager"),
        ({"mixed_placements": True}, "mixed_placements"),
        ({"device": "cuda"}, "device='cuda'"),
        ({"enable_compile": 1}, "must be True or False"),
    ],
)
def test_contradicting_options_raise_one_line(options, named, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(ConfigError, match=rf"^enable_compile=.*{named}.*$"):
        EngineOptions(**{"model": Path("nowhere"), "enable_compile": True, **options}).resolve_device()


def test_llm_accepts_enable_compile():
    with pytest.raises(ConfigError, match="enforce_eager"):
        LLM("nowhere", enable_compile=True, enforce_eager=True)
