"""State tensors of a model, and their size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lamella.state.spec import PagedState, SlotState, StateModule, StateSpec

_ALIGNMENT = 256  # bytes: more than the widest loads of a kernel need


@dataclass(frozen=True)
class StateCost:
    """Size of a model's state.

    Attributes:
        paged: number of layers with each paged state. Layers with equal paged states form one block group.
        slots: number of layers with each slot state.
    """

    paged: Mapping[PagedState, int]
    slots: Mapping[SlotState, int]

    @classmethod
    def from_modules(cls, state_modules: Sequence[StateModule]) -> StateCost:
        """Count the states that modules declare."""
        specs = Counter(spec for state_module in state_modules for spec in state_module.specs)
        return cls(
            {spec: count for spec, count in specs.items() if isinstance(spec, PagedState)},
            {spec: count for spec, count in specs.items() if isinstance(spec, SlotState)},
        )

    @property
    def bytes_per_request(self) -> int:
        """Bytes of slot state per request, over all layers."""
        return sum(spec.bytes_per_request * count for spec, count in self.slots.items())

    @property
    def bytes_per_token(self) -> int:
        """Bytes of paged state per token, over all layers, while every layer can see the token."""
        return sum(spec.bytes_per_token * count for spec, count in self.paged.items())

    def bytes_at(self, length: int) -> int:
        """Return the state bytes of one request with `length` tokens, without tokens that windows have left behind."""
        blocks = sum(spec.bytes_per_token * spec.live_tokens(length) * count for spec, count in self.paged.items())
        return blocks + self.bytes_per_request


class StateMemory:
    """Tensors of all blocks and slots, as views of one memory buffer, bound to the layers that use them.

    Index 0 of every tensor is the dummy block or slot. Nothing is initialised.

    Equal modules and capacities give equal addresses in the buffer. So a CUDA graph that was captured over one layout
    can be replayed after other layouts have used the buffer.
    """

    def __init__(
        self,
        state_modules: Sequence[StateModule],
        capacities: Mapping[PagedState, int],
        block_size: int,
        num_slots: int,
        buffer: torch.Tensor,
    ) -> None:
        """Lay out the tensors in `buffer` and bind them.

        Args:
            state_modules: modules to bind tensors to.
            capacities: number of blocks of each group, without the dummy.
            block_size: tokens per block.
            num_slots: number of slots, without the dummy.
            buffer: (nbytes,), uint8, at least `size` bytes.
        """
        self._state_modules = tuple(state_modules)
        self._bound: list[list[torch.Tensor]] = []
        self._slots: list[torch.Tensor] = []
        self._rows: dict[int, list[torch.Tensor]] = {}  # of a slot, its row of each tensor, as whole words
        start = 0
        for state_module in state_modules:
            self._bound.append([])
            for spec, shape in _shapes(state_module, capacities, block_size, num_slots):
                size = math.prod(shape) * spec.dtype.itemsize
                tensor = buffer[start : start + size].view(spec.dtype).view(shape)
                start += _aligned_bytes(spec, shape)
                self._bound[-1].append(tensor)
                if isinstance(spec, SlotState):
                    self._slots.append(tensor)
        self.bind()

    @staticmethod
    def size(
        state_modules: Sequence[StateModule], capacities: Mapping[PagedState, int], block_size: int, num_slots: int
    ) -> int:
        """Return the bytes that the buffer of these tensors needs."""
        shapes = (_shapes(state_module, capacities, block_size, num_slots) for state_module in state_modules)
        return sum(_aligned_bytes(spec, shape) for each in shapes for spec, shape in each)

    def bind(self) -> None:
        """Bind the tensors to the layers. Needed again after another layout was bound."""
        for state_module, tensors in zip(self._state_modules, self._bound, strict=True):
            state_module.bind(*tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors, in the order of the modules."""
        return [tensor for tensors in self._bound for tensor in tensors]

    def copy_slots(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy slots (from, to) in all layers, with the result of one copy after the other.

        Copies that do not depend on each other are launched together: on a GPU a few launches copy the state of all
        layers and of all requests that reach the end of a block in this step.
        """
        for together in _independent(copies):
            sources = [row for source, _ in together for row in self._rows_of(source)]
            targets = [row for _, target in together for row in self._rows_of(target)]
            torch._foreach_copy_(targets, sources)

    def _rows_of(self, slot: int) -> list[torch.Tensor]:
        if slot not in self._rows:
            self._rows[slot] = [_as_words(tensor[slot]) for tensor in self._slots]
        return self._rows[slot]

    def poison(self) -> None:
        """Fill all tensors with NaN. Tests use it to check that no value is read before it is written."""
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def _independent(pairs: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    """Divide copies into runs in which no slot that is written is read, or written again."""
    first, read, written = 0, set[int](), set[int]()
    for index, (source, target) in enumerate(pairs):
        if source in written or target in written or target in read:
            yield pairs[first:index]
            first, read, written = index, set(), set()
        read.add(source)
        written.add(target)
    if first < len(pairs):
        yield pairs[first:]


def _as_words(row: torch.Tensor) -> torch.Tensor:
    """View a row as integers of one size, so that rows of several dtypes are copied together."""
    flat = row.view(-1)
    return flat.view(torch.int32) if flat.nbytes % 4 == 0 else flat.view(torch.uint8)


def _shapes(
    state_module: StateModule, capacities: Mapping[PagedState, int], block_size: int, num_slots: int
) -> Iterator[tuple[StateSpec, tuple[int, ...]]]:
    """Yield the shape of each tensor that `StateModule.bind` takes, in order."""
    for spec in state_module.specs:
        if isinstance(spec, PagedState):
            shape = (capacities[spec] + 1, block_size, spec.kv_heads, spec.head_dim)
            yield spec, shape
            yield spec, shape
        else:
            yield spec, (num_slots + 1, *spec.shape)


def _aligned_bytes(spec: StateSpec, shape: Sequence[int]) -> int:
    """Return the bytes of the buffer that a tensor takes, alignment included."""
    return -(-math.prod(shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
