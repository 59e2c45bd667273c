"""Asynchronous scheduling: steps launched before the previous one is collected give equal outputs."""

from __future__ import annotations

import pytest

from helpers import canon_checkpoint, poisoned_llm, random_prompts
from lamella import SamplingParams

PROMPTS = random_prompts([1, 2, 5, 17, 40, 130, 3, 33])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return canon_checkpoint(tmp_path_factory.mktemp("canon"), qk_norm=True)


def mixed_params() -> list[SamplingParams]:
    """Return parameters of all kinds of requests that depend on the previous step."""
    return [
        SamplingParams(temperature=0, max_tokens=20, logprobs=2, prompt_logprobs=0),
        SamplingParams(temperature=1.2, seed=1, max_tokens=1),
        SamplingParams(temperature=0.9, seed=2, max_tokens=15, stop_token_ids=list(range(0, 128, 3))),
        SamplingParams(temperature=1.5, seed=3, top_k=30, top_p=0.8, max_tokens=25, n=3),
        SamplingParams(temperature=0, max_tokens=12, repetition_penalty=1.3, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=18, min_tokens=6, stop_token_ids=list(range(128))),
        SamplingParams(temperature=1.0, seed=4, max_tokens=22, logit_bias={5: 4.0}, min_p=0.01),
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    ]


def result(outputs):
    return [(c.token_ids, c.finish_reason, c.stop_reason) for out in outputs for c in out.outputs]


def logprobs(outputs):
    """Return the log-probabilities of the last request's sampled tokens and prompt tokens."""
    rows = [*outputs[-1].prompt_logprobs[1:], *outputs[-1].outputs[0].logprobs]
    return [next(iter(row.values())).logprob for row in rows]


OPTIONS = [
    dict(max_num_batched_tokens=64, max_num_seqs=8),
    dict(max_num_batched_tokens=5, max_num_seqs=3),
    dict(max_num_batched_tokens=64, max_num_seqs=16, num_blocks=40, block_size=4),
    dict(max_num_batched_tokens=16, max_num_seqs=6, block_size=4, enable_prefix_caching=False),
]


@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
@pytest.mark.parametrize("penalties", [False, True])
def test_asynchronous_outputs_equal_synchronous_outputs(checkpoint, options, penalties):
    pairs = [pair for pair in zip(PROMPTS, mixed_params(), strict=True) if penalties or pair[1].repetition_penalty == 1]
    prompts, params = (list(part)[::-1] for part in zip(*pairs, strict=True))
    expected = poisoned_llm(checkpoint, **options).generate(prompts, params, use_tqdm=False)
    llm = poisoned_llm(checkpoint, **options)
    llm.engine.runner.async_scheduling = True

    for _ in range(2):  # the second time over recycled memory, and prefixes of the first
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert result(outputs) == result(expected)
        assert logprobs(outputs) == pytest.approx(logprobs(expected), abs=1e-4)
        stats = llm.stats()
        assert stats["blocks_used"] == stats["slots_used"] == 0
        assert not llm.engine.has_work
    if "num_blocks" in options:
        assert stats["preemptions"] > 0


def test_next_step_is_launched_before_the_last_is_collected(checkpoint):
    llm = poisoned_llm(checkpoint)
    runner, events = llm.engine.runner, []
    runner.async_scheduling = True
    launch, collect = runner.launch, runner.collect
    runner.launch = lambda step: events.append("launch") or launch(step)
    runner.collect = lambda step: events.append("collect") or collect(step)
    llm.generate(PROMPTS[:1], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True), use_tqdm=False)
    assert events == ["launch", *["launch", "collect"] * 4, "collect"]


def test_conversations_hit_and_cancellation_frees_everything(checkpoint):
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm, plain = poisoned_llm(checkpoint, block_size=4), poisoned_llm(checkpoint, block_size=4)
    llm.engine.runner.async_scheduling = True
    ids = PROMPTS[3]["prompt_token_ids"]
    answers = []
    for engine in (llm, plain):
        (first,) = engine.generate(PROMPTS[3:4], params, use_tqdm=False)
        following = {"prompt_token_ids": ids + first.outputs[0].token_ids + [1, 2, 3]}
        (second,) = engine.generate([following], params, use_tqdm=False)
        answers.append(second.outputs[0].token_ids)
    assert answers[0] == answers[1]
    assert llm.stats()["prefix_hit_tokens"] == plain.stats()["prefix_hit_tokens"] > 40

    stream = llm.stream(PROMPTS[5], params)
    for _ in range(7):
        next(stream)
    stream.close()
    assert result(llm.generate(PROMPTS[:3], params, use_tqdm=False)) == result(
        plain.generate(PROMPTS[:3], params, use_tqdm=False)
    )
    assert llm.stats()["blocks_used"] == 0 and not llm.engine.has_work
