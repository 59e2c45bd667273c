"""Layouts of parameters: what a loader and an initializer need besides the shape.

A module lists the layouts of its parameters, by name, in its attribute `layouts`. A parameter without a layout is
replicated on every rank, is one tensor of the file, and is initialized from N(0, 0.02), or with zeros if its name is
"bias".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from lamella.parallel.sharding import Split, shard_tensor


class TensorReader(Protocol):
    """Reader of a file's tensors by name; implemented by the sources of `lamella.checkpoint`."""

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        ...

    def load(self, name: str, splits: Sequence[Split] = ()) -> Tensor:
        """Read a tensor, or only the indices in `splits` along its leading dimensions."""
        ...


# Fills a slice of a parameter from a file: (tensor name, target slice, splits of the tensor, reader).
LoadFunction: TypeAlias = Callable[[str, Tensor, Sequence[Split], TensorReader], None]


class SeparateTensor(NamedTuple):
    """Tensor that some files store instead of a slice of a parameter.

    Attributes:
        target: the slice of the parameter that the tensor fills; empty if the slice belongs to another rank.
        splits: indices along the tensor's leading dimensions that this rank holds.
    """

    target: Tensor
    splits: tuple[Split, ...]


class StoredTensor(NamedTuple):
    """Tensor of a file and the rows of a parameter that it fills.

    Attributes:
        part: name of the tensor's module (`q_proj`), a sibling of the parameter's module; None for the same module.
        splits: indices along the tensor's leading dimensions that this rank holds.
        start: first row of the parameter; None for all rows.
        stop: row of the parameter after the last one; None for all rows.
    """

    part: str | None
    splits: tuple[Split, ...]
    start: int | None = None
    stop: int | None = None


@dataclass(frozen=True)
class ParameterLayout:
    """Layout of a parameter: division over ranks, checkpoint tensors, and initial values.

    Attributes:
        splits: indices along the leading dimensions that this rank holds; further dimensions are not divided.
        parts: names and rows, in order, of the file's tensors that are concatenated in this parameter; empty for one
            tensor.
        unstored: those of `parts` that are not in files. Their rows keep the values that the module set.
        separate: returns the tensors that some files store instead of the parameter, by their paths below the module.
        load: fills a slice of the parameter from stored tensors; None if the file's tensors are dequantized and copied.
        initial: bounds of the uniform initial distribution; equal bounds give a constant. None for N(0, 0.02), or zeros
            if the parameter's name is "bias".
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
    """Module that declares the layouts of its own parameters."""

    layouts: Mapping[str, ParameterLayout]


_WHOLE = ParameterLayout()


def layout_of(module: nn.Module, leaf: str) -> ParameterLayout:
    """Return the layout of the module's own parameter named `leaf`; the default layout if it declares none."""
    return module.layouts.get(leaf, _WHOLE) if isinstance(module, HasLayouts) else _WHOLE


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Fill every parameter with random values, distributed as at the start of training.

    The values do not depend on the dtype, and all ranks hold shards of the same model.

    Args:
        model: model to fill; see `ParameterLayout.initial` for the distributions.
        generator: source of random numbers on the model's device; None for torch's default generator.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            layout = layout_of(module, name)
            low, high = layout.initial or (0.0, 0.0)
            if low < high:
                full = _empty_full(parameter, layout.splits).uniform_(low, high, generator=generator)
            elif layout.initial is not None or name == "bias":
                parameter.fill_(low)
                continue
            else:
                full = _empty_full(parameter, layout.splits).normal_(0.0, 0.02, generator=generator)
            parameter.copy_(shard_tensor(full, layout.splits))


def _empty_full(parameter: nn.Parameter, splits: Sequence[Split]) -> Tensor:
    """Return an uninitialized fp32 tensor with the shape of the parameter over all ranks, in its stride order.

    Drawing into this tensor keeps values equal for all dtypes and rank counts: a generator's numbers depend on dtype,
    shape and stride order.
    """
    shape = [*(split.full for split in splits), *parameter.shape[len(splits) :]]
    order = sorted(range(len(shape)), key=parameter.stride, reverse=True)
    full = torch.empty([shape[dim] for dim in order], dtype=torch.float32, device=parameter.device)
    return full.permute([order.index(dim) for dim in range(len(order))])
