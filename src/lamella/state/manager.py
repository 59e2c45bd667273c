"""Allocation of blocks and slots to requests, and the prefix cache. Pure bookkeeping, no tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from lamella.state.pool import Pool
from lamella.state.prefix import MISS, Hit
from lamella.state.spec import PagedState

DUMMY = 0
_MAX_SEEN_KEYS = 1 << 16


@dataclass
class Allocation:
    """Slot and blocks of one request.

    Attributes:
        slot: slot of all slot states.
        blocks: block table of each group: the block of every `block_size` positions. Blocks that later tokens cannot
            see are freed and replaced by the dummy.
        num_freed: number of leading blocks of each group that were freed.
        num_cached: number of leading blocks that have keys.
        latest_snapshot: key of the last snapshot of generated tokens; the next snapshot replaces it.
        token_capacity: number of tokens that the blocks can store.
        planned_snapshots: (slot, key) of snapshots that the next step takes.
    """

    slot: int
    blocks: list[list[int]]
    num_freed: list[int] = field(default_factory=list)
    num_cached: int = 0
    latest_snapshot: bytes | None = None
    token_capacity: int = 0
    planned_snapshots: list[tuple[int, bytes]] = field(default_factory=list)


class StateManager:
    """Allocates a slot and block tables to each request, and shares cached prefixes between requests.

    There is one block pool per group of layers with equal paged state, and one slot pool for all slot states together.
    A model without slot state still allocates a slot per request, so that all models count requests in the same way.

    Prefix cache:

    * A full block gets a key, a hash of its tokens and all tokens before. A request that starts with cached tokens adds
      references to these blocks. Shared blocks are never written again.
    * Slot state changes with every token, so it is copied. When a request reaches a block end, its slot is copied to a
      spare slot, a *snapshot*. On a hit the snapshot is copied to the slot of the new request.
    * A hit is the longest prefix for which every group has the blocks that the next token can see, and for which there
      is a snapshot if the model has slot state.

    Slot copies are planned here; the engine executes them on `StateMemory`.
    """

    def __init__(
        self,
        groups: Sequence[PagedState],
        capacities: Sequence[int],
        num_slots: int,
        block_size: int,
        has_slot_state: bool = False,
    ) -> None:
        """Make empty pools.

        Args:
            groups: distinct paged states of the model.
            capacities: number of blocks of each group, without the dummy.
            num_slots: number of slots for requests and snapshots, without the dummy.
            block_size: tokens per block.
            has_slot_state: False for a model without slot state, which takes no snapshots.
        """
        self.groups, self.block_size, self.has_slot_state = tuple(groups), block_size, has_slot_state
        self.block_pools = [Pool(capacity) for capacity in capacities]
        self.slot_pool = Pool(num_slots)
        self.allocations: dict[Hashable, Allocation] = {}
        self._copies: list[tuple[int, int]] = []  # planned
        self._copying: list[tuple[int, int]] = []  # returned by `pop_copies`, not yet confirmed by `confirm_copies`
        self._uncommitted: list[tuple[Pool, bytes]] = []  # keys that were set since the last `commit`
        # Keys of computed prefixes, the oldest first. Used only without paged state, where no block has them.
        self._seen: dict[bytes, None] = {}
        group_pools = enumerate(zip(self.groups, self.block_pools, strict=True))
        self._local = [(index, group, pool) for index, (group, pool) in group_pools if group.reach is not None]

    def num_blocks(self, tokens: int) -> int:
        """Return the number of blocks that store `tokens` tokens."""
        return -(-tokens // self.block_size)

    def peak_blocks(self, group: int, tokens: int, chunk: int) -> int:
        """Return the most blocks of a group that one request has allocated at any time.

        Args:
            group: index of the group.
            tokens: length of the request.
            chunk: tokens computed per step.
        """
        reach = self.groups[group].reach
        if reach is None:
            return self.num_blocks(tokens)
        # A chunk sees everything that its first token sees; both ends may lie inside a block.
        return min(self.num_blocks(tokens), self.num_blocks(reach + chunk) + 1)

    def match(self, keys: Sequence[bytes]) -> Hit:
        """Find the longest cached prefix.

        Args:
            keys: of the request's blocks, from the first block on.

        Returns:
            The hit; nothing is allocated.
        """
        # Blocks of full attention are needed from the first on; windows lose their first blocks.
        leading = [self._num_leading(pool, keys) for pool in self.block_pools]
        seen = max(leading, default=0)
        if not self.groups:
            seen = next((index for index, key in enumerate(keys) if key not in self._seen), len(keys))
        seen *= self.block_size
        full = [length for group, length in zip(self.groups, leading, strict=True) if group.reach is None]
        keys = keys[: min(full, default=len(keys))]
        runs = [self._run_lengths([pool.find(key) is not None for key in keys]) for _, _, pool in self._local]
        for count in range(len(keys), 0, -1):
            length = count * self.block_size
            needed = [count - group.first_visible(length) // self.block_size for _, group, _ in self._local]
            if any(run[count - 1] < blocks for run, blocks in zip(runs, needed, strict=True)):
                continue
            snapshot = self.slot_pool.find(keys[count - 1]) if self.has_slot_state else None
            if snapshot is not None or not self.has_slot_state:
                return Hit(length, snapshot, seen)
        return Hit(seen_length=seen)

    @staticmethod
    def _num_leading(pool: Pool, keys: Sequence[bytes]) -> int:
        """Return how many of the first blocks are in the pool, without a gap."""
        return next((index for index, key in enumerate(keys) if pool.find(key) is None), len(keys))

    @staticmethod
    def _run_lengths(present: Sequence[bool]) -> list[int]:
        """Return for each block the length of the run of present blocks that ends with it."""
        runs, run = [], 0
        for is_present in present:
            run = run + 1 if is_present else 0
            runs.append(run)
        return runs

    def allocate(self, request: Hashable, tokens: int, hit: Hit = MISS, keys: Sequence[bytes] = ()) -> bool:
        """Allocate blocks for the first `tokens` tokens of a request, and a slot if it has none.

        Args:
            request: the request.
            tokens: tokens that its blocks must be able to store.
            hit: cached prefix that a request without an allocation starts with, just returned by `match`.
            keys: that were given to `match`.

        Returns:
            False if the pools have too few free entries; nothing has changed then.
        """
        allocation = self.allocations.get(request)
        if allocation is None:
            return self._start(request, tokens, hit, keys)
        if tokens <= allocation.token_capacity:
            return True
        assert not hit.length
        wanted = [self.num_blocks(tokens) - len(blocks) for blocks in allocation.blocks]
        if any(want > pool.num_free for want, pool in zip(wanted, self.block_pools, strict=True)):
            return False
        for blocks, want, pool in zip(allocation.blocks, wanted, self.block_pools, strict=True):
            if want > 0:
                blocks += pool.allocate(want)
        allocation.token_capacity = self.num_blocks(tokens) * self.block_size
        return True

    def _start(self, request: Hashable, tokens: int, hit: Hit, keys: Sequence[bytes]) -> bool:
        """Make the first allocation of a request."""
        if self.slot_pool.num_free == 0:
            return False
        count = hit.length // self.block_size
        num_freed = [group.first_visible(hit.length) // self.block_size for group in self.groups]
        shared: list[list[int]] = []
        for pool, first in zip(self.block_pools, num_freed, strict=True):
            found = [pool.find(key) for key in keys[first:count]]
            assert None not in found, "a block of the hit was evicted"
            shared.append([block for block in found if block is not None])
            new = self.num_blocks(tokens) - count
            if new + sum(pool.is_cached(block) for block in shared[-1]) > pool.num_free:
                return False
        blocks = []
        for pool, first, reused in zip(self.block_pools, num_freed, shared, strict=True):
            for block in reused:
                pool.add_reference(block)
            blocks.append([DUMMY] * first + reused + pool.allocate(self.num_blocks(tokens) - count))
        if hit.snapshot is not None:
            self.slot_pool.touch(hit.snapshot)
        (slot,) = self.slot_pool.allocate()
        if hit.snapshot is not None and slot != hit.snapshot:
            self._copies.append((hit.snapshot, slot))  # no copy if the snapshot itself was evicted for this request
        token_capacity = self.num_blocks(tokens) * self.block_size
        self.allocations[request] = Allocation(slot, blocks, num_freed, num_cached=count, token_capacity=token_capacity)
        return True

    def mark_computed(
        self, request: Hashable, tokens: int, keys: Sequence[bytes] = (), generated: bool = False
    ) -> None:
        """Cache the full blocks of a request's computed tokens, and free blocks that the next token cannot see.

        Args:
            request: the request.
            tokens: number of tokens whose state is in the pools now.
            keys: of its full blocks. These blocks become findable, and so does a snapshot of the slot if `tokens` ends
                a block. Empty: nothing is cached.
            generated: True if the last of the tokens was generated. Only the latest snapshot of generated tokens is
                kept per request (a preemption may leave one more).
        """
        allocation = self.allocations[request]
        if keys:
            full = tokens // self.block_size
            for pool, blocks, num_freed in zip(self.block_pools, allocation.blocks, allocation.num_freed, strict=True):
                for index in range(max(allocation.num_cached, num_freed), full):
                    self._set_key(pool, blocks[index], keys[index])
            allocation.num_cached = full
            for slot, key in allocation.planned_snapshots:
                self._set_key(self.slot_pool, slot, key)
            self._free_planned(allocation)
            if not self.groups:
                self._remember(keys[:full])
            if self.has_slot_state and tokens % self.block_size == 0:
                self._snapshot(allocation, keys[full - 1], generated)
        for index, group, pool in self._local:
            expired, blocks = group.first_visible(tokens) // self.block_size, allocation.blocks[index]
            if expired > allocation.num_freed[index]:
                pool.free(blocks[allocation.num_freed[index] : expired])
                blocks[allocation.num_freed[index] : expired] = [DUMMY] * (expired - allocation.num_freed[index])
                allocation.num_freed[index] = expired

    def plan_snapshots(self, request: Hashable, keys: Sequence[bytes], reserve: int = 0) -> list[int | None]:
        """Allocate slots for snapshots that the next step takes inside a request's chunk.

        `mark_computed` makes them findable.

        Args:
            request: whose slot state is copied.
            keys: of the prefixes, the shortest first.
            reserve: number of slots that must stay free for new requests.

        Returns:
            A slot for each key. None if the prefix already has a snapshot, or if too few slots are free; the longest
            prefixes get slots first.
        """
        new = []
        for index, key in enumerate(keys):
            known = self.slot_pool.find(key)
            if known is None:
                new.append(index)
            else:
                self.slot_pool.touch(known)
        slots: list[int | None] = [None] * len(keys)
        available = max(0, self.slot_pool.num_free - reserve)
        for index in new[max(0, len(new) - available) :]:
            (slot,) = self.slot_pool.allocate()
            self.allocations[request].planned_snapshots.append((slot, keys[index]))
            slots[index] = slot
        return slots

    def _free_planned(self, allocation: Allocation) -> None:
        self.slot_pool.free([slot for slot, _ in allocation.planned_snapshots])
        allocation.planned_snapshots.clear()

    def _remember(self, keys: Sequence[bytes]) -> None:
        """Record that these prefixes were computed, so that `match` finds where requests branch off."""
        self._seen.update(dict.fromkeys(keys))
        while len(self._seen) > _MAX_SEEN_KEYS:
            del self._seen[next(iter(self._seen))]

    def _snapshot(self, allocation: Allocation, key: bytes, generated: bool) -> None:
        """Plan a copy of the request's slot to a spare slot, if there is one and the prefix has no snapshot yet."""
        if generated and allocation.latest_snapshot is not None:
            self.slot_pool.drop_key(allocation.latest_snapshot)
            allocation.latest_snapshot = None
        known = self.slot_pool.find(key)
        if known is not None:
            self.slot_pool.touch(known)
        elif self.slot_pool.num_free:
            (slot,) = self.slot_pool.allocate()
            self._copies.append((allocation.slot, slot))
            self._set_key(self.slot_pool, slot, key)
            self.slot_pool.free([slot])
            if generated:
                allocation.latest_snapshot = key

    def pop_copies(self) -> list[tuple[int, int]]:
        """Return the planned slot copies (from, to), to be executed in this order before the next step."""
        copies, self._copies = self._copies, []
        self._copying += copies
        return copies

    def confirm_copies(self) -> None:
        """Confirm that the copies returned by `pop_copies` were executed (on a GPU: launched)."""
        self._copying.clear()

    def commit(self) -> None:
        """Confirm that all steps reported to `mark_computed` have finished, so that their keys are valid."""
        self._uncommitted.clear()

    def roll_back(self) -> None:
        """Release every request, and drop the keys of state that a failed step may have left wrong.

        Dropped are the keys of blocks and snapshots since the last `commit`, and of snapshots whose copy was not
        confirmed. Shared blocks keep their keys, since shared blocks are never written. Safe to call after an exception
        at any point of any method, and to call again.
        """
        for pool, key in self._uncommitted:
            pool.drop_key(key)
        for _, target in (*self._copying, *self._copies):
            self.slot_pool.drop_entry_key(target)
        self.allocations.clear()
        for pool in (*self.block_pools, self.slot_pool):
            pool.recover()
        self._copies, self._copying, self._uncommitted = [], [], []

    def drop_keys(self, keys: Sequence[bytes]) -> None:
        """Remove these keys from the prefix cache. Allocations of running requests do not change."""
        for pool in (*self.block_pools, self.slot_pool):
            for key in keys:
                pool.drop_key(key)

    def _set_key(self, pool: Pool, entry: int, key: bytes) -> None:
        self._uncommitted.append((pool, key))  # first: an exception in between must not leave a key unlisted
        pool.set_key(entry, key)

    def release(self, request: Hashable) -> None:
        """Free the slot and blocks of a request, if it has any. Entries with keys stay cached.

        Blocks are freed from the last to the first, so that the longest prefixes are evicted first.
        """
        allocation = self.allocations.pop(request, None)
        if allocation is None:
            return
        self._free_planned(allocation)
        self.slot_pool.free([allocation.slot])
        for blocks, num_freed, pool in zip(allocation.blocks, allocation.num_freed, self.block_pools, strict=True):
            pool.free(reversed(blocks[num_freed:]))

    def reset_prefix_cache(self) -> None:
        """Drop all keys of the prefix cache. Allocations of running requests do not change."""
        self._seen.clear()
        for pool in (*self.block_pools, self.slot_pool):
            pool.reset()

    def check_at_rest(self) -> None:
        """Assert that nothing is allocated. Takes constant time."""
        assert not self.allocations
        for pool in (*self.block_pools, self.slot_pool):
            pool.check_at_rest()

    def check_integrity(self) -> None:
        """Assert that the reference counts of the pools match the allocations."""
        allocations = self.allocations.values()
        for index, pool in enumerate(self.block_pools):
            blocks = Counter(block for each in allocations for block in each.blocks[index][each.num_freed[index] :])
            assert DUMMY not in blocks
            pool.check_integrity(blocks)
        slots = Counter(allocation.slot for allocation in allocations)
        slots.update(slot for allocation in allocations for slot, _ in allocation.planned_snapshots)
        self.slot_pool.check_integrity(slots)
