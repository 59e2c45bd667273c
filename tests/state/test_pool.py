"""The allocator of numbered places against a naive model of it."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lamella.state.pool import Pool

pytestmark = pytest.mark.unit

KEYS = [bytes([index]) for index in range(12)]


class Naive:
    """What the docstrings of `Pool` say, in lists."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blank = set(range(1, capacity + 1))  # nobody's, nothing to be found
        self.cached: list[int] = []  # nobody's, to be found; longest first
        self.held: Counter[int] = Counter()
        self.key_of: dict[int, bytes] = {}
        self.evictions = 0

    def find(self, key: bytes) -> int | None:
        return next((place for place, known in self.key_of.items() if known == key), None)

    def allocated(self, places: list[int]) -> None:
        assert len(set(places)) == len(places)
        for place in places:
            if self.blank:
                self.blank.remove(place)
            else:
                assert place == self.cached.pop(0), "not the one that has been nobody's for longest"
                del self.key_of[place]
                self.evictions += 1
            self.held[place] = 1

    def add_reference(self, place: int) -> None:
        if place in self.cached:
            self.cached.remove(place)
        self.held[place] += 1

    def free(self, places: list[int]) -> None:
        for place in places:
            self.held[place] -= 1
            if not self.held[place]:
                del self.held[place]
                if place in self.key_of:
                    self.cached.append(place)
                else:
                    self.blank.add(place)

    def name(self, place: int, key: bytes) -> None:
        if self.find(key) in self.cached:
            self.drop(key)
        if self.find(key) is None:
            self.key_of[place] = key

    def touch(self, place: int) -> None:
        if place in self.cached:
            self.cached.remove(place)
            self.cached.append(place)

    def drop(self, key: bytes) -> None:
        if (place := self.find(key)) is not None:
            del self.key_of[place]
            if place in self.cached:
                self.cached.remove(place)
                self.blank.add(place)


def compare(pool: Pool, naive: Naive) -> None:
    pool.check_integrity(naive.held)
    assert pool.num_free + pool.num_held == pool.capacity
    assert (pool.num_held, pool.num_cached) == (len(naive.held), len(naive.cached))
    assert pool.num_free == len(naive.blank) + len(naive.cached)
    assert pool.num_evictions == naive.evictions
    assert [pool.find(key) for key in KEYS] == [naive.find(key) for key in KEYS]
    assert [place for place in range(pool.capacity + 1) if pool.is_cached(place)] == sorted(naive.cached)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 9])
def test_every_operation_does_what_the_naive_model_does(capacity):
    rng = random.Random(capacity)
    pool, naive = Pool(capacity), Naive(capacity)
    done = Counter()
    for _ in range(3000):
        compare(pool, naive)
        held = sorted(naive.held)
        nameable = [place for place in held if place not in naive.key_of]
        sharable = sorted({*held, *naive.cached})
        operation = rng.choices(
            ["allocate", "share", "free", "name", "touch", "drop", "reset"], [30, 12, 35, 30, 10, 5, 1]
        )[0]
        key = rng.choice(KEYS)
        if operation == "allocate" and pool.num_free:
            places = pool.allocate(count := rng.randint(0, pool.num_free))
            assert len(places) == count
            naive.allocated(places)
        elif operation == "share" and sharable:
            pool.add_reference(place := rng.choice(sharable))
            naive.add_reference(place)
        elif operation == "free" and held:
            places = rng.sample(held, rng.randint(1, len(held)))
            pool.free(iter(places))
            naive.free(places)
        elif operation == "name" and nameable:
            pool.name(place := rng.choice(nameable), key)
            naive.name(place, key)
        elif operation == "touch":
            pool.touch(place := rng.randint(1, capacity))
            naive.touch(place)
        elif operation == "drop":
            pool.drop(key)
            naive.drop(key)
        elif operation == "reset":
            pool.reset()
            for known in KEYS:
                naive.drop(known)
        else:
            continue
        done[operation] += 1
    assert min(done.values()) > 10 and len(done) == 7
    assert pool.num_evictions > 30


