"""Variant of the model that a request runs."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config import Placement


@dataclass(frozen=True)
class Variant:
    """Differences between the model that a request runs and the base model.

    Part of the root of prefix keys, so that requests of different variants share no state. The scheduler does not read
    it.

    Attributes:
        placement: mixer of each layer of a supernet; empty: the engine's placement.
    """

    placement: Placement = ()


PLAIN = Variant()
