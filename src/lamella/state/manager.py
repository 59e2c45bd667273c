"""Which blocks and which slot each request holds, and what of them others can use. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lamella.state.pool import Pool
from lamella.state.prefix import MISS, Hit
from lamella.state.spec import PagedState

DUMMY = 0
_MOST_SEEN = 1 << 16  # keys of computed prefixes that are remembered without their state


@dataclass
class Allocation:
    """What one request holds: a slot, and for each block group the block of every `block_size` positions.

    Blocks that no later token can see have been given back; the dummy stands in their place.
    """

    slot: int
    blocks: list[list[int]]
    freed: list[int] = field(default_factory=list)  # per group, how many leading blocks were given back
    named: int = 0  # leading blocks that have their keys
    latest: bytes | None = None  # key of the snapshot that the next one of this request replaces
    room: int = 0  # tokens that the blocks have room for
    planned: list[tuple[int, bytes]] = field(default_factory=list)  # snapshots of the next step: slot and key


class StateManager:
    """Hands out blocks and slots to requests: one block pool per group, and one slot for all slot states together.

    `groups` are the distinct paged states of a model and `capacities` their blocks; a model without slot state still
    gives each request a slot, so that both kinds of model count requests alike.

    Full blocks get a key by their tokens and all before them, and are shared: a request that starts with known tokens
    references the blocks of another, which are never written again. Slot state changes with every token, so it is
    copied: into a spare slot (a *snapshot*) whenever a request stands at the end of a block, and back on a hit. The
    tensors behind both are in `StateMemory`, the slot copies are planned here and made by the runner.
    """

    def __init__(
        self,
        groups: Sequence[PagedState],
        capacities: Sequence[int],
        num_slots: int,
        block_size: int,
        has_slot_state: bool = False,
    ) -> None:
        """`num_slots` are those of requests and of snapshots; only with `has_slot_state` are there any of these."""
        self.groups, self.block_size, self.has_slot_state = tuple(groups), block_size, has_slot_state
        self.block_pools = [Pool(capacity) for capacity in capacities]
        self.slot_pool = Pool(num_slots)
        self.allocations: dict[Hashable, Allocation] = {}
        self._copies: list[tuple[int, int]] = []  # planned
        self._copying: list[tuple[int, int]] = []  # taken by `take_copies`, and not confirmed by `copied`
        self._uncommitted: list[tuple[Pool, bytes]] = []  # keys given since the last `commit`
        self._seen: dict[bytes, None] = {}  # keys of prefixes that were computed, without paged state to find them by
        pairs = enumerate(zip(self.groups, self.block_pools, strict=True))
        self._local = [(index, group, pool) for index, (group, pool) in pairs if group.reach is not None]

    def blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def peak_blocks(self, group: int, tokens: int, chunk: int) -> int:
        """The most blocks of a group that one request of `tokens` tokens, computed `chunk` at a time, ever holds."""
        reach = self.groups[group].reach
        if reach is None:
            return self.blocks_for(tokens)
        # A chunk sees what its first token can see; both ends may lie inside a block.
        return min(self.blocks_for(tokens), self.blocks_for(reach + chunk) + 1)

    def match(self, keys: Sequence[bytes]) -> Hit:
        """The longest prefix, of the blocks that have these keys, for which every kind of state is at hand."""
        # Blocks of full attention are needed from the first on; windows lose their first blocks.
        leading = [self._num_leading(pool, keys) for pool in self.block_pools]
        known = max(leading, default=0)
        if not self.groups:
            known = next((index for index, key in enumerate(keys) if key not in self._seen), len(keys))
        known *= self.block_size
        full = [length for group, length in zip(self.groups, leading, strict=True) if group.reach is None]
        keys = keys[: min(full, default=len(keys))]
        runs = [self._runs([pool.find(key) is not None for key in keys]) for _, _, pool in self._local]
        for count in range(len(keys), 0, -1):
            length = count * self.block_size
            needed = [count - group.first_visible(length) // self.block_size for _, group, _ in self._local]
            if any(run[count - 1] < blocks for run, blocks in zip(runs, needed, strict=True)):
                continue
            snapshot = self.slot_pool.find(keys[count - 1]) if self.has_slot_state else None
            if snapshot is not None or not self.has_slot_state:
                return Hit(length, snapshot, known)
        return Hit(known=known)

    @staticmethod
    def _num_leading(pool: Pool, keys: Sequence[bytes]) -> int:
        """Return how many of the first blocks are in the pool, without a gap."""
        return next((index for index, key in enumerate(keys) if pool.find(key) is None), len(keys))

    @staticmethod
    def _runs(present: Sequence[bool]) -> list[int]:
        """For each block, how many in a row up to it are present."""
        runs, run = [], 0
        for there in present:
            run = run + 1 if there else 0
            runs.append(run)
        return runs

    def grow(self, request: Hashable, tokens: int, hit: Hit = MISS, keys: Sequence[bytes] = ()) -> bool:
        """Give `request` a slot and blocks for its first `tokens` tokens; False, and no change, where they lack.

        A request that holds nothing yet may start with a `hit` that `match` has just found for `keys`.
        """
        allocation = self.allocations.get(request)
        if allocation is None:
            return self._start(request, tokens, hit, keys)
        if tokens <= allocation.room:
            return True
        assert not hit.length
        wanted = [self.blocks_for(tokens) - len(blocks) for blocks in allocation.blocks]
        if any(want > pool.num_free for want, pool in zip(wanted, self.block_pools, strict=True)):
            return False
        for blocks, want, pool in zip(allocation.blocks, wanted, self.block_pools, strict=True):
            if want > 0:
                blocks += pool.allocate(want)
        allocation.room = self.blocks_for(tokens) * self.block_size
        return True

    def _start(self, request: Hashable, tokens: int, hit: Hit, keys: Sequence[bytes]) -> bool:
        if self.slot_pool.num_free == 0:
            return False
        count = hit.length // self.block_size
        dead = [group.first_visible(hit.length) // self.block_size for group in self.groups]
        shared: list[list[int]] = []
        for pool, first in zip(self.block_pools, dead, strict=True):
            places = [pool.find(key) for key in keys[first:count]]
            assert None not in places, "a block of the hit has gone"
            shared.append([place for place in places if place is not None])
            new = self.blocks_for(tokens) - count
            if new + sum(pool.is_cached(place) for place in shared[-1]) > pool.num_free:
                return False
        blocks = []
        for pool, first, found in zip(self.block_pools, dead, shared, strict=True):
            for place in found:
                pool.add_reference(place)
            blocks.append([DUMMY] * first + found + pool.allocate(self.blocks_for(tokens) - count))
        if hit.snapshot is not None:
            self.slot_pool.touch(hit.snapshot)
        (slot,) = self.slot_pool.allocate()
        if hit.snapshot is not None and slot != hit.snapshot:
            self._copies.append((hit.snapshot, slot))  # else it was the last one left, and is where it is needed
        room = self.blocks_for(tokens) * self.block_size
        self.allocations[request] = Allocation(slot, blocks, dead, named=count, room=room)
        return True

    def computed(self, request: Hashable, tokens: int, keys: Sequence[bytes] = (), generated: bool = False) -> None:
        """The first `tokens` tokens of a request are in its state now.

        `keys`, of its full blocks, make these findable, and with them a snapshot of its slot at a block's end; without,
        nothing is. Of the snapshots in the generated part only the latest is kept (a preemption may leave one more).
        Blocks that a token at position `tokens`, the next one, can no longer see are given back.
        """
        allocation = self.allocations[request]
        if keys:
            full = tokens // self.block_size
            for pool, blocks, freed in zip(self.block_pools, allocation.blocks, allocation.freed, strict=True):
                for index in range(max(allocation.named, freed), full):
                    self._name(pool, blocks[index], keys[index])
            allocation.named = full
            for slot, key in allocation.planned:
                self._name(self.slot_pool, slot, key)
            self._release_planned(allocation)
            if not self.groups:
                self._remember(keys[:full])
            if self.has_slot_state and tokens % self.block_size == 0:
                self._snapshot(allocation, keys[full - 1], generated)
        for index, group, pool in self._local:
            dead, blocks = group.first_visible(tokens) // self.block_size, allocation.blocks[index]
            if dead > allocation.freed[index]:
                pool.free(blocks[allocation.freed[index] : dead])
                blocks[allocation.freed[index] : dead] = [DUMMY] * (dead - allocation.freed[index])
                allocation.freed[index] = dead

    def plan_snapshots(self, request: Hashable, keys: Sequence[bytes], reserve: int = 0) -> list[int | None]:
        """Reserve slots for snapshots that the next step takes in the middle of a request's chunk.

        `computed` makes them findable.

        Args:
            request: whose slot state is copied.
            keys: of the prefixes, the shortest first.
            reserve: slots that must be left for requests to come.

        Returns:
            A slot for each key; None if it is findable already, or if there are not enough, where the longest prefixes
            get theirs first.
        """
        new = []
        for index, key in enumerate(keys):
            known = self.slot_pool.find(key)
            if known is None:
                new.append(index)
            else:
                self.slot_pool.touch(known)
        slots: list[int | None] = [None] * len(keys)
        room = max(0, self.slot_pool.num_free - reserve)
        for index in new[max(0, len(new) - room) :]:
            (slot,) = self.slot_pool.allocate()
            self.allocations[request].planned.append((slot, keys[index]))
            slots[index] = slot
        return slots

    def _release_planned(self, allocation: Allocation) -> None:
        self.slot_pool.free([slot for slot, _ in allocation.planned])
        allocation.planned.clear()

    def _remember(self, keys: Sequence[bytes]) -> None:
        """Note that prefixes with these keys were computed, so that `match` finds where requests branch off."""
        self._seen.update(dict.fromkeys(keys))
        while len(self._seen) > _MOST_SEEN:
            del self._seen[next(iter(self._seen))]

    def _snapshot(self, allocation: Allocation, key: bytes, generated: bool) -> None:
        if generated and allocation.latest is not None:
            self.slot_pool.drop(allocation.latest)
            allocation.latest = None
        known = self.slot_pool.find(key)
        if known is not None:
            self.slot_pool.touch(known)
        elif self.slot_pool.num_free:
            (place,) = self.slot_pool.allocate()
            self._copies.append((allocation.slot, place))
            self._name(self.slot_pool, place, key)
            self.slot_pool.free([place])
            if generated:
                allocation.latest = key

    def take_copies(self) -> list[tuple[int, int]]:
        """(from, to) slots to be copied, one after the other, before the next step reads or writes any."""
        copies, self._copies = self._copies, []
        self._copying += copies
        return copies

    def copied(self) -> None:
        """Confirm that the copies given by `take_copies` have been made (on a GPU: launched)."""
        self._copying.clear()

    def commit(self) -> None:
        """Confirm that the steps reported to `computed` so far have run to their end: their keys are good."""
        self._uncommitted.clear()

    def roll_back(self) -> None:
        """Release every request, and forget what a failed step may have left wrong.

        These keys are dropped, so that nothing wrong can be found: those of blocks and snapshots since the last
        `commit`, and those of snapshots whose copy was planned but not confirmed. Blocks that requests shared stay
        findable, since nobody writes shared blocks. Safe to call after an exception at any point of any method, and
        to call again.
        """
        for pool, key in self._uncommitted:
            pool.drop(key)
        for _, target in (*self._copying, *self._copies):
            self.slot_pool.drop_place(target)
        self.allocations.clear()
        for pool in (*self.block_pools, self.slot_pool):
            pool.recover()
        self._copies, self._copying, self._uncommitted = [], [], []

    def forget(self, keys: Sequence[bytes]) -> None:
        """Make the blocks and snapshots with these keys impossible to find; requests that hold them keep them."""
        for pool in (*self.block_pools, self.slot_pool):
            for key in keys:
                pool.drop(key)

    def _name(self, pool: Pool, place: int, key: bytes) -> None:
        self._uncommitted.append((pool, key))  # first: an exception in between must not leave a key unlisted
        pool.name(place, key)

    def release(self, request: Hashable) -> None:
        """Give back all that `request` holds, if anything. What has a key stays findable, its last blocks shortest."""
        allocation = self.allocations.pop(request, None)
        if allocation is None:
            return
        self._release_planned(allocation)
        self.slot_pool.free([allocation.slot])
        for blocks, freed, pool in zip(allocation.blocks, allocation.freed, self.block_pools, strict=True):
            pool.free(reversed(blocks[freed:]))

    def reset_prefix_cache(self) -> None:
        """Nothing computed so far will be shared."""
        self._seen.clear()
        for pool in (*self.block_pools, self.slot_pool):
            pool.reset()

    def check_at_rest(self) -> None:
        """Without requests nothing is held. Takes no time that grows with the pools."""
        assert not self.allocations
        for pool in (*self.block_pools, self.slot_pool):
            pool.check_at_rest()

    def check_integrity(self) -> None:
        """No place is lost, or held by somebody who does not know of it."""
        for index, pool in enumerate(self.block_pools):
            held = Counter(block for h in self.allocations.values() for block in h.blocks[index][h.freed[index] :])
            assert DUMMY not in held
            pool.check_integrity(held)
        slots = Counter(allocation.slot for allocation in self.allocations.values())
        slots.update(slot for allocation in self.allocations.values() for slot, _ in allocation.planned)
        self.slot_pool.check_integrity(slots)
