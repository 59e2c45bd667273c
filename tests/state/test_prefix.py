"""The prefix cache's bookkeeping: keys, hits, pages and slots, against naive oracles and a fake memory."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interrupts import interrupted
from lamella.engine.images.reader import Image, PlacedImage
from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduler
from lamella.state.manager import DUMMY, StateManager
from lamella.state.prefix import MISS, Hit, page_key, root_key
from lamella.state.spec import PagedState

pytestmark = pytest.mark.unit

PAGE = 4
ROOT = root_key("model", "cpu", None)
TOKEN_IDS = st.lists(st.integers(0, 1), max_size=14)


def group(window: int | None = None) -> PagedState:
    """One of a window, or of a chunk where that is written as a negative number."""
    if window is not None and window < 0:
        return PagedState(1, 8, torch.float32, chunk=-window)
    return PagedState(1, 8, torch.float32, window=window)


def sees(spec: PagedState, position: int, other: int) -> bool:
    """Whether a token at `position` sees the earlier one at `other`."""
    if spec.chunk is not None:
        return position // spec.chunk == other // spec.chunk
    return spec.window is None or position - other < spec.window


def make_request(name: str, prompt: Sequence[int], output: int = 1, root: bytes | None = ROOT) -> Request:
    return Request(name, list(prompt), SamplingParams(temperature=0), max_tokens=output, prefix_root=root)


def keys_of(token_ids: Sequence[int], root: bytes = ROOT) -> list[bytes]:
    return make_request("", token_ids, root=root).page_keys(PAGE, len(token_ids))


def brute_force(state: StateManager, keys: Sequence[bytes]) -> Hit:
    """The longest prefix for which every page that its next token sees can be found, and a snapshot where needed."""
    there = [[pool.find(key) is not None for key in keys] + [False] for pool in state.page_pools]
    known = max((each.index(False) * PAGE for each in there), default=0)
    for length in range(len(keys) * PAGE, 0, -PAGE):
        snapshot = state.slot_pool.find(keys[length // PAGE - 1]) if state.has_slot_state else None
        if (snapshot is not None or not state.has_slot_state) and all(
            each[position // PAGE]
            for spec, each in zip(state.groups, there, strict=True)
            for position in range(length)
            if sees(spec, length, position)
        ):
            return Hit(length, snapshot, known)
    return Hit(known=known)


def bookkeeping(state: StateManager) -> str:
    """All that the manager and its pools know, the order of places included."""
    pools = [vars(pool) for pool in (*state.page_pools, state.slot_pool)]
    return repr((pools, {str(id(request)): held for request, held in state.holdings.items()}, state._copies))


# Keys


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TOKEN_IDS, TOKEN_IDS, st.sampled_from([ROOT, root_key("m", "cpu", "salt")]))
def test_keys_are_equal_just_where_all_tokens_so_far_and_the_root_are(first, second, root):
    ours, theirs = keys_of(first), keys_of(second, root)
    assert len(ours) == len(first) // PAGE
    for index, key in enumerate(ours):
        for other, their in enumerate(theirs):
            same = root == ROOT and first[: (index + 1) * PAGE] == second[: (other + 1) * PAGE]
            assert (key == their) == same
    assert len(set(ours)) == len(ours)


def test_the_roots_of_different_models_placements_and_salts_differ():
    parts = [
        (m, p, s) for m in ("a", "b", "ab", "") for p in ("cpu", "cuda:0", "") for s in (None, "", "None", "a", "b")
    ]
    assert len({root_key(*some) for some in parts}) == len(parts)
    assert [root_key(*some) for some in parts] == [root_key(*some) for some in parts]
    assert root_key("a", "b") != root_key("ab") != root_key("a, b")


def test_page_keys_tell_large_tokens_and_page_limits_apart():
    keys = {page_key(ROOT, ids) for ids in ([1], [256], [65536], [2**31], [2**40], [0, 1], [1, 0], [0], [1, 0, 0], [])}
    assert len(keys) == 10
    assert page_key(page_key(ROOT, [1]), [2]) != page_key(ROOT, [1, 2])


@given(st.integers(1, 11), st.lists(st.integers(0, 16), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_keys_of_a_growing_request_are_those_of_its_tokens(prompt, grown):
    request = make_request("r", range(prompt))
    for count in grown:
        request.output_token_ids += range(100, 100 + count)
        everything = request.prompt_token_ids + request.output_token_ids
        whole = keys_of(everything)
        for tokens in (0, 3, 4, prompt, len(everything)):
            assert (
                request.page_keys(PAGE, min(tokens, len(everything))) == whole[: min(tokens, len(everything)) // PAGE]
            )


# Of a prompt with images: how much text stands before each, and which it is; None is the same tokens without an image.
IMAGES = st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0, 1, 2, None])), max_size=3)
PATCHES = {0: 5, 1: 5, 2: 9, None: 5}


def with_images(parts: Sequence[tuple[int, int | None]], after: int) -> tuple[Request, list[object]]:
    """A request, and what each of its tokens stands for: itself, or a row of an image."""
    token_ids: list[int] = []
    meaning: list[object] = []
    placed = []
    for before, which in parts:
        count = PATCHES[which]
        token_ids += [1] * before
        meaning += [1] * before
        if which is not None:
            image = Image(bytes([which]) * 32, [], np.arange(count), None)
            placed.append(PlacedImage(image.places + len(token_ids), image))
        token_ids += [2] * count
        meaning += [2 if which is None else (which, row) for row in range(count)]
    request = make_request("", [*token_ids, *[1] * after])
    request.attachments = tuple(placed)
    return request, [*meaning, *[1] * after]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(IMAGES, IMAGES, st.integers(0, 5))
def test_keys_are_equal_just_where_all_tokens_stand_for_the_same(first, second, after):
    (ours, meant), (theirs, others) = with_images(first, after), with_images(second, after)
    pairs = zip(ours.page_keys(PAGE, len(meant)), theirs.page_keys(PAGE, len(others)), strict=False)
    for stop, (key, other) in enumerate(pairs, 1):
        stop *= PAGE
        assert (key == other) == (meant[:stop] == others[:stop])
        (*_, text) = keys_of(ours.token_ids(0, stop))
        assert (key == text) == (meant[:stop] == ours.token_ids(0, stop))


def test_a_request_without_a_root_has_no_keys():
    assert make_request("r", range(20), root=None).page_keys(PAGE, 20) == []


# Hits

WINDOWS = st.lists(st.sampled_from([None, 1, 2, 3, 4, 5, 8, 9, 13, -1, -3, -4, -8, -10]), max_size=3)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data(), WINDOWS, st.booleans(), st.integers(0, 7))
def test_a_hit_is_the_longest_prefix_whose_visible_pages_and_snapshot_are_at_hand(data, windows, slots, count):
    state = StateManager([group(w) for w in windows], [8] * len(windows), 8, PAGE, slots)
    keys = keys_of(range(count * PAGE))
    present = st.lists(st.sampled_from([True, True, True, False]), min_size=count, max_size=count)
    for pool in (*state.page_pools, state.slot_pool):
        for key, there in zip(keys, data.draw(present), strict=True):
            if there:
                (place,) = pool.allocate()
                pool.name(place, key)
                if data.draw(st.booleans()):
                    pool.free([place])
    for length in range(count + 1):
        before = bookkeeping(state)
        assert state.match(keys[:length]) == brute_force(state, keys[:length])
        assert bookkeeping(state) == before


@pytest.mark.parametrize(
    ("window", "gone", "length"),
    [
        (None, [], 20),
        (None, [0], 0),
        (None, [3], 12),
        (1, [0, 1, 2, 3, 4], 20),  # a token that sees only itself needs no page
        (2, [0, 1, 2, 3], 20),
        (2, [4], 16),
        (4, [0, 1, 2, 3], 20),
        (4, [4], 16),
        (5, [0, 1, 2, 3], 20),  # itself and all of the page before
        (6, [0, 1, 2], 20),
        (6, [0, 1, 2, 3], 0),
        (6, [0, 3], 12),
        (-4, [0, 1, 2, 3, 4], 20),  # where a chunk ends with a page, nothing of it is seen any more
        (-8, [0, 1, 2, 3], 20),
        (-8, [4], 16),
        (-8, [0, 1, 2, 3, 4], 16),
        (-6, [0, 1, 2, 3], 20),  # a chunk from 18 on, which lies inside a page
        (-6, [4], 16),
        (-6, [4, 2], 16),
        (-6, [3, 4], 12),
    ],
)
def test_what_a_window_needs_of_the_pages(window, gone, length):
    state = StateManager([group(window)], [5], 1, PAGE)
    keys, pool = keys_of(range(20)), state.page_pools[0]
    for place, key in zip(pool.allocate(5), keys, strict=True):
        pool.name(place, key)
    for index in gone:
        pool.drop(keys[index])
    assert state.match(keys).length == length


# A request that starts with a hit


def computed_once(state: StateManager, tokens: int, release: bool = True) -> list[bytes]:
    """Let a first request compute `tokens` tokens, page by page; the keys of its pages."""
    keys = keys_of(range(tokens))
    for stop in range(PAGE, tokens + 1, PAGE):
        assert state.grow("first", stop)
        state.computed("first", stop, keys[: stop // PAGE])
    if release:
        state.release("first")
    state.check_integrity()
    return keys


def test_a_hit_shares_just_the_pages_that_can_be_seen_and_gets_new_ones_for_the_rest():
    windows = [None, 1, 3, 4, 6, 9, -4, -8, -6, -40]
    state = StateManager([group(w) for w in windows], [40] * len(windows), 8, PAGE, True)
    keys = computed_once(state, 20, release=False)
    hit = state.match(keys)
    assert hit == Hit(20, state.slot_pool.find(keys[4]), 20)
    state.take_copies()
    assert state.grow("second", 27, hit, keys)
    state.check_integrity()
    for window, pool, pages, others in zip(
        windows, state.page_pools, state.holdings["second"].pages, state.holdings["first"].pages, strict=True
    ):
        dead = {None: 0, 1: 5, 3: 4, 4: 4, 6: 3, 9: 3, -4: 5, -8: 4, -6: 4, -40: 0}[window]
        assert pages[:dead] == [DUMMY] * dead
        assert pages[dead:5] == others[dead:5] == [pool.find(key) for key in keys[dead:]]
        assert len(set(pages[5:])) == 2 and not set(pages[5:]) & {DUMMY, *others}
    slot = state.holdings["second"].slot
    assert slot not in (hit.snapshot, state.holdings["first"].slot)
    assert state.take_copies() == [(hit.snapshot, slot)]
    assert state.take_copies() == []
    state.release("first")
    state.release("second")
    assert all(pool.num_free == pool.capacity for pool in (*state.page_pools, state.slot_pool))


@pytest.mark.parametrize("lacking", ["full", "windowed", "slot", "growing"])
def test_where_pages_or_slots_lack_nothing_changes(lacking):
    state = StateManager([group(), group(6)], [10, 10], 3, PAGE, True)
    keys = computed_once(state, 12)
    if lacking == "slot":
        state.slot_pool.allocate(3)
    elif lacking == "growing":
        assert state.grow("second", 13, state.match(keys), keys)
        state.page_pools[1].allocate(state.page_pools[1].num_free - 1)
    else:
        # Two pages short: what is left would do if those of the hit were not among it.
        state.page_pools[lacking == "windowed"].allocate(5)
    hit = state.match(keys) if lacking != "slot" else Hit(12)
    assert hit.length == 12
    before = bookkeeping(state)
    if lacking == "growing":
        assert not state.grow("second", 24)
        assert bookkeeping(state) == before
        assert state.grow("second", 20)
    else:
        assert not state.grow("second", 12 + {"full": 12, "windowed": 16, "slot": 1}[lacking], hit, keys)
        assert bookkeeping(state) == before


def test_cached_pages_of_the_hit_are_not_counted_as_room_for_new_ones():
    state = StateManager([group()], [5], 2, PAGE)
    keys = computed_once(state, 12)
    (blocked,) = state.page_pools[0].allocate()
    hit = state.match(keys)
    assert hit.length == 12 and state.page_pools[0].num_free == 4
    before = bookkeeping(state)
    assert not state.grow("second", 17, hit, keys)  # two new ones, and one is left
    assert bookkeeping(state) == before
    assert state.grow("second", 16, hit, keys)
    assert state.page_pools[0].num_free == 0 and blocked not in state.holdings["second"].pages[0]
    assert state.holdings["second"].pages[0][:3] == [state.page_pools[0].find(key) for key in keys]


def test_a_hit_can_start_though_its_own_pages_are_all_that_is_free():
    state = StateManager([group()], [3], 1, PAGE)
    keys = computed_once(state, 12)
    assert state.page_pools[0].num_free == state.page_pools[0].num_cached == 3
    assert state.grow("second", 12, state.match(keys), keys)
    assert state.page_pools[0].num_free == 0
    assert state.page_pools[0].num_evictions == 0


@pytest.mark.parametrize("spare", [0, 1])
def test_the_last_slot_may_be_the_snapshot_itself(spare):
    state = StateManager([group()], [9], 1 + spare, PAGE, True)
    keys = keys_of(range(8))
    for stop in (4, 8):
        assert state.grow("first", stop)
        state.computed("first", stop, keys[: stop // PAGE])
        state.take_copies()
    state.release("first")
    if not spare:  # no room for a snapshot while the request ran: put one there
        (place,) = state.slot_pool.allocate()
        state.slot_pool.name(place, keys[1])
        state.slot_pool.free([place])
    hit = state.match(keys)
    assert hit.length == 8 and hit.snapshot is not None
    assert state.grow("second", 9, hit, keys)
    slot = state.holdings["second"].slot
    assert (slot == hit.snapshot) == (not spare)
    assert state.take_copies() == ([(hit.snapshot, slot)] if spare else [])
    assert (state.slot_pool.find(keys[1]) is None) == (not spare)
    state.check_integrity()


def test_the_snapshot_of_a_hit_is_the_last_to_go():
    state = StateManager([group()], [9], 4, PAGE, True)
    keys = computed_once(state, 12)
    assert state.slot_pool.num_cached == 3
    assert state.grow("other", 1)  # takes the first request's slot
    hit = state.match(keys[:1])
    assert state.grow("second", 5, hit, keys[:1])
    assert hit.snapshot is not None
    assert state.slot_pool.find(keys[0]) == hit.snapshot
    assert state.slot_pool.find(keys[1]) is None  # it was the longest nobody's of the others
    assert state.slot_pool.find(keys[2]) is not None


def test_a_snapshot_whose_state_is_computed_again_is_the_last_to_go():
    state = StateManager([group()], [9], 3, PAGE, True)
    keys = computed_once(state, 8)
    assert state.grow("again", 4)  # the first one's slot: two snapshots are left
    state.computed("again", 4, keys[:1])
    assert state.grow("other", 1)
    assert [state.slot_pool.find(key) is None for key in keys] == [False, True]


def test_the_end_of_a_prefix_goes_before_its_start():
    state = StateManager([group()], [6], 2, PAGE)
    keys = computed_once(state, 24)
    for left in range(5, -1, -1):
        state.page_pools[0].allocate()
        assert state.match(keys).length == left * PAGE


def test_without_slot_state_nothing_is_copied_and_no_slot_kept():
    state = StateManager([group()], [6], 3, PAGE)
    keys = computed_once(state, 8)
    assert state.match(keys) == Hit(8, None, 8)
    assert state.slot_pool.num_cached == 0
    assert state.grow("second", 9, state.match(keys), keys)
    assert state.take_copies() == []


def test_after_a_reset_nothing_hits_and_who_runs_keeps_what_it_has():
    state = StateManager([group(), group(6)], [20, 20], 6, PAGE, True)
    keys = computed_once(state, 12, release=False)
    held = repr(state.holdings)
    state.reset_prefix_cache()
    assert state.match(keys) == MISS
    assert repr(state.holdings) == held
    state.check_integrity()
    state.release("first")
    assert all(pool.num_cached == 0 for pool in (*state.page_pools, state.slot_pool))


# Requests through the scheduler, on a fake memory


class Checked(StateManager):
    """Looks at each `grow` from outside."""

    started: dict[Hashable, Hit]

    def grow(self, request: Hashable, tokens: int, hit: Hit = MISS, keys: Sequence[bytes] = ()) -> bool:
        before, copies = bookkeeping(self), list(self._copies)
        mine = self.holdings.get(request)
        had = [list(pages) for pages in mine.pages] if mine else [[] for _ in self.groups]
        held = [{page for other in self.holdings.values() for page in other.pages[i]} for i in range(len(self.groups))]
        slots = {other.slot for other in self.holdings.values()}
        evictions = [pool.num_evictions for pool in self.page_pools]
        found, short = [], not mine and len(slots) == self.slot_pool.capacity
        for index, (spec, pool) in enumerate(zip(self.groups, self.page_pools, strict=True)):
            live = [
                any(sees(spec, hit.length, position) for position in range(page * PAGE, (page + 1) * PAGE))
                for page in range(hit.length // PAGE)
            ]
            found.append(had[index] or [pool.find(keys[page]) if seen else DUMMY for page, seen in enumerate(live)])
            taken = -(-tokens // PAGE) - len(found[-1]) + len({*found[-1]} - held[index] - {DUMMY})
            short |= taken > pool.capacity - len(held[index] - {DUMMY})
        if not super().grow(request, tokens, hit, keys):
            assert short, "there was room"
            assert bookkeeping(self) == before
            return False
        assert not short
        mine = self.holdings[request]
        for pages, known, others, pool, evicted in zip(
            mine.pages, found, held, self.page_pools, evictions, strict=True
        ):
            new = pages[len(known) :]
            assert pages[: len(known)] == known
            assert len(pages) == max(len(known), -(-tokens // PAGE))
            assert len(set(new)) == len(new) and not set(new) & {*known, *others, DUMMY}
            assert pool.num_evictions - evicted <= len(new)
        if request not in self.started:
            self.started[request] = hit
            assert mine.slot not in slots
            move = hit.snapshot is not None and hit.snapshot != mine.slot
            assert self._copies == copies + ([(hit.snapshot, mine.slot)] if move else [])
        else:
            assert self._copies == copies
        return True


class World:
    """A scheduler with a model whose state at a position says all the tokens up to it, as the number of a trie's node.

    What was never written reads as None. With `roomy` pools nothing is ever evicted, so that each hit can be foretold.
    """

    def __init__(self, seed: int, windows: Sequence[int | None], slots: bool, roomy: bool = False) -> None:
        self.rng = rng = random.Random(seed)
        groups = [group(window) for window in windows]
        budget, seqs, self.longest = rng.randint(1, 14), rng.randint(1, 5), rng.randint(6, 40)
        probe = StateManager(groups, [1] * len(groups), 1, PAGE)
        spare = rng.choice([0, 1, 2, 4, 20])
        capacities = [
            400 if roomy else probe.peak_pages(index, self.longest, min(budget, self.longest)) + rng.randint(0, spare)
            for index in range(len(groups))
        ]
        self.state = Checked(groups, capacities, 300 if roomy else seqs + rng.choice([0, 0, 1, 2, 6]), PAGE, slots)
        self.state.started = {}
        self.scheduler = Scheduler(self.state, seqs, budget, rng.choice([None, None, 1, 2, 3]), "always")
        self.roomy, self.rate = roomy, rng.choice([0.1, 0.3, 0.6])
        self.trie: dict[object, int] = {}
        self.nodes: dict[Request, list[int]] = {}
        self.texts: list[list[int]] = [[]]
        self.pages: list[dict[tuple[int, int], int]] = [{} for _ in groups]
        self.slots: dict[int, int | None] = {}
        self.counts: Counter[str] = Counter()
        # Of a roomy world: nodes that were computed, those with a snapshot, and each request's latest generated one.
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
            keys = request.page_keys(PAGE, request.num_tokens - 1) if request.params.prompt_logprobs is None else []
            assert state.match(keys) == brute_force(state, keys)
            hits[request] = self._foretold(request)
        preempted = self.scheduler.num_preemptions
        shares = self.scheduler.schedule()
        for request in self.scheduler.waiting:
            state.started.pop(request, None)  # preempted
        self.counts["preempted"] += self.scheduler.num_preemptions - preempted
        self._check_pools()
        for source, target in state.take_copies():
            assert source != target
            self.slots[target] = self.slots.get(source)
            self.counts["copies"] += 1
        for share in shares:
            request, nodes = share.request, self._nodes(share.request)
            holding, stop = state.holdings[request], share.start + share.count
            hit = state.started[request]
            if request in hits:
                assert share.start == hit.length
                assert request.params.prompt_logprobs is None or not hit.length
                assert hits[request] in (None, hit.length)
                self.counts["hits"] += hit.length > 0
                self.counts["moved in"] += hit.snapshot == holding.slot
                self.counts["started again"] += request.num_preemptions > 0 and hit.length > 0
            if state.has_slot_state:
                assert not share.start or self.slots[holding.slot] == nodes[share.start], "not its own past"
                self.slots[holding.slot] = nodes[stop]
            for pages, memory in zip(holding.pages, self.pages, strict=True):
                for position in range(share.start, stop):
                    assert pages[position // PAGE] != DUMMY
                    memory[pages[position // PAGE], position % PAGE] = nodes[position + 1]
        for share in shares:
            nodes, holding = self._nodes(share.request), state.holdings[share.request]
            for spec, pages, memory in zip(state.groups, holding.pages, self.pages, strict=True):
                for position in range(share.start + share.count):
                    if sees(spec, share.start, position):
                        place = pages[position // PAGE]
                        assert place != DUMMY
                        assert memory.get((place, position % PAGE)) == nodes[position + 1], "a token that it never saw"
        self.scheduler.computed(shares)
        for share in shares:
            self._computed(share.request)
            if share.samples:
                self._sample(share.request)
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
        """For each count of leading tokens, the node that says them."""
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

    def _foretold(self, request: Request) -> int | None:
        if not self.roomy:
            return None
        if request.prefix_root is None or request.params.prompt_logprobs is not None:
            return 0
        at_hand = self.snapshots if self.state.has_slot_state else self.known
        nodes = self._nodes(request)
        return max((n for n in range(PAGE, request.num_tokens, PAGE) if nodes[n] in at_hand), default=0)

    def _computed(self, request: Request) -> None:
        """Of a roomy world: what is at hand now."""
        if not self.roomy or request.prefix_root is None:
            return
        nodes, count = self._nodes(request), request.num_computed
        self.known.update(nodes[PAGE : count + 1 : PAGE])
        if count % PAGE == 0:
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
        for index, pool in enumerate((*state.page_pools, state.slot_pool)):
            held = {
                place
                for holding in state.holdings.values()
                for place in (holding.pages[index] if index < len(state.groups) else [holding.slot])
            } - {DUMMY}
            blank = sum(not pool.is_cached(place) and place not in held for place in range(1, pool.capacity + 1))
            assert len(held) == pool.num_held
            assert len(held) + pool.num_cached + blank == pool.capacity
            assert pool.num_free == pool.num_cached + blank


KINDS = [
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


@pytest.mark.parametrize(("windows", "slots"), KINDS)
def test_every_request_finds_just_its_own_past_in_pages_and_slot(windows, slots):
    counts: Counter[str] = Counter()
    for seed in range(18 if slots else 12):
        world = World(seed, windows, slots)
        for _ in range(110):
            world.step()
        counts += world.counts
        counts["evicted"] += sum(pool.num_evictions for pool in (*world.state.page_pools, world.state.slot_pool))
    assert min(counts[what] for what in ("hits", "done")) > 70
    assert counts["evicted"] > 400 and counts["cancelled"] > 10
    assert not windows or min(counts["preempted"], counts["started again"]) > 8


@pytest.mark.parametrize(("windows", "slots"), KINDS)
def test_with_room_for_everything_all_that_was_computed_is_hit(windows, slots):
    counts: Counter[str] = Counter()
    for seed in range(4):
        world = World(seed, windows, slots, roomy=True)
        for _ in range(60):
            world.step()
        assert not any(pool.num_evictions for pool in (*world.state.page_pools, world.state.slot_pool))
        counts += world.counts
    assert counts["hits"] > 30


# Conversations


def roomy_scheduler(windows: Sequence[int | None], slots: bool, budget: int, interval: int | None = None) -> Scheduler:
    state = StateManager([group(window) for window in windows], [99] * len(windows), 40, PAGE, slots)
    return Scheduler(state, 4, budget, interval, "always")


def run(scheduler: Scheduler, *requests: Request, steps: int = 1000) -> None:
    """Let them get tokens that nobody else has, to their end or for so many steps."""
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work and steps:
        shares = scheduler.schedule()
        scheduler.computed(shares)
        for share in shares:
            if share.samples:
                share.request.output_token_ids.append(1000 * (id(share.request) % 10**9) + share.request.num_tokens)
                if len(share.request.output_token_ids) == share.request.max_tokens:
                    scheduler.finish(share.request)
        scheduler.state.check_integrity()
        steps -= 1


def snapshots(scheduler: Scheduler, request: Request) -> list[int]:
    """The lengths of the request's prefixes that have one."""
    keys = request.page_keys(PAGE, request.num_tokens)
    return [PAGE * n for n, key in enumerate(keys, 1) if scheduler.state.slot_pool.find(key) is not None]


