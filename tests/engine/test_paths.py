"""All paths give equal tokens: chunks, batches, preemption, and recycled memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers import canon_checkpoint, greedy, poisoned_llm, random_prompts
from lamella import LLM, SamplingParams
from lamella.models import LlamaCanonForCausalLM

PROMPTS = random_prompts([1, 2, 3, 4, 5, 17, 40, 130])
PARAMS = SamplingParams(temperature=0, max_tokens=20, logprobs=0, prompt_logprobs=0)
BUDGETS = (3, 4, 5, 16, 64, 2048)


@pytest.fixture(scope="module", params=["full", "windowed"])
def checkpoint(request, tmp_path_factory) -> Path:
    """Return a canon model; the second variant rotates adjacent pairs on half of each head, with all options."""
    folder = tmp_path_factory.mktemp("canon")
    if request.param == "full":
        return canon_checkpoint(folder, qk_norm=True)
    return canon_checkpoint(
        folder, rope_dim=8, rope_version="lingua", canon_kernel=3, canon_bias=True, canon_activation=True
    )


@pytest.fixture(scope="module")
def expected(checkpoint) -> list[list[int]]:
    model = LlamaCanonForCausalLM.from_pretrained(checkpoint)
    return [
        greedy(lambda ids: model.compute_logits(model(ids)), prompt["prompt_token_ids"], PARAMS.max_tokens)
        for prompt in PROMPTS
    ]


def tokens(outputs) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("seqs", [1, 2, 8])
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_and_batch_sizes(checkpoint, expected, budget, seqs):
    llm = poisoned_llm(checkpoint, max_num_batched_tokens=budget, max_num_seqs=seqs)
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
    stats = llm.stats()
    assert stats["blocks_used"] == stats["slots_used"] == stats["preemptions"] == 0


@pytest.mark.parametrize("budget", BUDGETS)
def test_preemption(checkpoint, expected, budget):
    llm = poisoned_llm(checkpoint, max_num_batched_tokens=budget, max_num_seqs=8, num_blocks=40, block_size=4)
    assert tokens(llm.generate(PROMPTS[::-1], PARAMS, use_tqdm=False)) == expected[::-1]
    assert llm.stats()["preemptions"] > 0 or budget < 16


def test_preemption_keeps_logprobs(checkpoint, expected):
    roomy = poisoned_llm(checkpoint).generate(PROMPTS, PARAMS, use_tqdm=False)
    llm = poisoned_llm(checkpoint, max_num_seqs=8, max_num_batched_tokens=64, num_blocks=40, block_size=4)
    outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert llm.stats()["preemptions"] > 0
    for prompt, ours, theirs in zip(PROMPTS, outputs, roomy, strict=True):
        assert len(ours.prompt_logprobs) == len(prompt["prompt_token_ids"])
        assert len(ours.outputs[0].logprobs) == PARAMS.max_tokens
        for mine, other in zip(
            ours.prompt_logprobs[1:] + ours.outputs[0].logprobs,
            theirs.prompt_logprobs[1:] + theirs.outputs[0].logprobs,
            strict=True,
        ):
            assert mine.keys() == other.keys()
            for token in mine:
                assert mine[token].logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_recycled_slot_leaks_no_state(checkpoint, expected):
    llm = poisoned_llm(checkpoint, max_num_seqs=1)
    for prompt, tokens_ in zip(PROMPTS[::-1], expected[::-1], strict=True):
        assert tokens(llm.generate([prompt], PARAMS, use_tqdm=False)) == [tokens_]


def test_other_requests_change_nothing(checkpoint, expected):
    llm = poisoned_llm(checkpoint, max_num_seqs=16, max_num_batched_tokens=50)
    strangers = random_prompts([7, 33, 90, 1, 2, 61], seed=9)
    noisy = SamplingParams(temperature=1.0, max_tokens=31, seed=3)
    mixed = [p for pair in zip(PROMPTS[:6], strangers, strict=True) for p in pair]
    outputs = llm.generate(mixed, [PARAMS, noisy] * 6, use_tqdm=False)
    assert tokens(outputs[::2]) == expected[:6]


def test_samples_depend_on_the_seed_and_not_on_the_batch(checkpoint):
    params = [SamplingParams(temperature=1.5, top_k=40, top_p=0.9, max_tokens=20, seed=s) for s in range(len(PROMPTS))]
    alone = [
        tokens(poisoned_llm(checkpoint).generate([prompt], some, use_tqdm=False))[0]
        for prompt, some in zip(PROMPTS, params, strict=True)
    ]
    together = poisoned_llm(checkpoint, max_num_seqs=3, max_num_batched_tokens=16, num_blocks=40, block_size=4)
    assert tokens(together.generate(PROMPTS, params, use_tqdm=False)) == alone


def test_the_portable_path_agrees(checkpoint, expected, monkeypatch):
    monkeypatch.setattr("lamella.ops.backend.native.available", lambda: False)
    llm = poisoned_llm(checkpoint, max_num_batched_tokens=16, max_num_seqs=8, num_blocks=40, block_size=4)
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("budget", BUDGETS)
def test_cuda_gives_the_same_tokens(checkpoint, expected, budget):
    llm = LLM(checkpoint, device="cuda", max_num_batched_tokens=budget, max_num_seqs=8)
    llm.engine.memory.poison()
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_forward_does_not_synchronize_with_the_device(checkpoint, expected):
    llm = LLM(checkpoint, device="cuda", max_num_batched_tokens=16, max_num_seqs=8)
    forward = llm.engine.model.forward

    def watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    llm.engine.model.forward = watched
    assert tokens(llm.generate(PROMPTS, PARAMS, use_tqdm=False)) == expected
