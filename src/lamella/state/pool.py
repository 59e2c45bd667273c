"""Pool of numbered entries (blocks or slots) with reference counts and LRU eviction. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Pool:
    """Allocate and free entries 1..capacity, and cache freed entries by key, like vLLM's block pool.

    An entry is a block of a KV cache group, or a slot. Entry 0 is the dummy: padding rows write to it, and it is never
    allocated. Every other entry is in one of three states:

    | state | reference count | has a key | leaves the state by |
    |---|---|---|---|
    | free | 0 | no | `allocate` |
    | referenced | 1 or more | maybe | `free` |
    | cached | 0 | yes | `add_reference`, or eviction in `allocate` |

    `allocate` takes free entries first. If there are none, it evicts the least recently used cached entry. A key
    identifies the content of an entry (see `state.prefix`); each key belongs to at most one entry.
    """

    def __init__(self, capacity: int) -> None:
        """Make a pool whose entries are all free.

        Args:
            capacity: number of entries, without the dummy; at least 1.
        """
        assert capacity >= 1
        self.capacity = capacity
        self.num_evictions = 0
        # A stack: low numbers are allocated first, and a freed entry is reused first, while it is still in CPU caches.
        self._free = list(range(capacity, 0, -1))
        self._references: Counter[int] = Counter()
        self._cached: dict[int, None] = {}  # in LRU order, the next one to evict first
        self._entries: dict[bytes, int] = {}  # key -> entry
        self._keys: dict[int, bytes] = {}  # entry -> key

    @property
    def num_free(self) -> int:
        """Number of entries that can be allocated: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Number of entries with a key and without references."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Number of entries with at least one reference."""
        return len(self._references)

    def allocate(self, count: int = 1) -> list[int]:
        """Allocate entries with one reference each; evict cached entries in LRU order if too few are free.

        Args:
            count: number of entries, at most `num_free`.

        Returns:
            The entries.
        """
        assert count <= self.num_free, f"{count} entries wanted, {self.num_free} free"
        entries = []
        for _ in range(count):
            if self._free:
                entries.append(self._free.pop())
            else:
                entries.append(next(iter(self._cached)))
                self._remove_key(entries[-1])
                self.num_evictions += 1
        self._references.update(entries)
        return entries

    def add_reference(self, entry: int) -> None:
        """Add a reference to a referenced or cached entry."""
        assert entry in self._references or entry in self._cached
        self._cached.pop(entry, None)
        self._references[entry] += 1

    def free(self, entries: Iterable[int]) -> None:
        """Remove one reference from each entry. At zero references, an entry with a key becomes cached, else free.

        Args:
            entries: in eviction order: the first one is evicted before the others.
        """
        for entry in entries:
            self._references[entry] -= 1
            assert self._references[entry] >= 0, f"entry {entry} has no reference"
            if self._references[entry] == 0:
                del self._references[entry]
                if entry in self._keys:
                    self._cached[entry] = None
                else:
                    self._free.append(entry)

    def set_key(self, entry: int, key: bytes) -> None:
        """Give a referenced entry a key, so that `find` returns it.

        If another entry already has the key: a referenced entry keeps it, and `entry` stays without a key. A cached
        entry loses it to `entry` and becomes free, since it would be evicted earlier.
        """
        assert entry in self._references and entry not in self._keys
        if self._entries.get(key) in self._cached:
            self.drop_key(key)
        if key not in self._entries:
            self._entries[key], self._keys[entry] = entry, key

    def find(self, key: bytes) -> int | None:
        """Return the entry with this key, or None."""
        return self._entries.get(key)

    def is_cached(self, entry: int) -> bool:
        """Return True if the entry has a key and no reference; `add_reference` then lowers `num_free` by one."""
        return entry in self._cached

    def touch(self, entry: int) -> None:
        """Mark a cached entry as most recently used. No effect on other entries."""
        if entry in self._cached:
            del self._cached[entry]
            self._cached[entry] = None

    def drop_key(self, key: bytes) -> None:
        """Remove a key from its entry, if there is one."""
        entry = self._entries.get(key)
        if entry is not None:
            self.drop_entry_key(entry)

    def drop_entry_key(self, entry: int) -> None:
        """Remove the key of an entry, if it has one. A cached entry becomes free."""
        if entry in self._keys:
            cached = entry in self._cached
            self._remove_key(entry)
            if cached:
                self._free.append(entry)

    def reset(self) -> None:
        """Remove all keys. Referenced entries stay referenced."""
        for key in list(self._entries):
            self.drop_key(key)

    def recover(self) -> None:
        """Drop all references and rebuild the pool from its keys alone.

        Repairs a change that an exception interrupted: only keys that both directions of the index agree on are kept,
        and every entry without a key becomes free.
        """
        keys = {entry: key for entry, key in self._keys.items() if self._entries.get(key) == entry}
        least_recent_first = [entry for entry in self._cached if entry in keys]
        self._keys, self._entries = keys, {key: entry for entry, key in keys.items()}
        self._cached = dict.fromkeys([*least_recent_first, *keys])
        self._free = [entry for entry in range(self.capacity, 0, -1) if entry not in keys]
        self._references = Counter()

    def check_at_rest(self) -> None:
        """Assert that no entry is referenced and none is lost."""
        assert not self._references, f"entries {sorted(self._references)[:8]} are referenced without a request"
        assert self.num_free == self.capacity, f"{self.capacity - self.num_free} entries are lost"

    def check_integrity(self, references: Counter[int]) -> None:
        """Assert that every entry is in exactly one state, and that the index is consistent.

        Args:
            references: expected reference count of each referenced entry.
        """
        free, cached, referenced = set(self._free), set(self._cached), set(self._references)
        assert len(free) == len(self._free)
        assert not (free & cached or free & referenced or cached & referenced)
        assert free | cached | referenced == set(range(1, self.capacity + 1))
        assert self._references == references and all(count > 0 for count in self._references.values())
        assert self._entries == {key: entry for entry, key in self._keys.items()}
        assert cached <= self._keys.keys() and not free & self._keys.keys()

    def _remove_key(self, entry: int) -> None:
        self._entries.pop(self._keys.pop(entry), None)
        self._cached.pop(entry, None)
