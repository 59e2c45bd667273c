"""Several threads on one LLM: right tokens, shared batches, and no deadlock."""

from __future__ import annotations

import gc
import threading

import pytest

from helpers import random_prompts
from interrupts import checkpoint
from lamella import LLM, SamplingParams
from lamella.errors import EngineError

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPTS = random_prompts([3, 9, 20, 5, 33, 2, 7, 14], seed=3)
OPTIONS = dict(device="cpu", dtype="float32", block_size=4, max_num_batched_tokens=32, max_num_seqs=4, num_blocks=64)


@pytest.fixture(scope="module", params=["canon", "hybrid", "llama"])
def llm(request, tmp_path_factory):
    return LLM(checkpoint(request.param, tmp_path_factory.mktemp(request.param)), **OPTIONS)


@pytest.fixture(scope="module")
def right(llm):
    return [llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].token_ids for prompt in PROMPTS]


def run_together(*functions):
    """Run each function in a thread; raise the first error."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a thread waits forever"
    if errors:
        raise errors[0]


def test_calls_of_several_threads_get_their_own_tokens(llm, right):
    def generate(first):
        for _ in range(3):
            outputs = llm.generate(PROMPTS[first::3], PARAMS, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == right[first::3]

    def stream():
        for prompt, tokens in zip(PROMPTS, right, strict=True):
            *_, last = llm.stream(prompt, PARAMS)
            assert last.outputs[0].token_ids == tokens

    def look():
        for _ in range(200):
            assert llm.stats()["running"] <= 4
            llm.reset_prefix_cache()

    run_together(*(lambda first=first: generate(first) for first in range(3)), stream, look)
    assert not llm.engine.has_work
    llm.engine.state.check_integrity()


def test_calls_of_two_threads_share_steps(llm):
    sizes, real = [], llm.engine.runner.launch
    llm.engine.runner.launch = lambda step: sizes.append(len(step)) or real(step)
    start = threading.Barrier(2)

    def generate(prompt):
        start.wait()
        llm.generate([prompt], LONG, use_tqdm=False)

    try:
        run_together(*(lambda prompt=prompt: generate(prompt) for prompt in PROMPTS[:2]))
    finally:
        llm.engine.runner.launch = real
    assert sizes.count(2) > 30, sizes


def test_error_in_a_step_is_raised_only_in_its_thread(llm, right):
    real, failed = llm.engine.step, []

    def step():
        if threading.current_thread().name == "unlucky" and not failed:
            failed.append(1)
            llm.engine.runner.launch, launch = None, llm.engine.runner.launch
            try:
                real()
            finally:
                llm.engine.runner.launch = launch
        return real()

    def unlucky():
        threading.current_thread().name = "unlucky"
        with pytest.raises(TypeError):
            llm.generate(PROMPTS[:1], LONG, use_tqdm=False)

    def lucky():
        for _ in range(4):
            outputs = llm.generate(PROMPTS[1:], PARAMS, use_tqdm=False)
            assert [output.outputs[0].token_ids for output in outputs] == right[1:]

    llm.engine.step = step
    try:
        run_together(unlucky, lucky)
    finally:
        del llm.engine.step
    assert failed and not llm.engine.has_work


def test_stream_can_be_read_and_dropped_by_another_thread(llm, right):
    kept, dropped = llm.stream(PROMPTS[2], PARAMS), [llm.stream(PROMPTS[4], PARAMS)]
    next(kept), next(dropped[0])
    found = []

    def read():
        found.append(list(kept)[-1].outputs[0].token_ids)

    def drop():
        dropped.clear()
        gc.collect()
        llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False)

    run_together(read, drop)
    assert found == [right[2]]
    assert llm.stats()["running"] == llm.stats()["blocks_used"] == 0


def test_a_stream_dropped_in_the_middle_of_a_step_is_cancelled_after_it(llm, right):
    """The garbage collector can drop a stream in the middle of a step."""
    stream = [llm.stream(PROMPTS[4], PARAMS)]
    next(stream[0])
    real = llm.engine.runner.launch

    def launch(step):
        stream.clear()
        gc.collect()
        return real(step)

    llm.engine.runner.launch = launch
    try:
        (output,) = llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False)
    finally:
        llm.engine.runner.launch = real
    assert output.outputs[0].token_ids == right[0]
    assert llm.stats()["running"] == llm.stats()["blocks_used"] == 0


def test_callback_inside_a_step_raises(llm, right):
    """A call inside a step would deadlock; only `stats` is allowed."""
    real, seen = llm.engine.runner.launch, []

    def launch(step):
        seen.append(llm.stats()["running"])
        for call in (
            lambda: llm.generate(PROMPTS[:1], PARAMS, use_tqdm=False),
            lambda: llm.stream(PROMPTS[0]),
            llm.reset_prefix_cache,
            lambda: llm.set_placement(None),
        ):
            with pytest.raises(EngineError, match="in the middle of a step"):
                call()
        return real(step)

    llm.engine.runner.launch = launch
    try:
        (output,) = llm.generate(PROMPTS[1:2], PARAMS, use_tqdm=False)
    finally:
        llm.engine.runner.launch = real
    assert output.outputs[0].token_ids == right[1] and set(seen) == {1}


def test_nested_and_interleaved_streams(llm, right):
    outer = []
    for output in llm.stream(PROMPTS[0], PARAMS):
        outer.append(output)
        if len(outer) == 3:
            *_, inner = llm.stream(PROMPTS[1], PARAMS)
    assert outer[-1].outputs[0].token_ids == right[0] and inner.outputs[0].token_ids == right[1]