def cached_pool(capacity: int) -> Pool:
    """All places findable, place n by KEYS[n], and n - 1 longer nobody's than n."""
    pool = Pool(capacity)
    for place in pool.allocate(capacity):
        pool.name(place, KEYS[place])
    pool.free(range(1, capacity + 1))
    return pool


def test_the_place_that_is_longest_nobodys_goes_first():
    pool = cached_pool(5)
    pool.touch(1)
    pool.add_reference(2)
    pool.free([2])
    assert pool.allocate(5) == [3, 4, 5, 1, 2]
    assert pool.num_evictions == 5
    assert all(pool.find(key) is None for key in KEYS)


def test_a_place_without_content_is_used_before_any_goes():
    pool = cached_pool(4)
    pool.drop(KEYS[3])
    assert pool.num_free == 4 and pool.num_cached == 3
    assert pool.allocate() == [3]
    assert pool.num_evictions == 0
    assert pool.allocate() == [1]


def test_a_held_place_never_goes_and_is_held_until_the_last_holder_gives_it_back():
    pool = cached_pool(3)
    pool.add_reference(1)
    pool.add_reference(1)
    assert pool.allocate(2) == [2, 3]
    assert pool.num_free == 0 and pool.find(KEYS[1]) == 1
    pool.touch(1)  # held: nothing to do
    pool.free([1])
    assert pool.num_free == 0 and not pool.is_cached(1)
    pool.free([1])
    assert pool.num_free == 1 and pool.is_cached(1)


def test_of_equal_contents_the_first_held_place_stays_and_the_other_is_blank_once_freed():
    pool = Pool(3)
    first, second = pool.allocate(2)
    pool.name(first, b"same")
    pool.name(second, b"same")
    pool.free([first, second])
    assert pool.find(b"same") == first
    assert pool.num_cached == 1
    pool.check_integrity(Counter())
    pool.allocate(2)
    assert pool.num_evictions == 0 and pool.find(b"same") == first


def test_a_held_place_takes_over_the_key_of_one_that_is_nobodys():
    pool = Pool(3)
    first, second = pool.allocate(2)
    pool.name(first, b"same")
    pool.free([first])
    pool.name(second, b"same")
    assert pool.find(b"same") == second
    assert (pool.num_cached, pool.num_free) == (0, 2)
    pool.check_integrity(Counter([second]))
    assert pool.allocate(2) and pool.num_evictions == 0


def test_what_is_dropped_or_reset_while_held_is_blank_once_freed():
    pool = Pool(2)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"b")
    pool.drop(b"a")
    pool.drop(b"nothing")
    assert pool.find(b"a") is None and pool.find(b"b") == second
    pool.reset()
    assert pool.find(b"b") is None
    pool.check_integrity(Counter([first, second]))
    pool.free([first, second])
    assert (pool.num_cached, pool.num_free) == (0, 2)


@pytest.mark.parametrize(
    "misuse",
    [
        lambda pool: pool.allocate(3),
        lambda pool: pool.free([1, 1]),
        lambda pool: pool.free([2]),
        lambda pool: pool.free([0]),
        lambda pool: pool.name(2, b"nobody's"),
        lambda pool: pool.name(0, b"the dummy"),
        lambda pool: (pool.name(1, b"once"), pool.name(1, b"twice")),
        lambda pool: pool.add_reference(2),
        lambda pool: pool.add_reference(0),
        lambda pool: (pool.name(1, b"cached"), pool.free([1]), pool.name(1, b"again")),
        lambda pool: (pool.name(1, b"cached"), pool.free([1]), pool.free([1])),
        lambda pool: Pool(0),
    ],
)
def test_misuse_is_refused(misuse):
    pool = Pool(3)
    assert pool.allocate() == [1]
    with pytest.raises(AssertionError):
        misuse(pool)


@pytest.mark.parametrize("held", [[], [1], [1, 2, 2], [1, 2, 3]])
def test_holders_that_do_not_know_what_they_hold_are_found(held):
    pool = Pool(3)
    pool.allocate(2)
    pool.check_integrity(Counter([1, 2]))
    with pytest.raises(AssertionError):
        pool.check_integrity(Counter(held))
