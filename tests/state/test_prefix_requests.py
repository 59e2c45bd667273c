"""Requests with shared prefixes, run through the scheduler on fake memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence

import pytest

from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduled, Scheduler
from lamella.state.manager import DUMMY, StateManager
from lamella.state.prefix import MISS, Hit
from prefix_cases import BLOCK, ROOT, bookkeeping, brute_force, group, make_request, sees

pytestmark = pytest.mark.unit


class Checked(StateManager):
    """State manager that checks the result of each `allocate`."""

    started: dict[Hashable, Hit]

    def allocate(self, request: Hashable, tokens: int, hit: Hit = MISS, keys: Sequence[bytes] = ()) -> bool:
        before, copies = bookkeeping(self), list(self._copies)
        mine = self.allocations.get(request)
        had = [list(blocks) for blocks in mine.blocks] if mine else [[] for _ in self.groups]
        held = [
            {block for other in self.allocations.values() for block in other.blocks[i]} for i in range(len(self.groups))
        ]
        slots = {
            slot
            for other in self.allocations.values()
            for slot in (other.slot, *(s for s, _ in other.planned_snapshots))
        }
        evictions = [pool.num_evictions for pool in self.block_pools]
        found, short = [], not mine and len(slots) == self.slot_pool.capacity
        for index, (spec, pool) in enumerate(zip(self.groups, self.block_pools, strict=True)):
            live = [
                any(sees(spec, hit.length, position) for position in range(block * BLOCK, (block + 1) * BLOCK))
                for block in range(hit.length // BLOCK)
            ]
            found.append(had[index] or [pool.find(keys[block]) if seen else DUMMY for block, seen in enumerate(live)])
            needed = -(-tokens // BLOCK) - len(found[-1]) + len({*found[-1]} - held[index] - {DUMMY})
            short |= needed > pool.capacity - len(held[index] - {DUMMY})
        if not super().allocate(request, tokens, hit, keys):
            assert short, "there were enough blocks"
            assert bookkeeping(self) == before
            return False
        assert not short
        mine = self.allocations[request]
        for blocks, known, others, pool, evicted in zip(
            mine.blocks, found, held, self.block_pools, evictions, strict=True
        ):
            new = blocks[len(known) :]
            assert blocks[: len(known)] == known
            assert len(blocks) == max(len(known), -(-tokens // BLOCK))
            assert len(set(new)) == len(new) and not set(new) & {*known, *others, DUMMY}
            assert pool.num_evictions - evicted <= len(new)
        if request not in self.started:
            self.started[request] = hit
            assert mine.slot not in slots
            is_copied = hit.snapshot is not None and hit.snapshot != mine.slot
            assert self._copies == copies + ([(hit.snapshot, mine.slot)] if is_copied else [])
        else:
            assert self._copies == copies
        return True


class World:
    """A scheduler with a fake model. Its state at a position is a trie node that identifies all tokens up to it.

    Memory that was never written reads as None. With `roomy` pools nothing is evicted, so hits can be predicted.
    """

    def __init__(self, seed: int, windows: Sequence[int | None], slots: bool, roomy: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        groups = [group(window) for window in windows]
        budget, seqs, self.longest = rng.randint(1, 14), rng.randint(1, 5), rng.randint(6, 40)
        probe = StateManager(groups, [1] * len(groups), 1, BLOCK)
        spare = rng.choice([0, 1, 2, 4, 20])
        capacities = [
            400 if roomy else probe.peak_blocks(index, self.longest, min(budget, self.longest)) + rng.randint(0, spare)
            for index in range(len(groups))
        ]
        self.state = Checked(groups, capacities, 300 if roomy else seqs + rng.choice([0, 0, 1, 2, 6]), BLOCK, slots)
        self.state.started = {}
        self.scheduler = Scheduler(self.state, seqs, budget, rng.choice([None, None, 1, 2, 3]), "always")
        self.roomy, self.rate = roomy, rng.choice([0.1, 0.3, 0.6])
        self.trie: dict[object, int] = {}
        self.nodes: dict[Request, list[int]] = {}
        self.texts: list[list[int]] = [[]]
        self.blocks: list[dict[tuple[int, int], int]] = [{} for _ in groups]
        self.slots: dict[int, int | None] = {}
        self.counts: Counter[str] = Counter()
        # With roomy pools: computed nodes, nodes with a snapshot, and each request's latest generated snapshot.
        self.known: set[int] = set()
        self.snapshots: set[int] = set()
        self.latest: dict[Request, int] = {}

    def step(self) -> None:
        rng, state = self.rng, self.state
        alive = [*self.scheduler.running, *self.scheduler.waiting]
        if len(alive) < 8 and (not alive or rng.random() < self.rate):
            self._arrive()
        elif alive and rng.random() < 0.02:
            self.scheduler.finish(request := rng.choice(alive))
            state.started.pop(request, None)
            self.counts["cancelled"] += 1
        elif rng.random() < 0.005 and not self.roomy:
            state.reset_prefix_cache()
        if not self.scheduler.has_work:
            return
        hits = {}
        for request in self.scheduler.waiting:
            keys = request.block_keys(BLOCK, request.num_tokens - 1) if request.params.prompt_logprobs is None else []
            assert state.match(keys) == brute_force(state, keys)
            hits[request] = self._predicted_hit(request)
        preempted = self.scheduler.num_preemptions
        chunks = self.scheduler.schedule()
        for request in self.scheduler.waiting:
            state.started.pop(request, None)  # preempted
        self.counts["preempted"] += self.scheduler.num_preemptions - preempted
        self._check_pools()
        for source, target in state.pop_copies():
            assert source != target
            self.slots[target] = self.slots.get(source)
            self.counts["copies"] += 1
        for chunk in chunks:
            request, nodes = chunk.request, self._nodes(chunk.request)
            allocation, stop = state.allocations[request], chunk.start + chunk.count
            hit = state.started[request]
            if request in hits:
                assert chunk.start == hit.length
                assert request.params.prompt_logprobs is None or not hit.length
                assert hits[request] in (None, hit.length)
                self.counts["hits"] += hit.length > 0
                self.counts["moved in"] += hit.snapshot == allocation.slot
                self.counts["started again"] += request.num_preemptions > 0 and hit.length > 0
            if state.has_slot_state:
                assert not chunk.start or self.slots[allocation.slot] == nodes[chunk.start], (
                    "slot state of another request"
                )
                self.slots[allocation.slot] = nodes[stop]
                assert [slot for _, slot in chunk.snapshots] == [slot for slot, _ in allocation.planned_snapshots]
                for position, slot in chunk.snapshots:
                    assert chunk.start < position < stop and position % BLOCK == 0
                    self.slots[slot] = nodes[position]
                    self.counts["inside"] += 1
            for blocks, memory in zip(allocation.blocks, self.blocks, strict=True):
                for position in range(chunk.start, stop):
                    assert blocks[position // BLOCK] != DUMMY
                    memory[blocks[position // BLOCK], position % BLOCK] = nodes[position + 1]
        for chunk in chunks:
            nodes, allocation = self._nodes(chunk.request), state.allocations[chunk.request]
            for spec, blocks, memory in zip(state.groups, allocation.blocks, self.blocks, strict=True):
                for position in range(chunk.start + chunk.count):
                    if sees(spec, chunk.start, position):
                        entry = blocks[position // BLOCK]
                        assert entry != DUMMY
                        assert memory.get((entry, position % BLOCK)) == nodes[position + 1], (
                            "block content of another request"
                        )
        self.scheduler.mark_computed(chunks)
        for chunk in chunks:
            self._computed(chunk)
            if chunk.samples:
                self._sample(chunk.request)
        self._check_pools()
        self.counts["steps"] += 1

    def _arrive(self) -> None:
        rng = self.rng
        prompt = rng.choice(self.texts)[: rng.choice([rng.randint(0, self.longest), self.longest])]
        prompt = prompt + rng.choices([0, 1], k=rng.randint(not prompt, rng.choice([2, 6, self.longest])))
        prompt = prompt[: self.longest]
        output = min(rng.choice([1, rng.randint(1, 12), self.longest]), self.longest + 1 - len(prompt))
        root = rng.choices([ROOT, b"salted", None], [8, 1, 1])[0]
        request = make_request("", prompt, output, root)
        if rng.random() < 0.1:
            request.params = SamplingParams(prompt_logprobs=0)
        self.scheduler.add(request)
        self.texts = [*self.texts[-6:], prompt]

    def _nodes(self, request: Request) -> list[int]:
        """Return the trie node of each prefix of the request."""
        nodes = self.nodes.setdefault(request, [self.trie.setdefault(request.prefix_root, len(self.trie))])
        for token in request.token_ids(len(nodes) - 1, request.num_tokens):
            nodes.append(self.trie.setdefault((nodes[-1], token), len(self.trie)))
        return nodes

    def _sample(self, request: Request) -> None:
        request.output_token_ids.append(self.rng.randint(0, 1))
        if len(request.output_token_ids) == request.max_tokens:
            self.scheduler.finish(request)
            del self.state.started[request], self.nodes[request]
            self.texts = [*self.texts[-6:], request.prompt_token_ids + request.output_token_ids]
            self.counts["done"] += 1

    def _predicted_hit(self, request: Request) -> int | None:
        if not self.roomy:
            return None
        if request.prefix_root is None or request.params.prompt_logprobs is not None:
            return 0
        cached = self.snapshots if self.state.has_slot_state else self.known
        nodes = self._nodes(request)
        return max((n for n in range(BLOCK, request.num_tokens, BLOCK) if nodes[n] in cached), default=0)

    def _computed(self, chunk: Scheduled) -> None:
        """Record the cached prefixes of a roomy world."""
        request = chunk.request
        if not self.roomy or request.prefix_root is None:
            return
        nodes, count = self._nodes(request), request.num_computed
        self.known.update(nodes[BLOCK : count + 1 : BLOCK])
        self.snapshots.update(nodes[position] for position, _ in chunk.snapshots)
        if count % BLOCK == 0:
            generated = count > len(request.prompt_token_ids)
            if generated:
                self.snapshots.discard(self.latest.pop(request, -1))
            if nodes[count] not in self.snapshots:
                self.snapshots.add(nodes[count])
                if generated:
                    self.latest[request] = nodes[count]

    def _check_pools(self) -> None:
        state = self.state
        state.check_integrity()
        for index, pool in enumerate((*state.block_pools, state.slot_pool)):
            referenced = {
                entry
                for allocation in state.allocations.values()
                for entry in (
                    allocation.blocks[index]
                    if index < len(state.groups)
                    else [allocation.slot, *(slot for slot, _ in allocation.planned_snapshots)]
                )
            } - {DUMMY}
            free = sum(not pool.is_cached(entry) and entry not in referenced for entry in range(1, pool.capacity + 1))
            assert len(referenced) == pool.num_referenced
            assert len(referenced) + pool.num_cached + free == pool.capacity
            assert pool.num_free == pool.num_cached + free


MODELS = [
    ([None], False),
    ([None, 6], False),
    ([1, 3, 4, 9], False),
    ([None, -8], False),
    ([-1, -4, -6, -10], False),
    ([], True),
    ([None], True),
    ([6], True),
    ([None, 1, 3, 4, 9], True),
    ([None, -8, -6, 3], True),
]


@pytest.mark.parametrize(("windows", "slots"), MODELS)
def test_every_request_reads_only_state_of_its_own_prefix(windows, slots):
    counts: Counter[str] = Counter()
    for seed in range(18 if slots else 12):
        world = World(seed, windows, slots)
        for _ in range(110):
            world.step()
        counts += world.counts
        counts["evicted"] += sum(pool.num_evictions for pool in (*world.state.block_pools, world.state.slot_pool))
    assert min(counts[name] for name in ("hits", "done")) > 70
    assert counts["evicted"] > 400 and counts["cancelled"] > 10
    assert not windows or min(counts["preempted"], counts["started again"]) > 8
    assert not slots or counts["inside"] > 30


@pytest.mark.parametrize(("windows", "slots"), MODELS)
def test_large_pools_hit_every_computed_prefix(windows, slots):
    counts: Counter[str] = Counter()
    for seed in range(4):
        world = World(seed, windows, slots, roomy=True)
        for _ in range(60):
            world.step()
        assert not any(pool.num_evictions for pool in (*world.state.block_pools, world.state.slot_pool))
        counts += world.counts
    assert counts["hits"] > 30


# Conversations


def roomy_scheduler(windows: Sequence[int | None], slots: bool, budget: int, interval: int | None = None) -> Scheduler:
    state = StateManager([group(window) for window in windows], [99] * len(windows), 40, BLOCK, slots)
    return Scheduler(state, 4, budget, interval, "always")


def run(scheduler: Scheduler, *requests: Request, steps: int = 1000) -> None:
    """Run requests, with unique generated tokens, for up to `steps` steps."""
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work and steps:
        chunks = scheduler.schedule()
        scheduler.mark_computed(chunks)
        for chunk in chunks:
            if chunk.samples:
                chunk.request.output_token_ids.append(1000 * (id(chunk.request) % 10**9) + chunk.request.num_tokens)
                if len(chunk.request.output_token_ids) == chunk.request.max_tokens:
                    scheduler.finish(chunk.request)
        scheduler.state.check_integrity()
        steps -= 1


def snapshots(scheduler: Scheduler, request: Request) -> list[int]:
    """Return the lengths of the request's prefixes that have a snapshot."""
    keys = request.block_keys(BLOCK, request.num_tokens)
    return [BLOCK * n for n, key in enumerate(keys, 1) if scheduler.state.slot_pool.find(key) is not None]


