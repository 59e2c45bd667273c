"""Declarations of the two kinds of layer state: paged state (KV cache) and slot state (fixed size per request)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class PagedState:
    """KV cache of an attention layer: one row of keys and values per token, stored in blocks of fixed size.

    Attributes:
        kv_heads: number of key/value heads (of this rank).
        head_dim: channels per head.
        dtype: of keys and values.
        window: sliding window in tokens: a token sees itself and the `window - 1` tokens before it. None: no window.
        chunk: chunk size of chunked attention in tokens: a token sees positions from the last multiple of `chunk` up to
            its own. None: not chunked.
    """

    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window: int | None = None
    chunk: int | None = None

    @property
    def reach(self) -> int | None:
        """Largest number of tokens that a token can see, itself included; None if unlimited."""
        return self.chunk if self.window is None else self.window

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.dtype.itemsize

    def first_visible(self, position: int) -> int:
        """Return the oldest position that a token at `position` can see. Blocks before it can be freed."""
        if self.chunk is not None:
            return position // self.chunk * self.chunk
        return 0 if self.window is None else max(0, position - self.window + 1)

    def live_tokens(self, length: int) -> int:
        """Return how many of the first `length` tokens the next token can see."""
        return length - self.first_visible(length)


@dataclass(frozen=True)
class SlotState:
    """State of fixed size per request, such as a convolution window or a recurrent matrix.

    Attributes:
        shape: of one request's tensor.
        dtype: of the tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_request(self) -> int:
        """Bytes of one request in one layer."""
        return math.prod(self.shape) * self.dtype.itemsize


StateSpec = PagedState | SlotState


class StateModule(Protocol):
    """Module of a layer that keeps state: it declares `specs`, and the engine binds tensors to it."""

    @property
    def specs(self) -> Sequence[StateSpec]:
        """States that the module needs."""
        ...

    def bind(self, *tensors: torch.Tensor) -> None:
        """Set the tensors of the states, in the order of `specs`.

        Args:
            tensors: two per `PagedState`, keys and values, each (num_blocks, block_size, kv_heads, head_dim); one per
                `SlotState`, (num_slots, *shape).
        """
        ...
