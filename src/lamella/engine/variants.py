"""Seam for variants of the model: state pools of requests, and switches between variants."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from lamella.engine.requests.completion import Job
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.variant import Variant
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory


class Variants(Protocol):
    """Owns the state pools, and decides which variant of the model a request runs."""

    @property
    def current(self) -> Variant:
        """Default variant, which requests run that name none."""
        ...

    @property
    def state(self) -> StateManager:
        """Block and slot allocation of the current pools."""
        ...

    @property
    def next_state(self) -> StateManager:
        """Block and slot allocation of the pools of requests that are added now: a pending switch may change them."""
        ...

    @property
    def memory(self) -> StateMemory:
        """State tensors of the current pools."""
        ...

    @property
    def cost(self) -> StateCost:
        """Size of the state of the current pools."""
        ...

    def resolve(self, params: SamplingParams) -> Variant:
        """Return the variant that a request with these parameters runs if it is queued now.

        Raises:
            ParameterError: the engine does not serve this variant.
        """
        ...

    def assign(self, job: Job, variant: Variant) -> None:
        """Set the variant and the root of the prefix keys of a job's requests."""
        ...

    @property
    def is_switching(self) -> bool:
        """True while a switch is pending."""
        ...

    @property
    def can_switch(self) -> bool:
        """True if the pending switch can be made as soon as no step is in flight."""
        ...

    @property
    def held_jobs(self) -> Collection[Job]:
        """Jobs that wait for the pending switch."""
        ...

    def hold(self, job: Job) -> bool:
        """Hold a job until the pending switch is made; return False if none is pending."""
        ...

    def release(self, job: Job) -> bool:
        """Queue a held job at once; return False if it is not held."""
        ...

    def check(self, target: Any) -> None:
        """Check that requests can run as the variant `target`.

        Raises:
            ConfigError: `target` is not a variant of the model, or its state does not fit.
        """
        ...

    def request_switch(self, target: Any, running: str) -> None:
        """Request a switch of the default variant.

        Args:
            target: the new variant.
            running: "finish" to let running requests finish first, "recompute" to recompute them.

        Raises:
            ConfigError: the switch is impossible. Nothing has changed.
        """
        ...

    def complete_switch(self) -> None:
        """Make the pending switch. No step may be in flight. After an interruption the method can be called again."""
        ...

    def abandon_switch(self) -> None:
        """Switch back to the previous variant before the next step, after a switch that failed half-way."""
        ...

    def apply(self, variant: Variant) -> None:
        """Switch the model and the pools of this rank. Unless variants share the pools, no request may have state."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return entries of `LLM.stats`."""
        ...
