"""Hits of the prefix cache, and the blocks and slots of requests that start with one, against a naive search."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interrupts import interrupted
from lamella.state.manager import DUMMY, StateManager
from lamella.state.prefix import MISS, Hit, chain_keys, root_key
from lamella.state.spec import PagedState
from prefix_cases import BLOCK, bookkeeping, brute_force, group, keys_of

pytestmark = pytest.mark.unit

pytestmark = pytest.mark.unit


WINDOWS = st.lists(st.sampled_from([None, 1, 2, 3, 4, 5, 8, 9, 13, -1, -3, -4, -8, -10]), max_size=3)


@settings(max_examples=250, deadline=None, derandomize=True)
@given(st.data(), WINDOWS, st.booleans(), st.integers(0, 7))
def test_a_hit_is_the_longest_prefix_whose_visible_blocks_and_snapshot_are_at_hand(data, windows, slots, count):
    state = StateManager([group(w) for w in windows], [8] * len(windows), 8, BLOCK, slots)
    keys = keys_of(range(count * BLOCK))
    present = st.lists(st.sampled_from([True, True, True, False]), min_size=count, max_size=count)
    for pool in (*state.block_pools, state.slot_pool):
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
        (1, [0, 1, 2, 3, 4], 20),  # a token that sees only itself needs no block
        (2, [0, 1, 2, 3], 20),
        (2, [4], 16),
        (4, [0, 1, 2, 3], 20),
        (4, [4], 16),
        (5, [0, 1, 2, 3], 20),  # itself and all of the block before
        (6, [0, 1, 2], 20),
        (6, [0, 1, 2, 3], 0),
        (6, [0, 3], 12),
        (-4, [0, 1, 2, 3, 4], 20),  # where a chunk ends with a block, nothing of it is seen any more
        (-8, [0, 1, 2, 3], 20),
        (-8, [4], 16),
        (-8, [0, 1, 2, 3, 4], 16),
        (-6, [0, 1, 2, 3], 20),  # a chunk from 18 on, which lies inside a block
        (-6, [4], 16),
        (-6, [4, 2], 16),
        (-6, [3, 4], 12),
    ],
)
def test_what_a_window_needs_of_the_blocks(window, gone, length):
    state = StateManager([group(window)], [5], 1, BLOCK)
    keys, pool = keys_of(range(20)), state.block_pools[0]
    for place, key in zip(pool.allocate(5), keys, strict=True):
        pool.name(place, key)
    for index in gone:
        pool.drop(keys[index])
    assert state.match(keys).length == length


# A request that starts with a hit


def computed_once(state: StateManager, tokens: int, release: bool = True) -> list[bytes]:
    """Let a first request compute `tokens` tokens, block by block; the keys of its blocks."""
    keys = keys_of(range(tokens))
    for stop in range(BLOCK, tokens + 1, BLOCK):
        assert state.grow("first", stop)
        state.computed("first", stop, keys[: stop // BLOCK])
    if release:
        state.release("first")
    state.check_integrity()
    return keys


def test_a_hit_shares_just_the_blocks_that_can_be_seen_and_gets_new_ones_for_the_rest():
    windows = [None, 1, 3, 4, 6, 9, -4, -8, -6, -40]
    state = StateManager([group(w) for w in windows], [40] * len(windows), 8, BLOCK, True)
    keys = computed_once(state, 20, release=False)
    hit = state.match(keys)
    assert hit == Hit(20, state.slot_pool.find(keys[4]), 20)
    state.take_copies()
    assert state.grow("second", 27, hit, keys)
    state.check_integrity()
    for window, pool, blocks, others in zip(
        windows, state.block_pools, state.allocations["second"].blocks, state.allocations["first"].blocks, strict=True
    ):
        dead = {None: 0, 1: 5, 3: 4, 4: 4, 6: 3, 9: 3, -4: 5, -8: 4, -6: 4, -40: 0}[window]
        assert blocks[:dead] == [DUMMY] * dead
        assert blocks[dead:5] == others[dead:5] == [pool.find(key) for key in keys[dead:]]
        assert len(set(blocks[5:])) == 2 and not set(blocks[5:]) & {DUMMY, *others}
    slot = state.allocations["second"].slot
    assert slot not in (hit.snapshot, state.allocations["first"].slot)
    assert state.take_copies() == [(hit.snapshot, slot)]
    assert state.take_copies() == []
    state.release("first")
    state.release("second")
    assert all(pool.num_free == pool.capacity for pool in (*state.block_pools, state.slot_pool))


@pytest.mark.parametrize("lacking", ["full", "windowed", "slot", "growing"])
def test_where_blocks_or_slots_lack_nothing_changes(lacking):
    state = StateManager([group(), group(6)], [10, 10], 3, BLOCK, True)
    keys = computed_once(state, 12)
    if lacking == "slot":
        state.slot_pool.allocate(3)
    elif lacking == "growing":
        assert state.grow("second", 13, state.match(keys), keys)
        state.block_pools[1].allocate(state.block_pools[1].num_free - 1)
    else:
        # Two blocks short: what is left would do if those of the hit were not among it.
        state.block_pools[lacking == "windowed"].allocate(5)
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


def test_cached_blocks_of_the_hit_are_not_counted_as_room_for_new_ones():
    state = StateManager([group()], [5], 2, BLOCK)
    keys = computed_once(state, 12)
    (blocked,) = state.block_pools[0].allocate()
    hit = state.match(keys)
    assert hit.length == 12 and state.block_pools[0].num_free == 4
    before = bookkeeping(state)
    assert not state.grow("second", 17, hit, keys)  # two new ones, and one is left
    assert bookkeeping(state) == before
    assert state.grow("second", 16, hit, keys)
    assert state.block_pools[0].num_free == 0 and blocked not in state.allocations["second"].blocks[0]
    assert state.allocations["second"].blocks[0][:3] == [state.block_pools[0].find(key) for key in keys]


def test_a_hit_can_start_though_its_own_blocks_are_all_that_is_free():
    state = StateManager([group()], [3], 1, BLOCK)
    keys = computed_once(state, 12)
    assert state.block_pools[0].num_free == state.block_pools[0].num_cached == 3
    assert state.grow("second", 12, state.match(keys), keys)
    assert state.block_pools[0].num_free == 0
    assert state.block_pools[0].num_evictions == 0


@pytest.mark.parametrize("spare", [0, 1])
def test_the_last_slot_may_be_the_snapshot_itself(spare):
    state = StateManager([group()], [9], 1 + spare, BLOCK, True)
    keys = keys_of(range(8))
    for stop in (4, 8):
        assert state.grow("first", stop)
        state.computed("first", stop, keys[: stop // BLOCK])
        state.take_copies()
    state.release("first")
    if not spare:  # no room for a snapshot while the request ran: put one there
        (place,) = state.slot_pool.allocate()
        state.slot_pool.name(place, keys[1])
        state.slot_pool.free([place])
    hit = state.match(keys)
    assert hit.length == 8 and hit.snapshot is not None
    assert state.grow("second", 9, hit, keys)
    slot = state.allocations["second"].slot
    assert (slot == hit.snapshot) == (not spare)
    assert state.take_copies() == ([(hit.snapshot, slot)] if spare else [])
    assert (state.slot_pool.find(keys[1]) is None) == (not spare)
    state.check_integrity()


def test_the_snapshot_of_a_hit_is_the_last_to_go():
    state = StateManager([group()], [9], 4, BLOCK, True)
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
    state = StateManager([group()], [9], 3, BLOCK, True)
    keys = computed_once(state, 8)
    assert state.grow("again", 4)  # the first one's slot: two snapshots are left
    state.computed("again", 4, keys[:1])
    assert state.grow("other", 1)
    assert [state.slot_pool.find(key) is None for key in keys] == [False, True]


def test_the_end_of_a_prefix_goes_before_its_start():
    state = StateManager([group()], [6], 2, BLOCK)
    keys = computed_once(state, 24)
    for left in range(5, -1, -1):
        state.block_pools[0].allocate()
        assert state.match(keys).length == left * BLOCK


def test_without_slot_state_nothing_is_copied_and_no_slot_kept():
    state = StateManager([group()], [6], 3, BLOCK)
    keys = computed_once(state, 8)
    assert state.match(keys) == Hit(8, None, 8)
    assert state.slot_pool.num_cached == 0
    assert state.grow("second", 9, state.match(keys), keys)
    assert state.take_copies() == []


def test_after_a_reset_nothing_hits_and_who_runs_keeps_what_it_has():
    state = StateManager([group(), group(6)], [20, 20], 6, BLOCK, True)
    keys = computed_once(state, 12, release=False)
    held = repr(state.allocations)
    state.reset_prefix_cache()
    assert state.match(keys) == MISS
    assert repr(state.allocations) == held
    state.check_integrity()
    state.release("first")
    assert all(pool.num_cached == 0 for pool in (*state.block_pools, state.slot_pool))


def test_the_peak_of_a_group_is_its_reach_a_chunk_and_a_block_torn_at_both_ends():
    whole, window = PagedState(1, 8, torch.float32), PagedState(1, 8, torch.float32, window=6)
    state = StateManager([whole, window], [99, 99], num_slots=2, block_size=4)
    assert [state.peak_blocks(0, tokens, chunk=5) for tokens in (1, 4, 5, 100)] == [1, 1, 2, 25]
    assert [state.peak_blocks(1, tokens, chunk=5) for tokens in (1, 5, 16, 17, 100)] == [1, 2, 4, 4, 4]
    assert state.peak_blocks(1, 100, chunk=1) == 3 and state.peak_blocks(1, 100, chunk=8) == 5


class TestRollBack:
    """After a roll-back, nothing that the failed step named or planned can be found; what was there before can."""

    def manager(self):
        return StateManager([PagedState(1, 8, torch.float32)], [8], num_slots=6, block_size=BLOCK, has_slot_state=True)

    def test_keys_of_an_uncommitted_step_are_dropped(self):
        state, keys = self.manager(), chain(3)
        assert state.grow("a", 3 * BLOCK)
        state.computed("a", BLOCK, keys[:1])
        assert state.take_copies()
        state.copied()
        state.commit()
        state.computed("a", 2 * BLOCK, keys[:2])
        state.roll_back()
        state.check_integrity()
        state.check_at_rest()
        assert state.match(keys).length == BLOCK

    def test_keys_of_an_uncommitted_step_are_dropped_without_slot_state_too(self):
        state, keys = StateManager([PagedState(1, 8, torch.float32)], [8], num_slots=6, block_size=BLOCK), chain(3)
        assert state.grow("a", 3 * BLOCK)
        state.computed("a", BLOCK, keys[:1])
        state.commit()
        state.computed("a", 2 * BLOCK, keys[:2])
        assert state.match(keys).length == 2 * BLOCK
        state.roll_back()
        assert state.match(keys).length == BLOCK

    def test_a_snapshot_whose_copy_was_not_made_is_dropped_with_its_key(self):
        for taken in (False, True):
            state, keys = self.manager(), chain(1)
            assert state.grow("a", BLOCK)
            state.computed("a", BLOCK, keys)
            state.commit()  # the step is through; the copy belongs to the next one
            if taken:
                state.take_copies()  # and was interrupted
            state.roll_back()
            assert state.match(keys).length == 0 and state.slot_pool.num_cached == 0
            assert state.take_copies() == []

    def test_shared_blocks_stay_when_their_reader_is_rolled_back(self):
        state, keys = self.manager(), chain(2)
        assert state.grow("a", 2 * BLOCK)
        state.computed("a", 2 * BLOCK, keys)
        state.take_copies(), state.copied(), state.commit()
        state.release("a")
        assert state.grow("b", 3 * BLOCK, state.match(keys), keys)
        state.roll_back()
        assert state.match(keys).length == 2 * BLOCK

    def test_forgotten_keys_are_not_found_while_requests_hold_them(self):
        state, keys = self.manager(), chain(2)
        assert state.grow("a", 2 * BLOCK)
        state.computed("a", 2 * BLOCK, keys)
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
                    elif name in state.allocations:
                        tokens = min(len(keys), len(state.allocations[name].blocks[0])) * BLOCK
                        state.computed(name, tokens, keys[: tokens // BLOCK])
                    else:
                        state.grow(name, rng.randrange(1, 4) * BLOCK, state.match(keys[:2]), keys[:2])
                    if step % 3 == 0:
                        state.take_copies(), state.copied(), state.commit()
            state.roll_back()
            state.check_integrity()
            state.check_at_rest()


def chain(count):
    """Keys of `count` blocks in a row."""
    return chain_keys(root_key("test"), [index for index in range(count) for _ in range(BLOCK)], BLOCK)