@pytest.mark.parametrize(("windows", "slots"), KINDS)
@pytest.mark.parametrize("budget", [1, 3, 4, 7, 100])
@pytest.mark.parametrize(("prompt", "output"), [(10, 9), (8, 5), (11, 2), (12, 1), (9, 12), (1, 16), (13, 3)])
def test_the_next_turn_starts_at_the_last_full_page_of_what_was_computed(windows, slots, budget, prompt, output):
    scheduler = roomy_scheduler(windows, slots, budget)
    turns = [make_request("0", range(prompt), output)]
    run(scheduler, turns[0])
    for turn in (1, 2):
        before = turns[-1].prompt_token_ids + turns[-1].output_token_ids
        turns.append(make_request(str(turn), [*before, 5, 6, 7], output))
        computed = len(before) - 1  # the last token was sampled and never computed
        run(scheduler, turns[-1], steps=1)
        assert turns[-1].num_cached_tokens == computed // PAGE * PAGE
        run(scheduler)
    assert scheduler.num_cached_tokens == sum(turn.num_cached_tokens for turn in turns)
    assert scheduler.num_started_tokens == sum(len(turn.prompt_token_ids) for turn in turns)


@pytest.mark.parametrize("budget", [3, 7, 100])
def test_of_a_requests_snapshots_are_kept_the_prompts_and_the_latest_generated_one(budget):
    scheduler = roomy_scheduler([None, 6], True, budget)
    request = make_request("r", range(10), 30)
    scheduler.add(request)
    while scheduler.has_work:
        run(scheduler, steps=1)
        latest = request.num_computed // PAGE * PAGE
        generated = [length for length in snapshots(scheduler, request) if length > 10]
        assert generated == ([latest] if latest > 10 else [])
    ours = snapshots(scheduler, request)
    assert ours[-2:] == [8, 36]
    if budget == 100:
        assert ours == [8, 36]
    assert len(ours) == scheduler.state.slot_pool.num_cached


