"""The prefix cache's bookkeeping: keys, hits, pages and slots, against naive oracles and a fake memory."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.engine.request import Request
from lamella.engine.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduler
from lamella.state.manager import DUMMY, StateManager
from lamella.state.pool import Pool
from lamella.state.prefix import MISS, Hit, page_key, root_key
from lamella.state.spec import PagedState

PAGE = 4
ROOT = root_key("model", "cpu", None)
TOKEN_IDS = st.lists(st.integers(0, 1), max_size=14)


def group(window: int | None = None) -> PagedState:
    return PagedState(1, 8, torch.float32, window=window)


def sees(spec: PagedState, position: int, other: int) -> bool:
    """Whether a token at `position` sees the earlier one at `other`."""
    return spec.window is None or position - other < spec.window


def make_request(name: str, prompt: Sequence[int], output: int = 1, root: bytes | None = ROOT) -> Request:
    return Request(name, list(prompt), SamplingParams(temperature=0), max_tokens=output, prefix_root=root)


def keys_of(token_ids: Sequence[int], root: bytes = ROOT) -> list[bytes]:
    return make_request("", token_ids, root=root).page_keys(PAGE, len(token_ids))


def brute_force(state: StateManager, keys: Sequence[bytes]) -> Hit:
    """The longest prefix for which every page that its next token sees can be found, and a snapshot where needed."""
    for length in range(len(keys) * PAGE, 0, -PAGE):
        snapshot = state.slot_pool.find(keys[length // PAGE - 1]) if state.has_slot_state else None
        if (snapshot is not None or not state.has_slot_state) and all(
            pool.find(keys[position // PAGE]) is not None
            for spec, pool in zip(state.groups, state.page_pools, strict=True)
            for position in range(length)
            if sees(spec, length, position)
        ):
            return Hit(length, snapshot)
    return MISS


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
    parts = [(m, p, s) for m in ("a", "b", "ab", "") for p in ("cpu", "cuda:0", "") for s in (None, "", "None", "a", "b")]
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
            assert request.page_keys(PAGE, min(tokens, len(everything))) == whole[: min(tokens, len(everything)) // PAGE]


def test_a_request_without_a_root_has_no_keys():
    assert make_request("r", range(20), root=None).page_keys(PAGE, 20) == []


# Hits

WINDOWS = st.lists(st.sampled_from([None, 1, 2, 3, 4, 5, 8, 9, 13]), max_size=3)


@settings(max_examples=400, deadline=None, derandomize=True)
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
        assert state.match(keys[:length]) == (brute_force(state, keys[:length]) if windows or slots else Hit(length * PAGE))
        assert bookkeeping(state) == before


@pytest.mark.parametrize(
    ("window", "gone", "length"),
    [
        (None, [], 20),
        (None, [0], 0),
        (None, [3], 12),
        (1, [0, 1, 2, 3, 4], 20),  # a token that sees itself only needs no page
        (2, [0, 1, 2, 3], 20),
        (2, [4], 16),
        (3, [0, 1, 2, 3], 20),
        (4, [4], 16),
        (4, [0, 1, 2, 3], 20),
        (5, [0, 1, 2, 3], 20),  # itself and all of the page before
        (6, [0, 1, 2], 20),
        (6, [0, 1, 2, 3], 0),
        (6, [0, 2], 20),
        (6, [0, 3], 8 - 8),  # pages 1, 2 are there, for which page 1 and 2 are seen from 12
    ],
)
def test_what_a_window_needs_of_the_pages(window, gone, length):
    state = StateManager([group(window)], [5], 1, PAGE)
    keys, pool = keys_of(range(20)), state.page_pools[0]
    for place, key in zip(pool.allocate(5), keys, strict=True):
        pool.name(place, key)
    for index in gone:
        pool.drop(keys[index])
    if (window, gone) == (6, [0, 3]):
        length = 12
    assert state.match(keys).length == length
