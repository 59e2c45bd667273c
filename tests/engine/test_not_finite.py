"""NaN or infinite logits end only their own request with an error, and leave no wrong state in the cache."""

from __future__ import annotations

import math
import re

import pytest
import torch

from helpers import random_prompts
from interrupts import KINDS, checkpoint
from lamella import LLM, SamplingParams
from mixed_steps import fake_graphs, with_graphs

BAD = 77  # the token whose embedding is damaged
OPTIONS = dict(device="cpu", dtype="float32", block_size=4, max_num_batched_tokens=16, max_num_seqs=4, num_blocks=64)
CHOICES = [
    dict(temperature=0, logit_bias=None),
    dict(temperature=0),
    dict(seed=1),
    dict(seed=1, top_k=5, top_p=0.9),
    dict(temperature=0, logprobs=2),
    dict(temperature=0, repetition_penalty=1.2, logprobs=0),
    dict(temperature=0, min_tokens=3, logit_bias={BAD: -100, 5: 1.0}),
]


def prompts():
    """Return random prompts without the damaged token, which no greedy output contains, either."""
    found = random_prompts([9, 30, 5], seed=5)
    return [{"prompt_token_ids": [id for id in prompt["prompt_token_ids"] if id != BAD]} for prompt in found]


def with_bad(prompt, at):
    ids = prompt["prompt_token_ids"]
    return {"prompt_token_ids": [*ids[:at], BAD, *ids[at:]]}


class Damage:
    """Context that sets the embedding of one token to NaN."""

    def __init__(self, llm, value=math.nan):
        self.row, self.value = llm.engine.model.model.embed_tokens.weight.data[BAD], value

    def __enter__(self):
        self.before = self.row.clone()
        self.row.fill_(self.value)

    def __exit__(self, *_):
        self.row.copy_(self.before)


@pytest.fixture(scope="module", params=KINDS)
def llm(request, tmp_path_factory):
    extra = {"mixed_placements": True} if request.param == "mixed" else {}
    folder = checkpoint(request.param, tmp_path_factory.mktemp(request.param))
    return LLM(folder, **OPTIONS, **extra, snapshot_prompts="always")


@pytest.mark.parametrize("ahead", [False, True])
def test_only_the_request_with_nan_ends_with_an_error(llm, ahead):
    llm.engine.runner.async_scheduling = ahead
    for fields in CHOICES:
        params = SamplingParams(**{"logit_bias": {BAD: -100}} | fields, max_tokens=6, ignore_eos=True)
        llm.reset_prefix_cache()
        right = [llm.generate([prompt], params, use_tqdm=False)[0].outputs[0] for prompt in prompts()]
        llm.reset_prefix_cache()
        before = llm.stats()["errors"]
        with Damage(llm):
            bad = with_bad(prompts()[1], 6)
            outputs = llm.generate([prompts()[0], bad, *prompts()[1:]], params, use_tqdm=False)
        first, failed, *rest = (output.outputs[0] for output in outputs)
        assert [output.token_ids for output in (first, *rest)] == [output.token_ids for output in right]
        assert all(output.error is None and output.finish_reason == "length" for output in (first, *rest))
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert failed.error.startswith("output token 0: the logits hold NaN")
        assert failed.logprobs in (None, [])
        assert llm.stats()["errors"] == before + 1
        llm.engine.state.check_integrity()
        # Repaired: nothing that was computed from the damage may be found.
        (found,) = llm.generate([bad], params, use_tqdm=False)
        llm.reset_prefix_cache()
        (computed,) = llm.generate([bad], params, use_tqdm=False)
        assert found.outputs[0] == computed.outputs[0]


def test_nan_in_the_middle_of_an_answer_names_the_token(llm):
    llm.engine.runner.async_scheduling = False
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    (right,) = llm.generate([prompts()[0]], params, use_tqdm=False)
    stream = llm.stream(prompts()[0], params)
    seen = [next(stream) for _ in range(3)]
    weight = llm.engine.model.lm_head.weight.data
    row = weight[9].clone()
    weight[9] = math.inf
    *_, last = [*seen, *stream]
    weight[9] = row
    output = last.outputs[0]
    assert last.finished and output.finish_reason == "error"
    assert output.token_ids == right.outputs[0].token_ids[:3]
    assert output.error.startswith("output token 3: ")


def test_prompt_logprobs_of_nan_are_an_error_that_names_the_position(llm):
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    with Damage(llm):
        bad, good = llm.generate([with_bad(prompts()[1], 20), prompts()[0]], params, use_tqdm=False)
    # The damaged token is in the chunk of tokens 16 to 31; masked keys of a chunk count 0 times NaN, which is NaN.
    assert bad.outputs[0].finish_reason == "error"
    assert re.match(r"prompt token (1[7-9]|2[01]): ", bad.outputs[0].error)
    assert good.outputs[0].error is None
    assert all(not math.isnan(entry.logprob) for row in good.prompt_logprobs[1:] for entry in row.values())


def test_completions_of_one_request_fail_independently(llm):
    params = SamplingParams(n=3, temperature=1.0, seed=4, max_tokens=4, ignore_eos=True)
    with Damage(llm):
        (output,) = llm.generate([with_bad(prompts()[2], 0)], params, use_tqdm=False)
    assert output.finished and [each.finish_reason for each in output.outputs] == ["error"] * 3


def test_nan_is_detected_in_replayed_steps(tmp_path, monkeypatch):
    """The state of a request becomes NaN between two replays; one is in flight when the next is launched."""
    fake_graphs(monkeypatch)
    llm = with_graphs(LLM(checkpoint("canon", tmp_path), **OPTIONS))
    # With log-probabilities, the results of the fake graph are copies, as on a GPU.
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=0)
    right = [output.outputs[0].token_ids for output in llm.generate(prompts(), params, use_tqdm=False)]
    llm.reset_prefix_cache()
    real, victims = llm.engine.runner.launch, []

    def launch(step):
        if len(step) == 3 and all(chunk.count == 1 for chunk in step) and not victims:
            victims.append(step[0].request)
            block = llm.engine.state.allocations[step[0].request].blocks[0][0]
            for tensor in llm.engine.memory.tensors:
                if tensor.shape[1:3] == (4, 2):  # keys and values
                    tensor[block] = math.nan
        return real(step)

    llm.engine.runner.launch = launch
    replays = llm.engine.runner.num_replays
    outputs = [output.outputs[0] for output in llm.generate(prompts(), params, use_tqdm=False)]
    assert victims and llm.engine.runner.num_replays > replays + 3
    failed = [output for output in outputs if output.error]
    assert len(failed) == 1 and failed[0].token_ids == victims[0].output_token_ids and len(failed[0].token_ids) < 6
    for output, tokens in zip(outputs, right, strict=True):
        assert output.token_ids == tokens[: len(output.token_ids)]
    assert llm.stats()["errors"] == 1 and not llm.engine.has_work
    llm.engine.state.check_integrity()


def test_half_precision_overflow_is_an_error(tmp_path):
    llm = LLM(checkpoint("llama", tmp_path), **{**OPTIONS, "dtype": "float16"})
    with torch.no_grad():
        llm.engine.model.model.layers[-1].feed_forward.down_proj.weight.fill_(6e4)
    params = SamplingParams(temperature=0.8, max_tokens=5, logprobs=0, ignore_eos=True)
    output = llm.generate(prompts()[:1], params, use_tqdm=False)[0].outputs[0]
    assert output.finish_reason == "error" and len(output.logprobs) == len(output.token_ids) < 5
    assert math.isfinite(output.cumulative_logprob)
