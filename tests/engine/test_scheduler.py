"""Scheduler with a mock model: no block is lost, no request starves, every request ends once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled, Scheduler
from lamella.state.manager import StateManager
from lamella.state.pool import Pool
from lamella.state.spec import PagedState

pytestmark = pytest.mark.unit

BLOCK = 4
FULL = PagedState(1, 8, torch.float32)
WINDOWED = PagedState(1, 8, torch.float32, window=6)


def make_scheduler(blocks: int, seqs: int, budget: int, groups: tuple[PagedState, ...] = (FULL, WINDOWED)) -> Scheduler:
    state = StateManager(groups, [blocks] * len(groups), seqs, BLOCK)
    return Scheduler(state, seqs, budget, None, "always")


def make_request(name: str, prompt: int, output: int) -> Request:
    return Request(name, list(range(prompt)), SamplingParams(temperature=0), max_tokens=output)


def run_step(scheduler: Scheduler) -> list[Request]:
    """Run a step with a model whose every token is its position; return the requests that ended."""
    step = scheduler.schedule()
    seen = set()
    for chunk in step:
        assert chunk.request not in seen, "a request was scheduled twice in a step"
        seen.add(chunk.request)
        assert chunk.count >= 1
        assert chunk.start == chunk.request.num_computed
        allocation = scheduler.state.allocations[chunk.request]
        for index, group in enumerate(scheduler.state.groups):
            first = group.first_visible(chunk.start) // BLOCK
            needed = allocation.blocks[index][first : scheduler.state.num_blocks(chunk.start + chunk.count)]
            assert len(needed) == scheduler.state.num_blocks(chunk.start + chunk.count) - first
            assert 0 not in needed, "a block that the step needs was freed"
    assert sum(chunk.count for chunk in step) <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    scheduler.mark_computed(step)
    scheduler.state.check_integrity()
    ended = []
    for chunk in step:
        if chunk.samples or chunk.request.num_computed == chunk.request.num_tokens:
            chunk.request.output_token_ids.append(chunk.request.num_tokens)
            if len(chunk.request.output_token_ids) == chunk.request.max_tokens:
                scheduler.finish(chunk.request)
                ended.append(chunk.request)
    return ended


def test_all_blocks_are_free_at_the_end_and_each_request_ended_once():
    rng = random.Random(0)
    steps = 0
    for _ in range(60):
        seqs, budget, blocks = rng.randint(1, 6), rng.randint(1, 20), rng.randint(16, 40)
        scheduler = make_scheduler(blocks, seqs, budget)
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
        for pool in (*scheduler.state.block_pools, scheduler.state.slot_pool):
            assert pool.num_free == pool.capacity
        assert not scheduler.state.allocations
    assert steps > 5000


def test_oldest_request_advances_in_every_step():
    scheduler = make_scheduler(blocks=12, seqs=4, budget=7)
    for index in range(20):
        scheduler.add(make_request(str(index), 20, 15))
    while scheduler.has_work:
        oldest = min(scheduler.running + list(scheduler.waiting), key=lambda r: int(r.request_id))
        before = oldest.num_computed, len(oldest.output_token_ids)
        run_step(scheduler)
        assert (oldest.num_computed, len(oldest.output_token_ids)) > before
    assert scheduler.num_preemptions > 0


def test_requests_start_in_order_of_arrival():
    scheduler = make_scheduler(blocks=100, seqs=3, budget=8)
    requests = [make_request(str(index), 5, 4) for index in range(9)]
    for request in requests:
        scheduler.add(request)
    ended = []
    while scheduler.has_work:
        ended += run_step(scheduler)
    assert [r.request_id for r in ended] == [r.request_id for r in requests]


def test_long_prompt_does_not_block_decodes():
    scheduler = make_scheduler(blocks=200, seqs=4, budget=8)
    decoding = make_request("decoding", 2, 50)
    scheduler.add(decoding)
    run_step(scheduler)
    scheduler.add(make_request("long", 300, 1))
    for expected in range(2, 30):
        run_step(scheduler)
        assert len(decoding.output_token_ids) == expected


class Fuzz:
    """Random requests, arrivals and cancellations, with prompts that share beginnings. Checks invariants in each step.

    The oldest request advances in every step. So a request needs at most as many steps as there were tokens to compute
    when it arrived, its own included.
    """

    def __init__(self, rng: random.Random, caching: bool, slots: bool, windows: Sequence[int | None]) -> None:
        self.rng, self.caching, self.slots = rng, caching, slots
        groups = [PagedState(1, 8, torch.float32, window=window) for window in windows]
        seqs, budget = rng.randint(1, 5), rng.choice([1, 2, 5, 9, 16, 40])
        self.longest = rng.choice([9, 24, 60])
        probe = StateManager(groups, [1] * len(groups), 1, BLOCK)
        spare = rng.choice([0, 1, 3, 8, 30])
        blocks = [
            probe.peak_blocks(index, self.longest, min(self.longest, budget)) + rng.randint(0, spare)
            for index in range(len(groups))
        ]
        self.state = StateManager(groups, blocks, seqs + rng.choice([0, 1, 4]), BLOCK, slots)
        self.scheduler = Scheduler(self.state, seqs, budget, rng.choice([None, None, 1, 3]), "always")
        self.texts: list[list[int]] = [[]]
        self.alive: dict[Request, int] = {}  # in order of arrival, with the step by which it must have ended
        self.ended: dict[Request, str] = {}
        self.arrived = self.steps = self.hits = 0

    def step(self, arrivals: bool) -> None:
        rng, scheduler = self.rng, self.scheduler
        if arrivals and len(self.alive) < 8 and rng.random() < 0.3:
            self._arrive()
        if self.alive and rng.random() < 0.02:
            self._end(rng.choice(list(self.alive)), "cancelled")
        if not self.alive:
            assert not scheduler.has_work and scheduler.schedule() == []
            return
        oldest = next(iter(self.alive))
        before = oldest.num_tokens, oldest.num_computed
        known, stats = list(scheduler.running), (scheduler.num_preemptions, scheduler.num_cached_tokens)
        step = scheduler.schedule()
        self._check(step, known, stats)
        self.state.pop_copies()
        scheduler.mark_computed(step)
        self.steps += 1
        for chunk in step:
            request = chunk.request
            assert request.num_computed == chunk.start + chunk.count <= request.num_tokens
            if chunk.samples:
                request.output_token_ids.append(rng.randint(0, 1))
                if len(request.output_token_ids) == request.max_tokens:
                    self._end(request, "done")
        assert step[0].request is oldest and (oldest.num_tokens, oldest.num_computed) > before
        assert all(self.steps < last for last in self.alive.values()), "a request waits for too long"
        for pool, referenced in self._pools():
            assert pool.num_referenced == len(referenced)
            assert len(referenced) + pool.num_free == pool.capacity
            assert pool.num_cached <= (pool.num_free if self.caching else 0)
        if self.steps % 50 == 0:
            self.state.check_integrity()

    def _pools(self) -> list[tuple[Pool, set[int]]]:
        allocations = self.state.allocations.values()
        groups = range(len(self.state.groups))
        blocks = [{block for each in allocations for block in each.blocks[index]} - {0} for index in groups]
        slots = {slot for each in allocations for slot in (each.slot, *(s for s, _ in each.planned_snapshots))}
        pools = [*self.state.block_pools, self.state.slot_pool]
        return list(zip(pools, [*blocks, slots], strict=True))

    def _check(self, step: list[Scheduled], known: list[Request], before: tuple[int, int]) -> None:
        scheduler, state, left = self.scheduler, self.state, self.scheduler.max_num_batched_tokens
        assert [*scheduler.running, *scheduler.waiting] == list(self.alive), "not in order of arrival"
        assert len(scheduler.running) <= scheduler.max_num_seqs and len(state.allocations) == len(scheduler.running)
        assert [chunk.request for chunk in step] == scheduler.running[: len(step)], "an older request is skipped"
        started = 0
        for chunk in step:
            request, start, stop = chunk.request, chunk.start, chunk.start + chunk.count
            assert start == request.num_computed < stop <= min(request.num_tokens, start + left)
            assert chunk.samples == (stop == request.num_tokens)
            if request not in known:
                cacheable = self.caching and request.prefix_root is not None and not request.needs_prompt_logprobs
                assert start % BLOCK == 0 and (cacheable or start == 0)
                if request.num_preemptions == 0:
                    assert request.num_cached_tokens == start
                    started += start
                self.hits += start > 0
            full = min(request.num_tokens, start + left)
            if not self.slots or request.prefix_root is None:
                assert stop == full
            else:
                last_block = (len(request.prompt_token_ids) - 1) // BLOCK * BLOCK
                in_prompt = start < len(request.prompt_token_ids) and scheduler.snapshot_interval is not None
                every = BLOCK * scheduler.snapshot_interval if in_prompt else 10**9
                at_interval = (start // every + 1) * every
                wanted = {
                    last_block,
                    request.branch_position,
                    *({at_interval} if at_interval < len(request.prompt_token_ids) else ()),
                }
                planned = [position for position, _ in chunk.snapshots]
                inside = {position for position in wanted if start < position < stop}
                keys = request.block_keys(BLOCK, stop)
                for position in inside - set(planned):
                    is_cached = state.slot_pool.find(keys[position // BLOCK - 1]) is not None
                    assert is_cached or state.slot_pool.num_free <= scheduler.max_num_seqs, "a snapshot is missing"
                assert planned == sorted(set(planned)) and all(start < p < stop and p % BLOCK == 0 for p in planned)
                assert stop == request.num_tokens or stop % BLOCK == 0 or stop // BLOCK * BLOCK <= start, (
                    "a chunk does not end at a block end"
                )
                assert stop == full or (full < request.num_tokens and full - stop < BLOCK), "a chunk is too short"
            left -= chunk.count
            allocation = state.allocations[request]
            for group, blocks in zip(state.groups, allocation.blocks, strict=True):
                assert len(blocks) == -(-stop // BLOCK)
                assert 0 not in blocks[group.first_visible(start) // BLOCK :], "a block that the step needs"
        if left and scheduler.num_preemptions == before[0]:
            assert len(step) == len(scheduler.running), "a request got no tokens although budget was left"
        assert scheduler.num_cached_tokens == before[1] + started

    def _arrive(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.randint(0, self.longest)]
        prompt = [*prompt, *rng.choices([0, 1], k=rng.randint(not prompt, rng.choice([2, 12, self.longest])))]
        prompt = prompt[: self.longest]
        output = min(rng.choice([1, rng.randint(1, 12), self.longest]), self.longest + 1 - len(prompt))
        params = SamplingParams(temperature=0, prompt_logprobs=rng.choice([None] * 8 + [0]))
        root = rng.choice([b"root"] * 8 + [b"other", None]) if self.caching else None
        request = Request(str(self.arrived), prompt, params, max_tokens=output, prefix_root=root)
        self.arrived += 1
        self.scheduler.add(request)
        self.alive[request] = 0
        self.alive[request] = self.steps + sum(len(r.prompt_token_ids) + r.max_tokens - 1 for r in self.alive)
        self.texts = [*self.texts[-6:], prompt]

    def _end(self, request: Request, how: str) -> None:
        assert request not in self.ended
        self.scheduler.finish(request)
        del self.alive[request]
        self.ended[request] = how
        self.texts = [*self.texts[-6:], request.prompt_token_ids + request.output_token_ids]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("caching", [False, True])
def test_random_steps_lose_no_blocks_and_starve_no_request(caching, slots):
    rng = random.Random(2 * caching + slots)
    steps = hits = preemptions = evictions = 0
    outcomes: Counter[str] = Counter()
    while steps < 25_000:
        models = [[None], [6], [None, 6], [1, 4, 9]] + [[]] * slots
        fuzz = Fuzz(rng, caching, slots, rng.choice(models))
        while fuzz.steps < 400:
            fuzz.step(arrivals=True)
        while fuzz.alive:
            fuzz.step(arrivals=False)
        assert len(fuzz.ended) == fuzz.arrived
        assert not fuzz.state.allocations and not fuzz.scheduler.has_work
        fuzz.state.check_integrity()
        outcomes.update(fuzz.ended.values())
        steps, hits = steps + fuzz.steps, hits + fuzz.hits
        preemptions += fuzz.scheduler.num_preemptions
        evictions += sum(pool.num_evictions for pool in (*fuzz.state.block_pools, fuzz.state.slot_pool))
    assert outcomes["done"] > 1000 and outcomes["cancelled"] > 300 and preemptions > 500
    assert (hits > 1000 and evictions > 5000) if caching else (hits == evictions == 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30)), min_size=1, max_size=12), st.integers(1, 30))
def test_request_that_fits_alone_finishes(shapes, budget):
    blocks = max(-(-(prompt + output) // BLOCK) for prompt, output in shapes)
    scheduler = make_scheduler(blocks, seqs=3, budget=budget, groups=(FULL,))
    for index, (prompt, output) in enumerate(shapes):
        scheduler.add(make_request(str(index), prompt, output))
    ended = []
    for _ in range(20_000):
        if not scheduler.has_work:
            break
        ended += run_step(scheduler)
    assert len(ended) == len(shapes)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 40), st.sampled_from(["window", "chunk"]))
def test_local_groups_never_exceed_their_peak(tokens, chunk, size, kind):
    group = PagedState(1, 8, torch.float32, **{kind: size})
    state = StateManager([group], [1000], 1, BLOCK)
    peak = state.peak_blocks(0, tokens, min(chunk, tokens))
    computed = 0
    while computed < tokens:
        target = min(tokens, computed + chunk)
        assert state.allocate("r", target)
        used = state.block_pools[0].capacity - state.block_pools[0].num_free
        assert used <= peak
        computed = target
        state.mark_computed("r", computed)
        state.check_integrity()
    state.release("r")
    assert state.block_pools[0].num_free == 1000


def test_freeing_a_free_entry_raises():
    state = StateManager([FULL], [4], 2, BLOCK)
    assert state.allocate("r", 5)
    blocks = state.allocations["r"].blocks[0]
    state.release("r")
    with pytest.raises(AssertionError, match="has no reference"):
        state.block_pools[0].free(blocks)
