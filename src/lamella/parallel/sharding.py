"""Sharding of a model over a tensor-parallel group: the indices of each dimension that a rank holds.

Projections from the residual stream are split by output (whole heads; gate and up separately), projections back to the
residual stream by input, and embedding and head by vocabulary. The residual stream is the same on every rank.
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
    """Indices of a dimension that one rank holds.

    Attributes:
        full: size of the dimension over all ranks.
        spans: ranges [start, stop) that the rank holds, concatenated in this order.
    """

    full: int
    spans: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, full: int) -> Split:
        """Return the split of a dimension that is not divided."""
        return cls(full, ((0, full),))

    @property
    def size(self) -> int:
        """Size of the dimension on this rank."""
        return sum(stop - start for start, stop in self.spans)

    def times(self, width: int) -> Split:
        """Return the split with `width` indices for each index, such as channels for heads."""
        return Split(self.full * width, tuple((start * width, stop * width) for start, stop in self.spans))

    @staticmethod
    def join(parts: Iterable[Split]) -> Split:
        """Return the split of concatenated dimensions: the rank's indices of each part, concatenated."""
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
    """Position of a rank in a group, and its shards of a model.

    Attributes:
        rank: index of this rank.
        size: number of ranks.
    """

    rank: int = 0
    size: int = 1

    def even(self, full: int, field: str) -> Split:
        """Return an equal shard of a dimension.

        Args:
            full: size of the dimension over all ranks.
            field: name of the dimension, for the error.

        Raises:
            ConfigError: the size is not divisible by the number of ranks.
        """
        if full % self.size:
            raise ConfigError(f"{field}={full}: must be divisible by tensor_parallel_size={self.size}")
        part = full // self.size
        return Split(full, ((self.rank * part, (self.rank + 1) * part),))

    def nearly_even(self, full: int, field: str) -> Split:
        """Return a nearly equal shard of a dimension: the first ranks hold one index more if there is a remainder.

        Args:
            full: size of the dimension over all ranks, such as the number of experts.
            field: name of the dimension, for the error.

        Raises:
            ConfigError: there are fewer indices than ranks.
        """
        if full < self.size:
            raise ConfigError(f"{field}={full}: must be at least tensor_parallel_size={self.size}")
        each, more = divmod(full, self.size)
        start = self.rank * each + min(self.rank, more)
        return Split(full, ((start, start + each + (self.rank < more)),))

    def heads(self, full: int) -> Split:
        """Return this rank's query heads.

        Raises:
            ConfigError: the number of heads is not divisible by the number of ranks.
        """
        return self.even(full, "num_attention_heads")

    def kv_heads(self, full: int) -> Split:
        """Return the key/value heads of this rank's query heads; several ranks hold the same head if there are fewer.

        Raises:
            ConfigError: neither the heads divide the ranks nor the ranks the heads.
        """
        if full % self.size and self.size % full:
            raise ConfigError(
                f"num_key_value_heads={full}: must divide tensor_parallel_size={self.size}, or be divisible by it"
            )
        first = self.rank * full // self.size
        return Split(full, ((first, first + max(1, full // self.size)),))

    def vocabulary(self, full: int) -> Split:
        """Return this rank's tokens of the vocabulary; the last rank may hold fewer than the others.

        Raises:
            ConfigError: the vocabulary is too small to give every rank a token.
        """
        part = self.vocabulary_shard_size(full)
        if part * (self.size - 1) >= full:
            raise ConfigError(f"vocab_size={full}: too small for tensor_parallel_size={self.size}")
        return Split(full, ((self.rank * part, min(full, (self.rank + 1) * part)),))

    def vocabulary_shard_size(self, full: int) -> int:
        """Return the number of tokens of every rank except the last."""
        return -(-full // self.size)


def shard_tensor(tensor: Any, splits: Sequence[Split], _index: tuple[slice, ...] = ()) -> Tensor:
    """Return a rank's shard of a full tensor.

    Args:
        tensor: a tensor, or a slice object of a safetensors file, of which only the shard is read.
        splits: splits of the leading dimensions; further dimensions are not divided.

    Returns:
        The shard; a view of `tensor` if every split has one span.
    """
    dim = len(_index)
    if dim == len(splits):
        return tensor[_index]
    parts = [shard_tensor(tensor, splits, (*_index, slice(start, stop))) for start, stop in splits[dim].spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
