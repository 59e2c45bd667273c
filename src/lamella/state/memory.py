"""The tensors behind pages and slots, and what a model's state costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from lamella.state.spec import PagedState, SlotState, StateHolder


@dataclass(frozen=True)
class StateCost:
    """The state of a model: how many layers have each kind, and bytes."""

    paged: Mapping[PagedState, int]
    slots: Mapping[SlotState, int]

    @classmethod
    def of(cls, holders: Sequence[StateHolder]) -> StateCost:
        specs = Counter(holder.spec for holder in holders)
        return cls(
            {spec: count for spec, count in specs.items() if isinstance(spec, PagedState)},
            {spec: count for spec, count in specs.items() if isinstance(spec, SlotState)},
        )

    @property
    def bytes_per_request(self) -> int:
        """Of the slots of one request."""
        return sum(spec.bytes_per_request * count for spec, count in self.slots.items())

    @property
    def bytes_per_token(self) -> int:
        """Of a token's pages while every layer can see it."""
        return sum(spec.bytes_per_token * count for spec, count in self.paged.items())

    def bytes_at(self, length: int) -> int:
        """Of one request with `length` tokens, those that windows still show counted only."""
        pages = sum(spec.bytes_per_token * spec.live_tokens(length) * count for spec, count in self.paged.items())
        return pages + self.bytes_per_request


class StateMemory:
    """Page and slot tensors, bound to the layers that hold them. Place 0 of each is the dummy; nothing is initialised.

    `capacities` gives the usable pages of each group.
    """

    def __init__(
        self,
        holders: Sequence[StateHolder],
        capacities: Mapping[PagedState, int],
        page_size: int,
        num_slots: int,
        device: torch.device,
    ) -> None:
        self.tensors: list[torch.Tensor] = []
        self._slots: list[torch.Tensor] = []
        for holder in holders:
            spec = holder.spec
            if isinstance(spec, PagedState):
                shape = (capacities[spec] + 1, page_size, spec.kv_heads, spec.head_dim)
                holder.bind(self._allocate(shape, spec.dtype, device), self._allocate(shape, spec.dtype, device))
            else:
                self._slots.append(self._allocate((num_slots + 1, *spec.shape), spec.dtype, device))
                holder.bind(self._slots[-1])

    def _allocate(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self.tensors.append(torch.empty(*shape, dtype=dtype, device=device))
        return self.tensors[-1]

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole slots, (from, to), one after the other."""
        for source, target in pairs:
            for rows in self._slots:
                rows[target].copy_(rows[source])

    def poison(self) -> None:
        """Fill every place with NaN: a check that nothing is ever read before it is written."""
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)
