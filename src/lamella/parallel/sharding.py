"""How a tensor-parallel group divides a model: which places of each width a rank holds. Pure arithmetic.

Projections of one input are split by output (whole heads; gate and up each), projections back to the full width by
input, embedding and head by vocabulary. What comes before the split and after the sum is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lamella.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """What one rank holds of a dimension of `full` places: the `spans` [start, stop), one after the other."""

    full: int
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, full: int) -> Split:
        return cls(full, ((0, full),))

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.spans)

    def times(self, width: int) -> Split:
        """With `width` places for each: a split of heads becomes one of channels."""
        return Split(self.full * width, tuple((start * width, stop * width) for start, stop in self.spans))

    @staticmethod
    def join(parts: Iterable[Split]) -> Split:
        """Of widths that lie side by side: the rank's part of each, side by side."""
        full = 0
        spans: list[tuple[int, int]] = []
        for part in parts:
            for start, stop in part.spans:
                if spans and spans[-1][1] == full + start:
                    spans[-1] = (spans[-1][0], full + stop)
                else:
                    spans.append((full + start, full + stop))
            full += part.full
        return Split(full, tuple(spans))


@dataclass(frozen=True)
class Partition:
    """A rank of `size`, and what is its own."""

    rank: int = 0
    size: int = 1

    def even(self, full: int, field: str) -> Split:
        """An equal part of `full` places; `field` names them where they cannot be divided."""
        if full % self.size:
            raise ConfigError(f"{field}={full}: must be divisible by tensor_parallel_size={self.size}")
        part = full // self.size
        return Split(full, ((self.rank * part, (self.rank + 1) * part),))

    def whole_ones(self, full: int, field: str) -> Split:
        """Of `full` places as many as any other rank's, or one more: the first ranks have those that are left over."""
        if full < self.size:
            raise ConfigError(f"{field}={full}: must be at least tensor_parallel_size={self.size}")
        each, more = divmod(full, self.size)
        start = self.rank * each + min(self.rank, more)
        return Split(full, ((start, start + each + (self.rank < more)),))

    def heads(self, full: int) -> Split:
        """Query heads."""
        return self.even(full, "num_attention_heads")

    def kv_heads(self, full: int) -> Split:
        """Key/value heads: those of the rank's query heads, so that ranks hold the same ones where there are fewer."""
        if full % self.size and self.size % full:
            raise ConfigError(
                f"num_key_value_heads={full}: must divide tensor_parallel_size={self.size}, or be divisible by it"
            )
        first = self.rank * full // self.size
        return Split(full, ((first, first + max(1, full // self.size)),))

    def vocabulary(self, full: int) -> Split:
        """Tokens; the last rank may have fewer than the others."""
        part = self.vocabulary_part(full)
        if part * (self.size - 1) >= full:
            raise ConfigError(f"vocab_size={full}: too small for tensor_parallel_size={self.size}")
        return Split(full, ((self.rank * part, min(full, (self.rank + 1) * part)),))

    def vocabulary_part(self, full: int) -> int:
        """Tokens of every rank but the last."""
        return -(-full // self.size)


def shard_tensor(tensor: Any, splits: Sequence[Split], _index: tuple[slice, ...] = ()) -> Tensor:
    """A rank's part of a full tensor (or of a file's, which reads no more than it is asked for).

    `splits` are of the leading dimensions; the others are whole. A view where every dimension has one span.
    """
    dim = len(_index)
    if dim == len(splits):
        return tensor[_index]
    parts = [shard_tensor(tensor, splits, (*_index, slice(start, stop))) for start, stop in splits[dim].spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
