"""State pools of a placement: block pools and slots of the right kinds and sizes, and the memory behind them.

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

_KEPT = 4  # placements whose pools and graphs are kept, the current one included


@dataclass(eq=False)
class Pools:
    """State pools for the requests of a placement, or of all placements at once.

    Attributes:
        placement: of the requests; with `mixed_placements`, of those that ask for none of their own.
        state_modules: modules that keep the state.
        cost: bytes of the state of the layers that compute something.
        plan: sizes of the pools.
        state: which request holds what; empty unless these are the engine's current pools.
        memory: tensors of the state; None until the pools are first bound.
    """

    placement: Placement
    state_modules: list[PagedAttention | SlotStateModule]
    cost: StateCost
    plan: Capacity
    state: StateManager
    memory: StateMemory | None = None


class PoolSet:
    """Plans pools within one budget of bytes, and keeps the latest ones, which share one block of memory."""

    def __init__(
        self, model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device, budget: int
    ) -> None:
        self.model, self.options, self.max_model_len, self.device = model, options, max_model_len, device
        self.budget = budget
        self._kept: OrderedDict[Placement, Pools] = OrderedDict()
        self._block: torch.Tensor | None = None
        self._available = available_memory(device)  # before the block is allocated

    def find(self, placement: Placement) -> Pools:
        """Return the pools of a placement, new ones if none are kept. Changes nothing.

        With `mixed_placements` all placements share the pools, which are returned under this placement's name.

        Raises:
            ConfigError: the state of so many requests does not fit.
        """
        options, kept = self.options, self._kept.get(placement)
        if options.mixed_placements and self._kept:  # first: the shared pools have been renamed since they were kept
            return replace(next(iter(self._kept.values())), placement=placement)
        if kept is not None:
            return kept
        state_modules = (
            find_state_modules(self.model)
            if options.mixed_placements
            else find_active_state_modules(self.model, placement)
        )
        cost = StateCost.of(state_modules)
        plan = Capacity.plan(options, cost, self.max_model_len, self.budget)
        nbytes = StateMemory.size(state_modules, plan.blocks, options.block_size, plan.num_slots)
        if self._available is not None and nbytes > self._available:  # before the pools list their blocks
            raise ConfigError(
                f"num_blocks: the state takes {nbytes >> 20} MiB, and {self._available >> 20} MiB are free; give fewer "
                "num_blocks, or a smaller max_num_seqs, max_model_len or snapshot_bytes"
            )
        groups, blocks = list(plan.blocks), list(plan.blocks.values())
        state = StateManager(groups, blocks, plan.num_slots, options.block_size, bool(cost.slots))
        return Pools(placement, state_modules, cost, plan, state)

    def _largest(self) -> int:
        """Return the bytes that the pools of any placement can take.

        That is what all mixers take together if the number of blocks is given, else the budget.
        """
        if self.options.num_blocks is None:
            return self.budget
        state_modules = find_state_modules(self.model)
        plan = Capacity.plan(self.options, StateCost.of(state_modules), self.max_model_len, self.budget)
        return StateMemory.size(state_modules, plan.blocks, self.options.block_size, plan.num_slots)

    def bind(self, pools: Pools) -> list[Pools]:
        """Give the layers the memory of these pools. No request may hold state; cached prefixes are forgotten.

        Returns the pools that are no longer kept: no graph over their memory may be replayed.
        """
        options, dropped = self.options, []
        if pools.memory is None:
            arguments = (pools.state_modules, pools.plan.blocks, options.block_size, pools.plan.num_slots)
            nbytes = StateMemory.size(*arguments)
            if self.device.type == "cuda" and has_choice(self.model):
                nbytes = max(nbytes, self._largest())  # so that no later placement needs another block
            if self._block is None or self._block.numel() < nbytes:
                dropped = list(self._kept.values())
                self._kept.clear()
                for old in dropped:
                    old.memory = None
                self._block = None
                self._block = _allocate(nbytes, self.device)
            pools.memory = StateMemory(*arguments, self._block)
        else:
            pools.memory.bind()
            pools.state.reset_prefix_cache()
        self._kept[pools.placement] = pools
        self._kept.move_to_end(pools.placement)
        while len(self._kept) > _KEPT:
            dropped.append(self._kept.popitem(last=False)[1])
        return dropped


def _allocate(nbytes: int, device: torch.device) -> torch.Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:  # torch has several kinds
        raise ConfigError(
            f"num_blocks: the state takes {nbytes >> 20} MiB, which the {device.type} does not have; give fewer "
            "num_blocks, or a smaller max_num_seqs or max_model_len"
        ) from error