def test_a_preemption_may_leave_one_more_generated_snapshot():
    scheduler = roomy_scheduler([None], True, 100)
    request = make_request("r", range(10), 30)
    run(scheduler, request, steps=9)
    assert snapshots(scheduler, request) == [8, 16]
    scheduler._preempt_youngest()
    run(scheduler)
    assert snapshots(scheduler, request) == [8, 16, 36]


@pytest.mark.parametrize(("interval", "kept"), [(None, [28]), (1, [4, 8, 12, 16, 20, 24, 28]), (3, [12, 24, 28])])
def test_a_long_prompt_leaves_snapshots_at_every_so_many_pages_and_at_its_last(interval, kept):
    scheduler = roomy_scheduler([None], True, 100, interval)
    request = make_request("r", range(30))
    run(scheduler, request)
    assert snapshots(scheduler, request) == kept


@pytest.mark.parametrize("budget", [5, 100])
@pytest.mark.parametrize("windows", [[None], [None, 6], [6], [None, -8], [-6]])
def test_whoever_branches_off_where_another_did_starts_there(windows, budget):
    scheduler = roomy_scheduler(windows, True, budget)
    requests = [make_request(str(index), [*range(22), *[50 + index] * 20], 3) for index in range(3)]
    for request in requests:
        run(scheduler, request)
    assert [request.num_cached_tokens for request in requests][::2] == [0, 20]
    assert requests[1].num_cached_tokens == (0 if budget == 100 else 20)


