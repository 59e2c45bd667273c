"""An allocator of numbered places: pages or slots. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Iterable


class Pool:
    """The places 1..capacity; place 0 is the dummy that padding rows may write to, and is never given away."""

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self.capacity = capacity
        # Taken from the end: low places first, and a freed place is the next one used, while it is still in a cache.
        self._free = list(range(capacity, 0, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int = 1) -> list[int]:
        """`count` free places; there must be as many."""
        assert count <= len(self._free), f"{count} places wanted, {len(self._free)} free"
        places = [self._free.pop() for _ in range(count)]
        self._taken.update(places)
        return places

    def free(self, places: Iterable[int]) -> None:
        """Give places back, each of which must be taken."""
        for place in places:
            self._taken.remove(place)
            self._free.append(place)

    def check_integrity(self) -> None:
        """Every place is either free or taken, once."""
        assert len(self._free) == len(set(self._free)) and not self._taken.intersection(self._free)
        assert len(self._free) + len(self._taken) == self.capacity