@pytest.mark.parametrize(("windows", "slots"), MODELS)
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 100])
@pytest.mark.parametrize(("prompt", "output"), [(10, 9), (8, 5), (11, 2), (12, 1), (9, 12), (1, 16), (13, 3)])
def test_next_chat_turn_hits_all_full_blocks_computed_before(windows, slots, budget, prompt, output):
    scheduler = roomy_scheduler(windows, slots, budget)
    turns = [make_request("0", range(prompt), output)]
    run(scheduler, turns[0])
    for turn in (1, 2):
        before = turns[-1].prompt_token_ids + turns[-1].output_token_ids
        turns.append(make_request(str(turn), [*before, 5, 6, 7], output))
        computed = len(before) - 1  # the last token was sampled and never computed
        run(scheduler, turns[-1], steps=1)
        assert turns[-1].num_cached_tokens == computed // BLOCK * BLOCK
        run(scheduler)
    assert scheduler.num_cached_tokens == sum(turn.num_cached_tokens for turn in turns)
    assert scheduler.num_started_tokens == sum(len(turn.prompt_token_ids) for turn in turns)


@pytest.mark.parametrize("budget", [3, 7, 100])
def test_prompt_snapshots_and_latest_generated_snapshot_are_kept(budget):
    scheduler = roomy_scheduler([None, 6], True, budget)
    request = make_request("r", range(10), 30)
    scheduler.add(request)
    while scheduler.has_work:
        run(scheduler, steps=1)
        latest = request.num_computed // BLOCK * BLOCK
        generated = [length for length in snapshots(scheduler, request) if length > 10]
        assert generated == ([latest] if latest > 10 else [])
    ours = snapshots(scheduler, request)
    assert ours[-2:] == [8, 36]
    if budget == 100:
        assert ours == [8, 36]
    assert len(ours) == scheduler.state.slot_pool.num_cached


