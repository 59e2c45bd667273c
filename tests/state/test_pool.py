"""Pool allocation, reference counts, keys and eviction, compared with a naive model."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lamella.state.pool import Pool

pytestmark = pytest.mark.unit

KEYS = [bytes([index]) for index in range(12)]


class Naive:
    """Pool semantics, written with plain lists."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blank = set(range(1, capacity + 1))  # no reference, no key
        self.cached: list[int] = []  # no reference, with a key; least recently used first
        self.references: Counter[int] = Counter()
        self.key_of: dict[int, bytes] = {}
        self.evictions = 0

    def find(self, key: bytes) -> int | None:
        return next((entry for entry, known in self.key_of.items() if known == key), None)

    def allocated(self, entries: list[int]) -> None:
        assert len(set(entries)) == len(entries)
        for entry in entries:
            if self.blank:
                self.blank.remove(entry)
            else:
                assert entry == self.cached.pop(0), "not the least recently used entry"
                del self.key_of[entry]
                self.evictions += 1
            self.references[entry] = 1

    def add_reference(self, entry: int) -> None:
        if entry in self.cached:
            self.cached.remove(entry)
        self.references[entry] += 1

    def free(self, entries: list[int]) -> None:
        for entry in entries:
            self.references[entry] -= 1
            if not self.references[entry]:
                del self.references[entry]
                if entry in self.key_of:
                    self.cached.append(entry)
                else:
                    self.blank.add(entry)

    def set_key(self, entry: int, key: bytes) -> None:
        if self.find(key) in self.cached:
            self.drop_key(key)
        if self.find(key) is None:
            self.key_of[entry] = key

    def touch(self, entry: int) -> None:
        if entry in self.cached:
            self.cached.remove(entry)
            self.cached.append(entry)

    def drop_key(self, key: bytes) -> None:
        if (entry := self.find(key)) is not None:
            del self.key_of[entry]
            if entry in self.cached:
                self.cached.remove(entry)
                self.blank.add(entry)


def compare(pool: Pool, naive: Naive) -> None:
    pool.check_integrity(naive.references)
    assert pool.num_free + pool.num_referenced == pool.capacity
    assert (pool.num_referenced, pool.num_cached) == (len(naive.references), len(naive.cached))
    assert pool.num_free == len(naive.blank) + len(naive.cached)
    assert pool.num_evictions == naive.evictions
    assert [pool.find(key) for key in KEYS] == [naive.find(key) for key in KEYS]
    assert [entry for entry in range(pool.capacity + 1) if pool.is_cached(entry)] == sorted(naive.cached)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 9])
def test_random_operations_match_the_naive_model(capacity):
    rng = random.Random(capacity)
    pool, naive = Pool(capacity), Naive(capacity)
    done = Counter()
    for _ in range(3000):
        compare(pool, naive)
        referenced = sorted(naive.references)
        without_key = [entry for entry in referenced if entry not in naive.key_of]
        referenceable = sorted({*referenced, *naive.cached})
        operation = rng.choices(
            ["allocate", "share", "free", "name", "touch", "drop", "reset"], [30, 12, 35, 30, 10, 5, 1]
        )[0]
        key = rng.choice(KEYS)
        if operation == "allocate" and pool.num_free:
            entries = pool.allocate(count := rng.randint(0, pool.num_free))
            assert len(entries) == count
            naive.allocated(entries)
        elif operation == "share" and referenceable:
            pool.add_reference(entry := rng.choice(referenceable))
            naive.add_reference(entry)
        elif operation == "free" and referenced:
            entries = rng.sample(referenced, rng.randint(1, len(referenced)))
            pool.free(iter(entries))
            naive.free(entries)
        elif operation == "name" and without_key:
            pool.set_key(entry := rng.choice(without_key), key)
            naive.set_key(entry, key)
        elif operation == "touch":
            pool.touch(entry := rng.randint(1, capacity))
            naive.touch(entry)
        elif operation == "drop":
            pool.drop_key(key)
            naive.drop_key(key)
        elif operation == "reset":
            pool.reset()
            for known in KEYS:
                naive.drop_key(known)
        else:
            continue
        done[operation] += 1
    assert min(done.values()) > 10 and len(done) == 7
    assert pool.num_evictions > 30


