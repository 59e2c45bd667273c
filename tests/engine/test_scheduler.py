"""The scheduler alone, with a mock model: nothing is lost, nobody starves, every request ends once."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.engine.request import Request
from lamella.engine.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduler
from lamella.state.manager import StateManager
from lamella.state.spec import PagedState

PAGE = 4
FULL = PagedState(1, 8, torch.float32)
WINDOWED = PagedState(1, 8, torch.float32, window=6)


def make_scheduler(pages: int, seqs: int, budget: int, groups: tuple[PagedState, ...] = (FULL, WINDOWED)) -> Scheduler:
    state = StateManager(groups, [pages] * len(groups), seqs, PAGE)
    return Scheduler(state, seqs, budget)


def make_request(name: str, prompt: int, output: int) -> Request:
    return Request(name, list(range(prompt)), SamplingParams(temperature=0), max_tokens=output)


def run_step(scheduler: Scheduler) -> list[Request]:
    """One step with a model whose every token is its position; the requests that ended."""
    step = scheduler.schedule()
    seen = set()
    for share in step:
        assert share.request not in seen, "a request was scheduled twice in a step"
        seen.add(share.request)
        assert share.count >= 1
        assert share.start == share.request.num_computed
        holding = scheduler.state.holdings[share.request]
        for index, group in enumerate(scheduler.state.groups):
            first = group.first_visible(share.start) // PAGE
            needed = holding.pages[index][first : scheduler.state.pages_for(share.start + share.count)]
            assert len(needed) == scheduler.state.pages_for(share.start + share.count) - first
            assert 0 not in needed, "a page that the step needs has been given back"
    assert sum(share.count for share in step) <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    scheduler.computed(step)
    scheduler.state.check_integrity()
    ended = []
    for share in step:
        if share.samples or share.request.num_computed == share.request.num_tokens:
            share.request.output_token_ids.append(share.request.num_tokens)
            if len(share.request.output_token_ids) == share.request.max_tokens:
                scheduler.finish(share.request)
                ended.append(share.request)
    return ended


def test_everything_is_free_at_the_end_and_each_request_ended_once():
    rng = random.Random(0)
    steps = 0
    for _ in range(60):
        seqs, budget, pages = rng.randint(1, 6), rng.randint(1, 20), rng.randint(16, 40)
        scheduler = make_scheduler(pages, seqs, budget)
        alive: dict[str, Request] = {}
        outcomes: dict[str, str] = {}
        arrivals = rng.randint(5, 40)
        while arrivals or alive:
            if arrivals and rng.random() < 0.4:
                arrivals -= 1
                name = str(len(outcomes) + len(alive))
                request = make_request(name, rng.randint(1, 40), rng.randint(1, 20))
                alive[name] = request
                scheduler.add(request)
            if alive and rng.random() < 0.03:
                name = rng.choice(sorted(alive))
                scheduler.finish(alive.pop(name))
                assert name not in outcomes
                outcomes[name] = "cancelled"
            if not scheduler.has_work:
                continue
            for request in run_step(scheduler):
                assert request.request_id not in outcomes
                outcomes[request.request_id] = "done"
                del alive[request.request_id]
            steps += 1
        for pool in (*scheduler.state.page_pools, scheduler.state.slot_pool):
            assert pool.num_free == pool.capacity
        assert not scheduler.state.holdings
    assert steps > 5000


def test_the_oldest_request_moves_in_every_step():
    scheduler = make_scheduler(pages=12, seqs=4, budget=7)
    for index in range(20):
        scheduler.add(make_request(str(index), 20, 15))
    while scheduler.has_work:
        oldest = min(scheduler.running + list(scheduler.waiting), key=lambda r: int(r.request_id))
        before = oldest.num_computed, len(oldest.output_token_ids)
        run_step(scheduler)
        assert (oldest.num_computed, len(oldest.output_token_ids)) > before
    assert scheduler.num_preemptions > 0


def test_requests_start_in_order_of_arrival():
    scheduler = make_scheduler(pages=100, seqs=3, budget=8)
    requests = [make_request(str(index), 5, 4) for index in range(9)]
    for request in requests:
        scheduler.add(request)
    ended = []
    while scheduler.has_work:
        ended += run_step(scheduler)
    assert [r.request_id for r in ended] == [r.request_id for r in requests]


def test_a_long_prompt_does_not_stop_the_decodes():
    scheduler = make_scheduler(pages=200, seqs=4, budget=8)
    decoding = make_request("decoding", 2, 50)
    scheduler.add(decoding)
    run_step(scheduler)
    scheduler.add(make_request("long", 300, 1))
    for expected in range(2, 30):
        run_step(scheduler)
        assert len(decoding.output_token_ids) == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12), st.integers(1, 30))
def test_a_request_that_fits_alone_is_finished(shapes, budget):
    pages = max(-(-(prompt + output) // PAGE) for prompt, output in shapes)
    scheduler = make_scheduler(pages, seqs=3, budget=budget, groups=(FULL,))
    for index, (prompt, output) in enumerate(shapes):
        scheduler.add(make_request(str(index), prompt, output))
    ended = []
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        ended += run_step(scheduler)
    assert len(ended) == len(shapes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 40))
def test_a_window_never_holds_more_than_its_peak(tokens, chunk, window):
    group = PagedState(1, 8, torch.float32, window=window)
    state = StateManager([group], [1000], 1, PAGE)
    peak = state.peak_pages(0, tokens, min(chunk, tokens))
    computed = 0
    while computed < tokens:
        target = min(tokens, computed + chunk)
        assert state.grow("r", target)
        used = state.page_pools[0].capacity - state.page_pools[0].num_free
        assert used <= peak
        computed = target
        state.computed("r", computed)
        state.check_integrity()
    state.release("r")
    assert state.page_pools[0].num_free == 1000


def test_giving_back_a_free_place_is_refused():
    state = StateManager([FULL], [4], 2, PAGE)
    assert state.grow("r", 5)
    pages = state.holdings["r"].pages[0]
    state.release("r")
    with pytest.raises(AssertionError, match="is nobody's"):
        state.page_pools[0].free(pages)
