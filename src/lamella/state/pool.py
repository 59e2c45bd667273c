"""An allocator of numbered places, blocks or slots, that remembers what is in them. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Pool:
    """The places 1..capacity; place 0 is the dummy that padding rows may write to, and is never given away.

    A place is *held* by one or more holders, or nobody's. One that nobody holds any more keeps its content, and can be
    found by the key it was given, until the room is needed: then the one that has been nobody's for longest goes first.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self.capacity = capacity
        self.num_evictions = 0
        # Taken from the end: low places first, and a freed place is the next one used, while it is still in a cache.
        self._free = list(range(capacity, 0, -1))
        self._state_modules: Counter[int] = Counter()
        self._cached: dict[int, None] = {}  # nobody's, but with a key; longest first
        self._places: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Places that can be allocated, those that are findable included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Places that nobody holds and that can be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return len(self._state_modules)

    def allocate(self, count: int = 1) -> list[int]:
        """`count` places for one state_module; there must be as many."""
        assert count <= self.num_free, f"{count} places wanted, {self.num_free} free"
        places = []
        for _ in range(count):
            if self._free:
                places.append(self._free.pop())
            else:
                places.append(next(iter(self._cached)))
                self._forget(places[-1])
                self.num_evictions += 1
        self._state_modules.update(places)
        return places

    def add_reference(self, place: int) -> None:
        """One more state_module of a place that is held or findable."""
        assert place in self._state_modules or place in self._cached
        self._cached.pop(place, None)
        self._state_modules[place] += 1

    def free(self, places: Iterable[int]) -> None:
        """A state_module gives places back; of several, the first will be the first to go."""
        for place in places:
            self._state_modules[place] -= 1
            assert self._state_modules[place] >= 0, f"place {place} is nobody's"
            if self._state_modules[place] == 0:
                del self._state_modules[place]
                if place in self._keys:
                    self._cached[place] = None
                else:
                    self._free.append(place)

    def name(self, place: int, key: bytes) -> None:
        """Make a held place findable. Where another held place has the same content, that one stays; one that nobody
        holds would be the first to go, and gives up its key.
        """
        assert place in self._state_modules and place not in self._keys
        if self._places.get(key) in self._cached:
            self.drop(key)
        if key not in self._places:
            self._places[key], self._keys[place] = place, key

    def find(self, key: bytes) -> int | None:
        """The place with this content."""
        return self._places.get(key)

    def is_cached(self, place: int) -> bool:
        """Whether it is findable and nobody's, so that sharing it takes away from `num_free`."""
        return place in self._cached

    def touch(self, place: int) -> None:
        """It was used: of those that are nobody's it is now the last to go."""
        if place in self._cached:
            del self._cached[place]
            self._cached[place] = None

    def drop(self, key: bytes) -> None:
        """Its place, if any, can no longer be found."""
        place = self._places.get(key)
        if place is not None:
            self.drop_place(place)

    def drop_place(self, place: int) -> None:
        """The place can no longer be found, whatever its key, if it has one."""
        if place in self._keys:
            cached = place in self._cached
            self._forget(place)
            if cached:
                self._free.append(place)

    def reset(self) -> None:
        """Nothing can be found any more; state_modules keep what they hold."""
        for key in list(self._places):
            self.drop(key)

    def recover(self) -> None:
        """Rebuild the pool without any reference, from the keys alone.

        Also repairs a change that an exception has interrupted: a key counts only if both directions of the index have
        it, and every other place becomes free.
        """
        keys = {place: key for place, key in self._keys.items() if self._places.get(key) == place}
        oldest_first = [place for place in self._cached if place in keys]
        self._keys, self._places = keys, {key: place for place, key in keys.items()}
        self._cached = dict.fromkeys([*oldest_first, *keys])
        self._free = [place for place in range(self.capacity, 0, -1) if place not in keys]
        self._state_modules = Counter()

    def check_at_rest(self) -> None:
        """Nobody holds a place, and none is lost."""
        assert not self._state_modules, f"places {sorted(self._state_modules)[:8]} are held by nobody who is there"
        assert self.num_free == self.capacity, f"{self.capacity - self.num_free} places are lost"

    def check_integrity(self, held: Counter[int]) -> None:
        """Every place is free, findable or held, once; and `held`, all state_modules' places, are those held here."""
        free, cached, state_modules = set(self._free), set(self._cached), set(self._state_modules)
        assert len(free) == len(self._free)
        assert not (free & cached or free & state_modules or cached & state_modules)
        assert free | cached | state_modules == set(range(1, self.capacity + 1))
        assert self._state_modules == held and all(count > 0 for count in self._state_modules.values())
        assert self._places == {key: place for place, key in self._keys.items()}
        assert cached <= self._keys.keys() and not free & self._keys.keys()

    def _forget(self, place: int) -> None:
        self._places.pop(self._keys.pop(place), None)
        self._cached.pop(place, None)
