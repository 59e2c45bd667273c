"""The tensors behind blocks and slots, and what a model's state costs."""

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
    """The state of a model: how many layers have each kind, and bytes."""

    paged: Mapping[PagedState, int]
    slots: Mapping[SlotState, int]

    @classmethod
    def of(cls, state_modules: Sequence[StateModule]) -> StateCost:
        specs = Counter(spec for state_module in state_modules for spec in state_module.specs)
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
        """Of a token's blocks while every layer can see it."""
        return sum(spec.bytes_per_token * count for spec, count in self.paged.items())

    def bytes_at(self, length: int) -> int:
        """Of one request with `length` tokens, those that windows still show counted only."""
        blocks = sum(spec.bytes_per_token * spec.live_tokens(length) * count for spec, count in self.paged.items())
        return blocks + self.bytes_per_request


class StateMemory:
    """Block and slot tensors in one block of memory, bound to the layers that hold them. Place 0 of each is the dummy;
    nothing is initialised.

    Equal modules and capacities give equal addresses, so that a graph that was captured over
    it can be replayed after other layouts had the block.
    """

    def __init__(
        self,
        state_modules: Sequence[StateModule],
        capacities: Mapping[PagedState, int],
        block_size: int,
        num_slots: int,
        block: torch.Tensor,
    ) -> None:
        """`capacities` gives the usable blocks of each group; `block` is at least `size` bytes."""
        self._state_modules = tuple(state_modules)
        self._bound: list[list[torch.Tensor]] = []
        self._slots: list[torch.Tensor] = []
        self._rows: dict[int, list[torch.Tensor]] = {}  # of a slot, its row of each tensor, as whole words
        start = 0
        for state_module in state_modules:
            self._bound.append([])
            for spec, shape in _shapes(state_module, capacities, block_size, num_slots):
                size = math.prod(shape) * spec.dtype.itemsize
                tensor = block[start : start + size].view(spec.dtype).view(shape)
                start += _room(spec, shape)
                self._bound[-1].append(tensor)
                if isinstance(spec, SlotState):
                    self._slots.append(tensor)
        self.bind()

    @staticmethod
    def size(
        state_modules: Sequence[StateModule], capacities: Mapping[PagedState, int], block_size: int, num_slots: int
    ) -> int:
        """Bytes of the block that all this needs."""
        shapes = (_shapes(state_module, capacities, block_size, num_slots) for state_module in state_modules)
        return sum(_room(spec, shape) for each in shapes for spec, shape in each)

    def bind(self) -> None:
        """Give the layers their tensors (again, after another layout's)."""
        for state_module, tensors in zip(self._state_modules, self._bound, strict=True):
            state_module.bind(*tensors)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensors in self._bound for tensor in tensors]

    def copy_slots(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole slots, (from, to), as if one after the other.

        Copies that do not depend on each other are launched together: on a GPU a few launches copy the state of all
        layers and of all requests that reach the end of a block in this step.
        """
        for together in _independent(pairs):
            sources = [row for source, _ in together for row in self._rows_of(source)]
            targets = [row for _, target in together for row in self._rows_of(target)]
            torch._foreach_copy_(targets, sources)

    def _rows_of(self, slot: int) -> list[torch.Tensor]:
        if slot not in self._rows:
            self._rows[slot] = [_as_words(tensor[slot]) for tensor in self._slots]
        return self._rows[slot]

    def poison(self) -> None:
        """Fill every place with NaN: a check that nothing is ever read before it is written."""
        for tensor in self.tensors:
            tensor.fill_(torch.nan)

    @property
    def nbytes(self) -> int:
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
    """What is bound to a state_module, in order: keys and values, or its slots."""
    for spec in state_module.specs:
        if isinstance(spec, PagedState):
            shape = (capacities[spec] + 1, block_size, spec.kv_heads, spec.head_dim)
            yield spec, shape
            yield spec, shape
        else:
            yield spec, (num_slots + 1, *spec.shape)


def _room(spec: StateSpec, shape: Sequence[int]) -> int:
    """Bytes that a tensor takes of the block."""
    return -(-math.prod(shape) * spec.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
