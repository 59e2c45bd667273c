"""Which pages and which slot each request holds. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lamella.state.pool import Pool
from lamella.state.spec import PagedState

DUMMY = 0


@dataclass
class Holding:
    """What one request holds: a slot, and for each page group the page of every `page_size` positions.

    Pages that no later token can see have been given back; the dummy stands in their place.
    """

    slot: int
    pages: list[list[int]]
    freed: list[int] = field(default_factory=list)  # per group, how many leading pages were given back


class StateManager:
    """Hands out pages and slots to requests: one page pool per group, and one slot for all slot states together.

    `groups` are the distinct paged states of a model and `capacities` their pages; a model without slot state still
    gives each request a slot, so that both kinds of model count requests alike.
    """

    def __init__(self, groups: Sequence[PagedState], capacities: Sequence[int], num_slots: int, page_size: int) -> None:
        self.groups, self.page_size = tuple(groups), page_size
        self.page_pools = [Pool(capacity) for capacity in capacities]
        self.slot_pool = Pool(num_slots)
        self.holdings: dict[Hashable, Holding] = {}

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def peak_pages(self, group: int, tokens: int, chunk: int) -> int:
        """The most pages of a group that one request of `tokens` tokens, computed `chunk` at a time, ever holds."""
        window = self.groups[group].window
        if window is None:
            return self.pages_for(tokens)
        # A chunk sees the window before its first token; both ends may lie inside a page.
        return min(self.pages_for(tokens), self.pages_for(window + chunk) + 1)

    def grow(self, request: Hashable, tokens: int) -> bool:
        """Give `request` a slot and pages for its first `tokens` tokens; False, and no change, where they lack."""
        holding = self.holdings.get(request)
        if holding is None:
            if self.slot_pool.num_free == 0:
                return False
            held = [0] * len(self.groups)
        else:
            held = [len(pages) for pages in holding.pages]
        wanted = [self.pages_for(tokens) - have for have in held]
        if any(want > pool.num_free for want, pool in zip(wanted, self.page_pools, strict=True)):
            return False
        if holding is None:
            slot = self.slot_pool.allocate()[0]
            holding = self.holdings[request] = Holding(slot, [[] for _ in self.groups], [0] * len(self.groups))
        for pages, want, pool in zip(holding.pages, wanted, self.page_pools, strict=True):
            if want > 0:
                pages += pool.allocate(want)
        return True

    def trim(self, request: Hashable, computed: int) -> None:
        """Give back the pages that a token at position `computed`, the next one, can no longer see."""
        holding = self.holdings[request]
        for index, (group, pool) in enumerate(zip(self.groups, self.page_pools, strict=True)):
            dead, pages = group.first_visible(computed) // self.page_size, holding.pages[index]
            if dead > holding.freed[index]:
                pool.free(pages[holding.freed[index] : dead])
                pages[holding.freed[index] : dead] = [DUMMY] * (dead - holding.freed[index])
                holding.freed[index] = dead

    def release(self, request: Hashable) -> None:
        """Give back everything that `request` holds, if anything."""
        holding = self.holdings.pop(request, None)
        if holding is None:
            return
        self.slot_pool.free([holding.slot])
        for pages, freed, pool in zip(holding.pages, holding.freed, self.page_pools, strict=True):
            pool.free(pages[freed:])

    def check_integrity(self) -> None:
        """No place is lost or held twice."""
        for index, pool in enumerate(self.page_pools):
            pool.check_integrity()
            held = [p for h in self.holdings.values() for p in h.pages[index][h.freed[index] :]]
            assert len(held) == len(set(held)) == pool.capacity - pool.num_free and DUMMY not in held
        self.slot_pool.check_integrity()
        slots = [holding.slot for holding in self.holdings.values()]
        assert len(slots) == len(set(slots)) == self.slot_pool.capacity - self.slot_pool.num_free
