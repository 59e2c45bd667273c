"""State pools of each placement: block and slot pools, planned for the placement's layers, and their memory.

A model without a choice of mixers has one placement, and so one set of pools.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from lamella.config import Placement
from lamella.engine.memory import Capacity, available_memory
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import PagedAttention, SlotStateModule, find_state_modules
from lamella.layers.supernet.placing import find_active_state_modules, has_choice
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory

_MAX_POOLS = 4  # placements whose pools and graphs are kept, the current one included


@dataclass(eq=False)
class Pools:
    """State pools of a placement, or of all placements with `mixed_placements`.

    Attributes:
        placement: of the requests; with `mixed_placements`, of requests without a placement of their own.
        state_modules: modules that the state tensors are bound to.
        cost: size of the state.
        plan: capacities of the pools.
        state: allocations; empty unless these are the current pools of the engine.
        memory: state tensors; None until the pools are bound for the first time.
    """

    placement: Placement
    state_modules: list[PagedAttention | SlotStateModule]
    cost: StateCost
    plan: Capacity
    state: StateManager
    memory: StateMemory | None = None


class PoolSet:
    """Plans pools under one memory budget, and keeps the latest ones. All share one memory buffer.

    Attributes:
        model: this rank's model.
        options: of the engine.
        max_model_len: in tokens.
        device: of the buffer.
        budget: bytes for state.
    """

    def __init__(
        self, model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device, budget: int
    ) -> None:
        self.model, self.options, self.max_model_len, self.device = model, options, max_model_len, device
        self.budget = budget
        self._kept: OrderedDict[Placement, Pools] = OrderedDict()
        self._buffer: torch.Tensor | None = None
        self._available = available_memory(device)  # bytes, before the buffer is allocated

    def find(self, placement: Placement) -> Pools:
        """Return the kept pools of a placement, or plan new ones. Nothing is allocated or bound.

        With `mixed_placements` all placements share the same pools; a copy with this placement's name is returned.

        Raises:
            ConfigError: the state of `max_num_seqs` requests does not fit into the memory.
        """
        options, kept = self.options, self._kept.get(placement)
        if options.mixed_placements and self._kept:  # first: the shared pools are stored under their first placement
            return replace(next(iter(self._kept.values())), placement=placement)
        if kept is not None:
            return kept
        state_modules = (
            find_state_modules(self.model)
            if options.mixed_placements
            else find_active_state_modules(self.model, placement)
        )
        cost = StateCost.from_modules(state_modules)
        plan = Capacity.plan(options, cost, self.max_model_len, self.budget)
        nbytes = StateMemory.size(state_modules, plan.blocks, options.block_size, plan.num_slots)
        if self._available is not None and nbytes > self._available:  # before a list of all blocks is made
            raise ConfigError(
                f"num_blocks: the state takes {nbytes >> 20} MiB, and {self._available >> 20} MiB are free; give fewer "
                "num_blocks, or a smaller max_num_seqs, max_model_len or snapshot_bytes"
            )
        groups, blocks = list(plan.blocks), list(plan.blocks.values())
        state = StateManager(groups, blocks, plan.num_slots, options.block_size, bool(cost.slots))
        return Pools(placement, state_modules, cost, plan, state)

    def _largest(self) -> int:
        """Return an upper bound of the bytes that the pools of any placement need.

        If the number of blocks is given, this is the size of the pools of all mixers together; else it is the budget.
        """
        if self.options.num_blocks is None:
            return self.budget
        state_modules = find_state_modules(self.model)
        plan = Capacity.plan(self.options, StateCost.from_modules(state_modules), self.max_model_len, self.budget)
        return StateMemory.size(state_modules, plan.blocks, self.options.block_size, plan.num_slots)

    def bind(self, pools: Pools) -> list[Pools]:
        """Bind the layers to the memory of these pools. No request may have state. Cached prefixes are dropped.

        Returns:
            Pools that are no longer kept. Graphs over their memory must be released.
        """
        options, dropped = self.options, []
        if pools.memory is None:
            arguments = (pools.state_modules, pools.plan.blocks, options.block_size, pools.plan.num_slots)
            nbytes = StateMemory.size(*arguments)
            if self.device.type == "cuda" and has_choice(self.model):
                nbytes = max(nbytes, self._largest())  # so that no later placement needs a larger buffer
            if self._buffer is None or self._buffer.numel() < nbytes:
                dropped = list(self._kept.values())
                self._kept.clear()
                for old in dropped:
                    old.memory = None
                self._buffer = None  # frees the old buffer before the new one is allocated
                self._buffer = _allocate(nbytes, self.device)
            pools.memory = StateMemory(*arguments, self._buffer)
        else:
            pools.memory.bind()
            pools.state.reset_prefix_cache()
        self._kept[pools.placement] = pools
        self._kept.move_to_end(pools.placement)
        while len(self._kept) > _MAX_POOLS:
            dropped.append(self._kept.popitem(last=False)[1])
        return dropped


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:  # torch raises different errors on CPU and GPU
        raise ConfigError(
            f"num_blocks: the state takes {nbytes >> 20} MiB, which the {device.type} does not have; give fewer "
            "num_blocks, or a smaller max_num_seqs or max_model_len"
        ) from error
