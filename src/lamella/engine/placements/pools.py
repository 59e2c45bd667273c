"""What an engine has for the requests of one placement: pools of the right kinds and sizes, and the memory behind them.

Models without a choice of mixers have one placement, and so one residence.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from lamella.config import Placement, PlacementLike, describe_placement, read_placement
from lamella.engine.capacity import Capacity, available_memory
from lamella.engine.options import EngineOptions
from lamella.engine.requests.completion import Job
from lamella.errors import ConfigError, ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.layers.holders import PagedAttention, SlotHolder, state_holders
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory

_KEPT = 4  # placements whose graphs are kept, the current one included


@dataclass(eq=False)
class Residence:
    """Pools for a placement, or for all of them at once.

    Attributes:
        placement: of the requests; with `mixed_placements`, of those that ask for none of their own.
        cost: of the state of the layers that compute something.
        state: who holds what; empty of requests while another residence is the engine's.
        memory: None until the engine has moved in.
    """

    placement: Placement
    holders: list[PagedAttention | SlotHolder]
    cost: StateCost
    plan: Capacity
    state: StateManager
    memory: StateMemory | None = None


@dataclass
class Switch:
    """A change of placement that waits for what is running.

    Attributes:
        held: the jobs that came after.
        begun: whether the change was started, and interrupted if it is still there: then no request holds state, and
            the change is completed before the next step.
    """

    residence: Residence
    recompute: bool
    held: list[Job]
    begun: bool = False


class Residences:
    """Plans residences within one budget of bytes and one block of memory, and keeps the latest, which share it."""

    def __init__(
        self, model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device, budget: int
    ) -> None:
        self.model, self.options, self.max_model_len, self.device = model, options, max_model_len, device
        self.budget = budget
        self._kept: OrderedDict[Placement, Residence] = OrderedDict()
        self._block: torch.Tensor | None = None
        self._available = available_memory(device)  # before the block
        self._own: dict[Placement, Placement] = {}  # of requests, so that equal ones are one object

    def find(self, placement: Placement) -> Residence:
        """The residence of a placement, a new one where none is kept; the one and only, under another name, where
        placements share it. Changes nothing.

        Raises `ConfigError` where the state of so many requests does not fit.
        """
        options, kept = self.options, self._kept.get(placement)
        if options.mixed_placements and self._kept:  # first: the one residence has been renamed since it was kept
            return replace(next(iter(self._kept.values())), placement=placement)
        if kept is not None:
            return kept
        holders = state_holders(self.model) if options.mixed_placements else self.model.active_holders(placement)
        cost = StateCost.of(holders)
        plan = Capacity.plan(options, cost, self.max_model_len, self.budget)
        nbytes = StateMemory.size(holders, plan.pages, options.block_size, plan.num_slots)
        if self._available is not None and nbytes > self._available:  # before the pools list their blocks
            raise ConfigError(
                f"num_blocks: the state takes {nbytes >> 20} MiB, and {self._available >> 20} MiB are free; give fewer "
                "num_blocks, or a smaller max_num_seqs, max_model_len or snapshot_bytes"
            )
        groups, pages = list(plan.pages), list(plan.pages.values())
        state = StateManager(groups, pages, plan.num_slots, options.block_size, bool(cost.slots))
        return Residence(placement, holders, cost, plan, state)

    def placement_of(self, asked: PlacementLike | None, usual: Placement) -> Placement:
        """A request's own placement, or the engine's `usual` one. Raises `ParameterError` where it is not served."""
        if asked is None:
            return usual
        try:
            own = read_placement(asked, self.model.config)
        except ConfigError as error:
            raise ParameterError(str(error)) from error
        if own != usual and not self.options.mixed_placements:
            raise ParameterError(
                f"placement={describe_placement(own)!r}: the engine keeps state for {describe_placement(usual)!r} "
                "only; LLM(mixed_placements=True) keeps it for every mixer"
            )
        return self._own.setdefault(own, own)

    def _most(self) -> int:
        """Bytes that any placement can need: where the number of pages is given, what all mixers need together; else
        all there are.
        """
        if self.options.num_blocks is None:
            return self.budget
        holders = state_holders(self.model)
        plan = Capacity.plan(self.options, StateCost.of(holders), self.max_model_len, self.budget)
        return StateMemory.size(holders, plan.pages, self.options.block_size, plan.num_slots)

    def move_in(self, residence: Residence) -> list[Residence]:
        """Give the layers the residence's memory; nobody may hold anything in another one. Nothing that was computed
        before can be found. Returns the residences that are kept no more, of whose memory no graph may be replayed.
        """
        options, dropped = self.options, []
        if residence.memory is None:
            arguments = (residence.holders, residence.plan.pages, options.block_size, residence.plan.num_slots)
            nbytes = StateMemory.size(*arguments)
            if self.device.type == "cuda" and self.model.has_choice:
                nbytes = max(nbytes, self._most())  # so that no later placement needs another block
            if self._block is None or self._block.numel() < nbytes:
                dropped = list(self._kept.values())
                self._kept.clear()
                for old in dropped:
                    old.memory = None
                self._block = None
                self._block = _allocate(nbytes, self.device)
            residence.memory = StateMemory(*arguments, self._block)
        else:
            residence.memory.bind()
            residence.state.reset_prefix_cache()
        self._kept[residence.placement] = residence
        self._kept.move_to_end(residence.placement)
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
