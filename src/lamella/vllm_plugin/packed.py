"""Checkpoint projections that are packed into one module of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rows of a checkpoint tensor that form one shard of a packed projection.

    Attributes:
        name: shard id for vLLM's weight loader.
        start: first row in the checkpoint tensor; None for the whole tensor.
        stop: row after the last one; None for the whole tensor.
    """

    name: str | int
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class PackedProjections:
    """Checkpoint projections of one packed module.

    Attributes:
        shards: shards by the name of the projection.
        unbiased: projections without a bias if others have one.
    """

    shards: Mapping[str, Sequence[Shard]]
    unbiased: tuple[str, ...] = ()
