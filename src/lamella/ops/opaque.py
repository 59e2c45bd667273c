"""The one operation that torch.compile does not look into: what has a memory, or speaks with other processes.

Who computes is told by a tensor with a number. A number of its own among a layer's attributes, or a name, would be
compiled in, and each layer would be a program of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library


class Holder(Protocol):
    """Whoever computes something that must not be traced."""

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """The part called `part` of inputs (T, ...): a new tensor (T, ..., width) of the first one's dtype."""
        ...


_holders: WeakValueDictionary[int, Holder] = WeakValueDictionary()
_numbers = itertools.count()


def handle(holder: Holder) -> Tensor:
    """What `call` is given for a holder: () int64 on the CPU. It keeps nothing alive."""
    number = next(_numbers)
    _holders[number] = holder
    return torch.tensor(number, device="cpu")


def call(handle: Tensor, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
    """What the holder makes of the inputs: of the shape and dtype of the first, but `width` wide."""
    return torch.ops.lamella.opaque(list(inputs), width, handle, part)


def _opaque(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    out = _holders[int(handle)].compute(part, inputs).contiguous()
    assert out.shape == (*inputs[0].shape[:-1], width)
    return out


def _shape(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    """What the operation makes of tensors without data."""
    return inputs[0].new_empty(*inputs[0].shape[:-1], width)


_library = Library("lamella", "FRAGMENT")  # the operation goes with it
_library.define(
    "opaque(Tensor[] inputs, SymInt width, Tensor handle, str part) -> Tensor",
    tags=(torch.Tag.needs_fixed_stride_order,),
)
_library.impl("opaque", _opaque, "CompositeExplicitAutograd")
torch.library.register_fake("lamella::opaque", _shape, lib=_library)