def test_a_prompt_whose_logprobs_are_wanted_is_computed_whole_and_of_use_to_others():
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


def test_nobody_hits_what_another_root_or_no_root_computed():
    scheduler = roomy_scheduler([None], True, 100)
    for root in (ROOT, b"salt", None, None):
        run(scheduler, request := make_request(str(root), range(18), 2, root))
        assert request.num_cached_tokens == 0
    run(scheduler, request := make_request("again", range(18), 2, b"salt"))
    assert request.num_cached_tokens == 16


def test_requests_that_start_in_the_same_step_do_not_share_what_is_not_yet_computed():
    scheduler = roomy_scheduler([None], False, 100)
    first, second = make_request("a", range(18), 2), make_request("b", range(18), 2)
    run(scheduler, first, second, steps=1)
    assert second.num_cached_tokens == 0
    held = [scheduler.state.holdings[request].pages[0] for request in (first, second)]
    assert not set(held[0]) & set(held[1])
    run(scheduler)
    assert scheduler.state.page_pools[0].num_cached == 4  # one of each content


def test_the_peak_of_a_group_is_its_reach_a_chunk_and_a_page_torn_at_both_ends():
    whole, window = PagedState(1, 8, torch.float32), PagedState(1, 8, torch.float32, window=6)
    state = StateManager([whole, window], [99, 99], num_slots=2, page_size=4)
    assert [state.peak_pages(0, tokens, chunk=5) for tokens in (1, 4, 5, 100)] == [1, 1, 2, 25]
    assert [state.peak_pages(1, tokens, chunk=5) for tokens in (1, 5, 16, 17, 100)] == [1, 2, 4, 4, 4]
    assert state.peak_pages(1, 100, chunk=1) == 3 and state.peak_pages(1, 100, chunk=8) == 5


