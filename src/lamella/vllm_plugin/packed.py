"""Projections of a checkpoint that one module of vLLM holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """A part of a tensor of the checkpoint, as a part of a packed projection.

    Attributes:
        name: of the part in vLLM's weight loader.
        start: first row in the tensor; None for the whole tensor.
        stop: last row + 1.
    """

    name: str | int
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class PackedProjections:
    """The projections of a checkpoint that one module of vLLM holds.

    Attributes:
        shards: by the name of a projection, the parts of its tensor.
        unbiased: projections without a bias, if others have one.
    """

    shards: Mapping[str, Sequence[Shard]]
    unbiased: tuple[str, ...] = ()
