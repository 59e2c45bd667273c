"""An exception or interrupt at any line of a step does not affect other or later requests."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import torch

from helpers import canon_checkpoint, poisoned_llm, random_prompts
from interrupts import KINDS, checkpoint, interrupted
from lamella import LLM, SamplingParams
from lamella.layers.context import current_batch, forward_batch
from lamella.layers.decoder import plain_batch

LENGTHS = [9, 30, 21]
OPTIONS = dict(device="cpu", dtype="float32", block_size=4, max_num_batched_tokens=16, max_num_seqs=4, num_blocks=64)
PLACEMENTS = ("all-gdn", "mamba,attention,kda", "swa,attention,sliding_window")


def prompts_of(seed):
    return random_prompts(LENGTHS, seed)


def params_of(kind, count=6):
    placements = PLACEMENTS if kind == "mixed" else (None,) * 3
    return [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, placement=own) for own in placements]


class Model:
    """Engine under test, and the right outputs."""

    def __init__(self, kind, folder):
        self.kind, self.params = kind, params_of(kind)
        extra = {"mixed_placements": True} if kind == "mixed" else {}
        self.plain = LLM(folder, **OPTIONS, **extra, enable_prefix_caching=False)
        self.llm = LLM(folder, **OPTIONS, **extra, snapshot_prompts="always")
        self.known = {}

    def right(self, seed):
        """Return the tokens of the three prompts, each computed by itself without a prefix cache."""
        if seed not in self.known:
            self.known[seed] = [
                self.plain.generate([prompt], params, use_tqdm=False)[0].outputs[0].token_ids
                for prompt, params in zip(prompts_of(seed), self.params, strict=True)
            ]
        return self.known[seed]

    def attack(self, line, error, seed):
        """Interrupt a call of generate() beside two streams, and check that all others get the right tokens.

        Returns the interrupted line; "" if the call had fewer lines.
        """
        llm, (first, second, third) = self.llm, prompts_of(seed)
        streams = [llm.stream(first, self.params[0]), llm.stream(second, self.params[1])]
        for _ in range(2):
            next(streams[0])
        next(streams[1])
        with interrupted(line, error) as lines, suppress(KeyboardInterrupt, MemoryError):
            llm.generate([third], self.params[2], use_tqdm=False)
            assert not lines.where, f"the error at {lines.where} was swallowed"
        llm.engine.state.check_integrity()
        ends = [list(stream)[-1].outputs[0] for stream in streams]
        (fresh,) = llm.generate([third], self.params[2], use_tqdm=False)
        again = llm.generate([first, second], self.params[:2], use_tqdm=False)
        tokens = [end.token_ids for end in ends]
        assert [*tokens, fresh.outputs[0].token_ids] == self.right(seed), lines.where
        assert [output.outputs[0].token_ids for output in again] == self.right(seed)[:2], lines.where
        assert not llm.engine.has_work, lines.where
        llm.engine.state.check_integrity()
        llm.engine.state.check_at_rest()
        return lines.where


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    return Model(request.param, checkpoint(request.param, tmp_path_factory.mktemp(request.param)))


def count_lines(model):
    with interrupted(0, KeyboardInterrupt()) as lines:
        model.llm.generate(prompts_of(99)[2:], model.params[2], use_tqdm=False)
    return lines.count


@pytest.mark.parametrize("ahead", [False, True])
def test_interrupt_at_random_lines_does_not_affect_other_requests(model, ahead):
    model.llm.engine.runner.async_scheduling = ahead
    rng, lines = random.Random(f"{model.kind} {ahead}"), count_lines(model)
    for case in range(12):
        model.attack(rng.randrange(1, lines), rng.choice([KeyboardInterrupt, MemoryError])(), case % 4)


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_interrupt_at_every_line_does_not_affect_other_requests(model, ahead):
    model.llm.engine.runner.async_scheduling = ahead
    seen, line = set(), 0
    for line in range(1, count_lines(model), 7):
        seen.add(model.attack(line, KeyboardInterrupt(), line % 4))
    assert len(seen) > 100


def test_copied_snapshot_survives_a_later_failure(tmp_path, monkeypatch):
    llm = poisoned_llm(canon_checkpoint(tmp_path), dtype="float32", block_size=4, snapshot_prompts="always")
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(10, 23))}
    first = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.runner, "launch", lambda step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate({"prompt_token_ids": [1, 2, 3]}, params, use_tqdm=False)
    (again,) = llm.generate(prompt, params, use_tqdm=False)
    assert again.num_cached_tokens == 12 and again.outputs[0].token_ids == first


def test_roll_back_resets_the_current_batch(tmp_path):
    llm = poisoned_llm(canon_checkpoint(tmp_path), dtype="float32")
    stale = forward_batch(plain_batch(torch.tensor([1, 2])))
    stale.__enter__()  # as an interrupt between two lines of the context manager leaves it
    llm.engine.runner.reset()
    assert current_batch() is None