class TestRollBack:
    """After a roll-back, nothing that the failed step named or planned can be found; what was there before can."""

    def manager(self):
        return StateManager([PagedState(1, 8, torch.float32)], [8], num_slots=6, page_size=PAGE, has_slot_state=True)

    def test_keys_of_an_uncommitted_step_are_dropped(self):
        state, keys = self.manager(), chain(3)
        assert state.grow("a", 3 * PAGE)
        state.computed("a", PAGE, keys[:1])
        assert state.take_copies()
        state.copied()
        state.commit()
        state.computed("a", 2 * PAGE, keys[:2])
        state.roll_back()
        state.check_integrity()
        state.check_at_rest()
        assert state.match(keys).length == PAGE

    def test_keys_of_an_uncommitted_step_are_dropped_without_slot_state_too(self):
        state, keys = StateManager([PagedState(1, 8, torch.float32)], [8], num_slots=6, page_size=PAGE), chain(3)
        assert state.grow("a", 3 * PAGE)
        state.computed("a", PAGE, keys[:1])
        state.commit()
        state.computed("a", 2 * PAGE, keys[:2])
        assert state.match(keys).length == 2 * PAGE
        state.roll_back()
        assert state.match(keys).length == PAGE

    def test_a_snapshot_whose_copy_was_not_made_is_dropped_with_its_key(self):
        for taken in (False, True):
            state, keys = self.manager(), chain(1)
            assert state.grow("a", PAGE)
            state.computed("a", PAGE, keys)
            state.commit()  # the step is through; the copy belongs to the next one
            if taken:
                state.take_copies()  # and was interrupted
            state.roll_back()
            assert state.match(keys).length == 0 and state.slot_pool.num_cached == 0
            assert state.take_copies() == []

    def test_shared_blocks_stay_when_their_reader_is_rolled_back(self):
        state, keys = self.manager(), chain(2)
        assert state.grow("a", 2 * PAGE)
        state.computed("a", 2 * PAGE, keys)
        state.take_copies(), state.copied(), state.commit()
        state.release("a")
        assert state.grow("b", 3 * PAGE, state.match(keys), keys)
        state.roll_back()
        assert state.match(keys).length == 2 * PAGE

    def test_forgotten_keys_are_not_found_while_requests_hold_them(self):
        state, keys = self.manager(), chain(2)
        assert state.grow("a", 2 * PAGE)
        state.computed("a", 2 * PAGE, keys)
        state.forget(keys)
        assert state.match(keys).length == 0
        state.check_integrity()
        state.release("a")
        state.check_at_rest()

    def test_a_change_interrupted_anywhere_is_repaired(self):
        """Random requests; then one more change, interrupted at a random line."""
        rng = random.Random(5)
        for _ in range(150):
            state, keys = self.manager(), chain(6)
            with interrupted(rng.randrange(1, 400), KeyboardInterrupt()), suppress(KeyboardInterrupt):
                for step in range(12):
                    name = rng.choice("abc")
                    if rng.random() < 0.3:
                        state.release(name)
                    elif name in state.holdings:
                        tokens = min(len(keys), len(state.holdings[name].pages[0])) * PAGE
                        state.computed(name, tokens, keys[: tokens // PAGE])
                    else:
                        state.grow(name, rng.randrange(1, 4) * PAGE, state.match(keys[:2]), keys[:2])
                    if step % 3 == 0:
                        state.take_copies(), state.copied(), state.commit()
            state.roll_back()
            state.check_integrity()
            state.check_at_rest()


def chain(count):
    """Keys of `count` pages in a row."""
    keys = [root_key("test")]
    for index in range(count):
        keys.append(page_key(keys[-1], [index] * PAGE))
    return keys[1:]
