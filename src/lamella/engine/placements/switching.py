"""Placements of a supernet as variants of the model, and switches of the engine's default placement."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lamella.config import Placement, PlacementLike, describe_placement, read_placement
from lamella.engine.memory import check_pools
from lamella.engine.options import EngineOptions
from lamella.engine.placements.pools import Pools, PoolSet
from lamella.engine.placements.step import PlacementStep
from lamella.engine.ranks.workers import Workers
from lamella.engine.requests.completion import Job
from lamella.engine.requests.jobs import Jobs
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.variant import PLAIN, Variant
from lamella.engine.scheduler import Scheduler
from lamella.engine.steps.runner import ModelRunner
from lamella.errors import ConfigError, ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.layers.supernet.placing import has_choice
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory
from lamella.state.prefix import root_key


@dataclass
class Switch:
    """Pending switch of the engine's placement.

    Attributes:
        pools: pools of the new placement.
        recompute: True if running requests are recomputed under the new placement; False if the switch waits for them.
        held: jobs that arrived after the switch was requested.
        begun: True once the switch has started. If it is still pending then, it was interrupted: no request has state,
            and the switch is completed before the next step.
    """

    pools: Pools
    recompute: bool
    held: list[Job]
    begun: bool = False


class Placements:
    """Implements `Variants` for the placements of a supernet: the current pools, and a pending switch."""

    def __init__(
        self,
        model: LanguageModel,
        options: EngineOptions,
        pools: PoolSet,
        current: Pools,
        step: PlacementStep,
        jobs: Jobs,
        scheduler: Scheduler,
        runner: ModelRunner,
        workers: Workers,
    ) -> None:
        """Connect the parts that a switch changes.

        Args:
            model: this rank's model.
            options: of the engine.
            pools: plans and keeps the pools of all placements.
            current: the bound pools, which the scheduler and the runner use.
            step: step feature that activates placements.
            jobs: unfinished jobs.
            scheduler: of the engine.
            runner: of the engine.
            workers: the other ranks.
        """
        self._model, self._options, self._step = model, options, step
        self._pool_set, self._pools = pools, current
        self._jobs, self._scheduler, self._runner, self._workers = jobs, scheduler, runner, workers
        self._switch: Switch | None = None
        self._before = current.placement  # placement before the pending switch, see `abandon_switch`
        self._variants: dict[Placement, Variant] = {}  # so that equal variants are one object

    @property
    def current(self) -> Variant:
        """See `Variants`."""
        return self._variant(self.placement)

    @property
    def placement(self) -> Placement:
        """Mixer of each layer for requests without a placement; None for a layer without a choice."""
        return self._pools.placement

    @property
    def state(self) -> StateManager:
        """See `Variants`."""
        return self._pools.state

    @property
    def next_state(self) -> StateManager:
        """See `Variants`."""
        return self._next.state

    @property
    def memory(self) -> StateMemory:
        """See `Variants`."""
        assert self._pools.memory is not None
        return self._pools.memory

    @property
    def cost(self) -> StateCost:
        """See `Variants`."""
        return self._pools.cost

    @property
    def _next(self) -> Pools:
        """Pools of requests that are added now."""
        return self._pools if self._switch is None else self._switch.pools

    def resolve(self, params: SamplingParams) -> Variant:
        """Return the variant with the request's own placement, or with the engine's next one.

        Raises:
            ParameterError: the placement is invalid, or the engine keeps no state for it.
        """
        usual = self._next.placement
        if params.placement is None:
            return self._variant(usual)
        try:
            own = read_placement(params.placement, self._model.config)
        except ConfigError as error:
            raise ParameterError(str(error)) from error
        if own != usual and not self._options.mixed_placements:
            raise ParameterError(
                f"placement={describe_placement(own)!r}: the engine keeps state for {describe_placement(usual)!r} "
                "only; LLM(mixed_placements=True) keeps it for every mixer"
            )
        return self._variant(own)

    def assign(self, job: Job, variant: Variant) -> None:
        """See `Variants`. Without `mixed_placements` requests get no placement, since a step has only one."""
        root = None
        if self._options.enable_prefix_caching:
            root = root_key(self._options.name, variant.placement, job.salt)
        for completion in job.completions:
            completion.request.set_variant(variant if self._options.mixed_placements else PLAIN, root)

    def _variant(self, placement: Placement) -> Variant:
        return self._variants.setdefault(placement, Variant(placement))

    @property
    def is_switching(self) -> bool:
        """See `Variants`."""
        return self._switch is not None

    @property
    def can_switch(self) -> bool:
        """See `Variants`."""
        if self._switch is None:
            return False
        switch = self._switch
        return switch.recompute or switch.begun or self._options.mixed_placements or not self._scheduler.has_work

    @property
    def held_jobs(self) -> Collection[Job]:
        """See `Variants`."""
        return () if self._switch is None else self._switch.held

    def hold(self, job: Job) -> bool:
        """See `Variants`."""
        if self._switch is None:
            return False
        self._switch.held.append(job)
        return True

    def release(self, job: Job) -> bool:
        """See `Variants`."""
        if self._switch is None or job not in self._switch.held:
            return False
        self._switch.held.remove(job)
        self._queue(job)
        return True

    def check(self, target: PlacementLike | None) -> None:
        """See `Variants`."""
        self._find(target)

    def _find(self, target: PlacementLike | None) -> Pools:
        return self._pool_set.find(read_placement(target, self._model.config))

    def request_switch(self, target: PlacementLike | None, running: str) -> None:
        """Request a switch to another default placement.

        If no request is running, the switch is made before the next step. With `mixed_placements` it never waits:
        running requests keep their placement.

        Args:
            target: the new placement, see `read_placement`.
            running: "finish": queued and running requests finish under the old placement, and later requests wait.
                "recompute": all are recomputed under the new placement, and keep their output tokens.

        Raises:
            ConfigError: the placement is invalid, its state does not fit, or a request that would run under it does not
                fit or has another placement of its own. Nothing has changed.
        """
        if running not in ("finish", "recompute"):
            raise ConfigError(f"running={running!r}: must be finish or recompute")
        pools = self._find(target)
        held, begun = ([], False) if self._switch is None else (self._switch.held, self._switch.begun)
        recompute = running == "recompute" or begun  # once begun, no request holds state
        waiting = [(job, completion) for job in held for completion in job.completions]
        for job, completion in self._jobs if recompute else waiting:
            request = completion.request
            try:
                check_pools(len(request.prompt_token_ids) + request.max_tokens - 1, pools.state, self._options)
            except ParameterError as error:
                raise ConfigError(f"placement: request {job.request_id} would not fit: {error}") from error
            own = request.params.placement
            if own is None or self._options.mixed_placements:
                continue
            if read_placement(own, self._model.config) != pools.placement:
                raise ConfigError(f"placement: request {job.request_id} asked for {own!r}, and has not finished yet")
        self._before = self._next.placement
        self._switch = Switch(pools, recompute, held, begun)

    def complete_switch(self) -> None:
        """See `Variants`."""
        switch = self._switch
        assert switch is not None
        if switch.recompute:
            self._scheduler.preempt_all()
        if switch.begun or switch.pools.placement != self.placement:
            switch.begun = True
            before, variant = self.state, self._variant(switch.pools.placement)
            self._workers.switch(variant)
            self.apply(variant)
            if self.state is not before:
                self._workers.set_state(self.state)
        # With `recompute` no request has state now: all are queued or held.
        held = [(job, completion) for job in switch.held for completion in job.completions]
        for job, completion in self._jobs if switch.recompute else held:
            if completion.request.params.placement is None:
                self.assign(job, self.current)
        while switch.held:
            self._queue(switch.held[0])
            del switch.held[0]
        self._switch = None

    def abandon_switch(self) -> None:
        """See `Variants`."""
        if self._switch is not None and self._switch.begun:
            self._switch = Switch(self._pool_set.find(self._before), True, self._switch.held, begun=True)

    def apply(self, variant: Variant) -> None:
        """See `Variants`."""
        pools = self._pool_set.find(variant.placement)
        self._step.use(variant.placement)
        if self._options.mixed_placements:
            self._pools.placement = variant.placement
        else:
            assert not self.state.allocations
            for dropped in self._pool_set.bind(pools):
                self._runner.release_state(dropped.state)
            self._pools = pools
            self._scheduler.state = pools.state
        self._runner.bind(self.state, graphs=not self._options.enforce_eager)

    def _queue(self, job: Job) -> None:
        for completion in job.completions:
            self._scheduler.add(completion.request)

    def stats(self) -> dict[str, Any]:
        """Return the name of the placement; None for a model without a choice of mixers."""
        return {"placement": describe_placement(self.placement) if has_choice(self._model) else None}
