"""The seam for variants of the model: the state pools that requests run in, and switches between variants."""

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
        """Variant of the requests that ask for none."""
        ...

    @property
    def state(self) -> StateManager:
        """Bookkeeping of the current pools."""
        ...

    @property
    def next_state(self) -> StateManager:
        """Bookkeeping of the pools that a request which arrives now will run in."""
        ...

    @property
    def memory(self) -> StateMemory:
        """Tensors of the current pools."""
        ...

    @property
    def cost(self) -> StateCost:
        """Bytes of the state that is kept."""
        ...

    def resolve(self, params: SamplingParams) -> Variant:
        """Return the variant that a request would run if it were queued now.

        Raises:
            ParameterError: the engine does not serve it.
        """
        ...

    def assign(self, job: Job, variant: Variant) -> None:
        """Give the requests of a job their variant and the root of their prefix keys."""
        ...

    @property
    def is_switching(self) -> bool:
        """True while a switch is pending."""
        ...

    @property
    def can_switch(self) -> bool:
        """True if the pending switch can be made once no step is in flight."""
        ...

    @property
    def held(self) -> Collection[Job]:
        """Jobs that wait for the pending switch."""
        ...

    def hold(self, job: Job) -> bool:
        """Keep a job until the pending switch is made; False if none is pending."""
        ...

    def release(self, job: Job) -> bool:
        """Queue a held job at once; False if it is not held."""
        ...

    def check(self, target: Any) -> None:
        """Check that requests can run as `target`.

        Raises:
            ConfigError: it is no variant of the model, or its state does not fit.
        """
        ...

    def request_switch(self, target: Any, running: str) -> None:
        """Ask for a switch to `target`.

        Raises:
            ConfigError: the switch is impossible; nothing has changed.
        """
        ...

    def complete_switch(self) -> None:
        """Make the pending switch while nothing is in flight. After an interruption it can be made again."""
        ...

    def abandon_switch(self) -> None:
        """Have the next step go back to the variant before a switch that failed half-way."""
        ...

    def apply(self, variant: Variant) -> None:
        """Switch this rank's model and pools. Unless variants share the pools, no request may hold state."""
        ...

    def stats(self) -> dict[str, Any]:
        """Return figures for `LLM.stats`."""
        ...
