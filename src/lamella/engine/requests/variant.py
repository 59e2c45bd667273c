"""The variant of the model that a request runs: what the engine keeps apart besides tokens."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config import Placement


@dataclass(frozen=True)
class Variant:
    """A request's changes to the model. It keys the prefix cache; the scheduler never looks into it.

    Attributes:
        placement: mixer of each layer of a supernet; empty for the engine's placement.
    """

    placement: Placement = ()


PLAIN = Variant()
