"""Facts about a parameter that a loader and an initializer must know, beside its shape.

A module states it in its attribute `layouts`, by the names of its own parameters. A parameter that is not in there is
whole on every rank, is one tensor of the file, and starts from N(0, 0.02), or from zero if it is called "bias".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from lamella.parallel.sharding import Split, shard_tensor


class TensorReader(Protocol):
    """The tensors of a file, by their names in it. A source of `lamella.checkpoint` is one."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        ...

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read a tensor, or the places of its leading dimensions that `splits` hold."""
        ...


# Fills a part of a parameter from a file: (tensor's name, the part, its splits, the file's tensors).
LoadFunction: TypeAlias = Callable[[str, Tensor, Sequence[Split], TensorReader], None]


class SeparateTensor(NamedTuple):
    """A tensor that some files hold in place of a part of a parameter.

    Attributes:
        place: the part of the parameter that it fills; without elements if it belongs to another rank.
        splits: the places of its leading dimensions that this rank holds.
    """

    place: Tensor
    splits: tuple[Split, ...]


class StoredTensor(NamedTuple):
    """A tensor of a file, and the rows [start, stop) of a parameter that it fills; None for all of them.

    `part` is its name beside the parameter's module (`q_proj`), None if it has the module's own.
    """

    part: str | None
    splits: tuple[Split, ...]
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class ParameterLayout:
    """Layout of a parameter: its division over ranks, the tensors of a file that fill it, and its first values.

    Attributes:
        splits: the places of the leading dimensions that this rank holds; the other dimensions are whole.
        parts: for a parameter that holds the rows of several tensors of a file: their names and rows, in order.
        unstored: those of `parts` that no file has. Their rows stay as the module has made them.
        separate: returns the tensors that some files hold in place of the parameter, by their paths below the module.
        load: fills a part of the parameter from a file as it stores it; None if its tensors, made dense, are copied.
        initial: bounds of the uniform distribution at the start of training; equal bounds are a constant. None for
            N(0, 0.02), or zero if the parameter is called "bias".
    """

    splits: tuple[Split, ...] = ()
    parts: Mapping[str, Split] = field(default_factory=dict)
    unstored: tuple[str, ...] = ()
    separate: Callable[[Tensor], Mapping[str, SeparateTensor]] | None = None
    load: LoadFunction | None = None
    initial: tuple[float, float] | None = None

    def tensors(self) -> Iterator[StoredTensor]:
        """Yield the tensors of a file that fill the parameter."""
        if not self.parts:
            yield StoredTensor(None, self.splits)
            return
        start = 0
        for part, rows in self.parts.items():
            stop = start + rows.size
            if part not in self.unstored:
                yield StoredTensor(part, (rows, *self.splits[1:]), start, stop)
            start = stop


@runtime_checkable
class HasLayouts(Protocol):
    """A module that states the layouts of its own parameters."""

    layouts: Mapping[str, ParameterLayout]


_WHOLE = ParameterLayout()


def layout_of(module: nn.Module, leaf: str) -> ParameterLayout:
    """Return the layout of a module's own parameter called `leaf`."""
    return module.layouts.get(leaf, _WHOLE) if isinstance(module, HasLayouts) else _WHOLE


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter at random, as the architectures' training code starts; see `ParameterLayout.initial`.

    The numbers are the same for every dtype, and each rank has its part of the same model.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            layout = layout_of(module, name)
            low, high = layout.initial or (0.0, 0.0)
            if low < high:
                room = _room(parameter, layout.splits).uniform_(low, high, generator=generator)
            elif layout.initial is not None or name == "bias":
                parameter.fill_(low)
                continue
            else:
                room = _room(parameter, layout.splits).normal_(0.0, 0.02, generator=generator)
            parameter.copy_(shard_tensor(room, layout.splits))


def _room(parameter: nn.Parameter, splits: Sequence[Split]) -> Tensor:
    """Return an empty tensor of the whole parameter's shape, fp32, in the parameter's order of strides.

    A generator gives other numbers in other dtypes, for a part of a tensor, and in another order.
    """
    shape = [*(split.full for split in splits), *parameter.shape[len(splits) :]]
    order = sorted(range(len(shape)), key=parameter.stride, reverse=True)
    room = torch.empty([shape[dim] for dim in order], dtype=torch.float32, device=parameter.device)
    return room.permute([order.index(dim) for dim in range(len(order))])