def cached_pool(capacity: int) -> Pool:
    """Make a pool whose entries are all cached, entry n under KEYS[n]; entry 1 is the least recently used."""
    pool = Pool(capacity)
    for entry in pool.allocate(capacity):
        pool.set_key(entry, KEYS[entry])
    pool.free(range(1, capacity + 1))
    return pool


def test_least_recently_used_entry_is_evicted_first():
    pool = cached_pool(5)
    pool.touch(1)
    pool.add_reference(2)
    pool.free([2])
    assert pool.allocate(5) == [3, 4, 5, 1, 2]
    assert pool.num_evictions == 5
    assert all(pool.find(key) is None for key in KEYS)


def test_free_entries_are_allocated_before_cached_ones_are_evicted():
    pool = cached_pool(4)
    pool.drop_key(KEYS[3])
    assert pool.num_free == 4 and pool.num_cached == 3
    assert pool.allocate() == [3]
    assert pool.num_evictions == 0
    assert pool.allocate() == [1]


def test_referenced_entry_is_not_evicted_before_its_last_reference_is_freed():
    pool = cached_pool(3)
    pool.add_reference(1)
    pool.add_reference(1)
    assert pool.allocate(2) == [2, 3]
    assert pool.num_free == 0 and pool.find(KEYS[1]) == 1
    pool.touch(1)  # referenced: no effect
    pool.free([1])
    assert pool.num_free == 0 and not pool.is_cached(1)
    pool.free([1])
    assert pool.num_free == 1 and pool.is_cached(1)


def test_first_referenced_entry_keeps_a_key_and_the_second_gets_none():
    pool = Pool(3)
    first, second = pool.allocate(2)
    pool.set_key(first, b"same")
    pool.set_key(second, b"same")
    pool.free([first, second])
    assert pool.find(b"same") == first
    assert pool.num_cached == 1
    pool.check_integrity(Counter())
    pool.allocate(2)
    assert pool.num_evictions == 0 and pool.find(b"same") == first


def test_referenced_entry_takes_over_the_key_of_a_cached_one():
    pool = Pool(3)
    first, second = pool.allocate(2)
    pool.set_key(first, b"same")
    pool.free([first])
    pool.set_key(second, b"same")
    assert pool.find(b"same") == second
    assert (pool.num_cached, pool.num_free) == (0, 2)
    pool.check_integrity(Counter([second]))
    assert pool.allocate(2) and pool.num_evictions == 0


def test_referenced_entry_without_its_key_becomes_free():
    pool = Pool(2)
    first, second = pool.allocate(2)
    pool.set_key(first, b"a")
    pool.set_key(second, b"b")
    pool.drop_key(b"a")
    pool.drop_key(b"nothing")
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
        lambda pool: pool.set_key(2, b"not referenced"),
        lambda pool: pool.set_key(0, b"the dummy"),
        lambda pool: (pool.set_key(1, b"once"), pool.set_key(1, b"twice")),
        lambda pool: pool.add_reference(2),
        lambda pool: pool.add_reference(0),
        lambda pool: (pool.set_key(1, b"cached"), pool.free([1]), pool.set_key(1, b"again")),
        lambda pool: (pool.set_key(1, b"cached"), pool.free([1]), pool.free([1])),
        lambda pool: Pool(0),
    ],
)
def test_misuse_raises(misuse):
    pool = Pool(3)
    assert pool.allocate() == [1]
    with pytest.raises(AssertionError):
        misuse(pool)


@pytest.mark.parametrize("references", [[], [1], [1, 2, 2], [1, 2, 3]])
def test_check_integrity_finds_wrong_reference_counts(references):
    pool = Pool(3)
    pool.allocate(2)
    pool.check_integrity(Counter([1, 2]))
    with pytest.raises(AssertionError):
        pool.check_integrity(Counter(references))