def test_preemption_may_leave_one_more_generated_snapshot():
    scheduler = roomy_scheduler([None], True, 100)
    request = make_request("r", range(10), 30)
    run(scheduler, request, steps=9)
    assert snapshots(scheduler, request) == [8, 16]
    scheduler._preempt_youngest()
    run(scheduler)
    assert snapshots(scheduler, request) == [8, 16, 36]


@pytest.mark.parametrize(
    ("interval", "kept"), [(None, [16, 28]), (1, [4, 8, 12, 16, 20, 24, 28]), (3, [12, 16, 24, 28])]
)
def test_long_prompt_takes_snapshots_at_the_interval_and_near_its_end(interval, kept):
    scheduler = roomy_scheduler([None], True, 100, interval)
    request = make_request("r", range(30))
    run(scheduler, request)
    assert snapshots(scheduler, request) == kept


@pytest.mark.parametrize("budget", [5, 100])
@pytest.mark.parametrize("windows", [[None], [None, 6], [6], [None, -8], [-6]])
def test_third_request_hits_where_the_second_branched_off(windows, budget):
    scheduler = roomy_scheduler(windows, True, budget)
    requests = [make_request(str(index), [*range(22), *[50 + index] * 20], 3) for index in range(3)]
    for request in requests:
        run(scheduler, request)
    assert [request.num_cached_tokens for request in requests][::2] == [0, 20]
    # Computed as one chunk of 42 tokens, the first request takes snapshots at 40 and 28 only.
    assert requests[1].num_cached_tokens == (0 if budget == 100 else 20)


