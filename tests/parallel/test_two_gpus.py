"""Two GPUs over NCCL equal one GPU, with and without CUDA graphs, and a dead worker causes no hang."""

from __future__ import annotations

import time

import pytest
import torch

from helpers import canon_checkpoint, hf_checkpoint, random_prompts
from lamella import LLM, SamplingParams
from lamella.errors import WorkerError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
PROMPTS = random_prompts([1, 2, 5, 17, 40, 130, 3, 33])
SCORED = SamplingParams(temperature=0, max_tokens=24, logprobs=3, prompt_logprobs=0, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama", "qwen3", "canon"])
def folder(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param)
    shape = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, head_dim=64)
    if request.param == "canon":
        return canon_checkpoint(made, num_key_value_heads=1, qk_norm=True, canon_bias=True, **shape)
    from transformers import LlamaConfig, Qwen3Config

    shape |= dict(vocab_size=128, num_key_value_heads=2, max_position_embeddings=512)
    hf_checkpoint(made, LlamaConfig(attention_bias=True, **shape) if request.param == "llama" else Qwen3Config(**shape))
    return made


def engine(folder, dtype, **options):
    return LLM(
        folder, device="cuda", dtype=dtype, max_num_seqs=8, max_num_batched_tokens=96, num_blocks=64, seed=5, **options
    )


def chosen(output):
    """Return the log-probabilities of the prompt's tokens and of the chosen tokens."""
    given = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return torch.tensor([next(iter(row.values())).logprob for row in given])


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_fp32_is_the_same(folder, enforce_eager):
    params = [SCORED] * 6 + [
        SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=20),
        SamplingParams(temperature=1.2, top_k=30, seed=4, max_tokens=20, repetition_penalty=1.2),
    ]
    expected = engine(folder, "float32", enforce_eager=enforce_eager).generate(PROMPTS, params, use_tqdm=False)
    llm = engine(folder, "float32", enforce_eager=enforce_eager, tensor_parallel_size=2)
    for _ in range(2):  # the second time over recycled memory
        for ours, theirs in zip(llm.generate(PROMPTS, params, use_tqdm=False), expected, strict=True):
            assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
            if ours.prompt_logprobs is not None:
                torch.testing.assert_close(chosen(ours), chosen(theirs), atol=1e-3, rtol=0)
    assert (llm.stats()["graph_steps"] > 0) == (not enforce_eager)
    llm.engine.close()


def test_bf16_differs_by_rounding(folder):
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, logprobs=0)
    one, two = (engine(folder, "bfloat16", tensor_parallel_size=size) for size in (1, 2))
    outputs = [llm.generate(PROMPTS, params, use_tqdm=False) for llm in (one, two)]
    ours, theirs = (torch.cat([chosen(output)[:-1] for output in some]) for some in outputs)
    assert (ours - theirs).square().mean().sqrt() < 0.1
    two.engine.close()


@pytest.mark.parametrize("enforce_eager", [True, False], ids=["eager", "graphs"])
def test_a_killed_worker_raises_an_error_without_hanging(folder, enforce_eager):
    llm = engine(folder, "bfloat16", tensor_parallel_size=2, enforce_eager=enforce_eager)
    stream = llm.stream(PROMPTS[3], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    next(stream)
    llm.engine.workers._ranks[0].process.kill()
    start = time.monotonic()
    with pytest.raises(WorkerError, match="rank 1 ended with exit code -9"):
        list(stream)
    assert time.monotonic() - start < 20
