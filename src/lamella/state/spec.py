"""The two kinds of state that a layer can declare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PagedState:
    """Keys and values that grow by one row per token, kept in fixed-size blocks.

    With a `window` of w, a token sees itself and the w - 1 tokens before it, so older blocks can be freed. With a
    `chunk` of c it sees no earlier position than the last multiple of c up to its own, so blocks of chunks before can.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> int | None:
        """The most tokens that a token can see, itself included; None where it sees all."""
        return self.chunk if self.window is None else self.window

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def first_visible(self, position: int) -> int:
        """The oldest position that a token at `position` can see."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def live_tokens(self, length: int) -> int:
        """How many of `length` tokens the next token can still see."""
        return length - self.first_visible(length)


@dataclass(frozen=True)
class SlotState:
    """A tensor of fixed `shape` for each request: a convolution's last inputs, a recurrent matrix."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_request(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


StateSpec = PagedState | SlotState


class StateModule(Protocol):
    """The part of a layer that keeps state: it declares what it needs, and is given tensors."""

    @property
    def specs(self) -> Sequence[StateSpec]: ...

    def bind(self, *tensors: torch.Tensor) -> None:
        """For paged state: keys and values, each (blocks, block_size, kv_heads, head_dim); for each slot state: (slots,
        *shape).
        """
        ...