def test_prompt_logprobs_disable_hits_but_fill_the_cache():
    scheduler = roomy_scheduler([None, 6], True, 100)
    wanted = make_request("wanted", range(18), 2)
    wanted.params = SamplingParams(prompt_logprobs=1)
    for expected in (0, 0):
        run(scheduler, wanted)
        assert wanted.num_cached_tokens == expected
        wanted = make_request("again", range(18), 2)
        wanted.params = SamplingParams(prompt_logprobs=1)
    run(scheduler, other := make_request("other", range(18), 2))
    assert other.num_cached_tokens == 16


def test_no_hits_between_different_roots():
    scheduler = roomy_scheduler([None], True, 100)
    for root in (ROOT, b"salt", None, None):
        run(scheduler, request := make_request(str(root), range(18), 2, root))
        assert request.num_cached_tokens == 0
    run(scheduler, request := make_request("again", range(18), 2, b"salt"))
    assert request.num_cached_tokens == 16


def test_requests_of_the_same_step_do_not_share_blocks():
    scheduler = roomy_scheduler([None], False, 100)
    first, second = make_request("a", range(18), 2), make_request("b", range(18), 2)
    run(scheduler, first, second, steps=1)
    assert second.num_cached_tokens == 0
    held = [scheduler.state.allocations[request].blocks[0] for request in (first, second)]
    assert not set(held[0]) & set(held[1])
    run(scheduler)
    assert scheduler.state.block_pools[0].num_cached == 4  # one of each content
