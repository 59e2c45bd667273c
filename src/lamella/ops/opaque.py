"""Operations that torch.compile does not look into, and the one for what has a memory, or speaks with other processes.

Who computes is told by a tensor with a number. A number of its own among a layer's attributes, or a name, would be
compiled in, and each layer would be a program of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.library import Library

Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


def operation(signature: str, compute: Callable[..., Result], shape: Callable[..., Result]) -> Library:
    """Make an operation of `torch.ops.lamella`, of this name and signature. It goes with the returned library.

    Args:
        signature: as torch's schemas are written.
        compute: the implementation.
        shape: the fake (meta) kernel, which returns tensors of the right shapes.
    """
    library, name = Library("lamella", "FRAGMENT"), signature.partition("(")[0]
    library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamella::{name}", shape, lib=library)
    return library


class StateModuleKit(Protocol):
    """Whoever computes something that must not be traced."""

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """The part called `part` of inputs (T, ...): a new tensor (T, ..., width) of the first one's dtype."""
        ...


_state_modules: WeakValueDictionary[int, StateModuleKit] = WeakValueDictionary()
_numbers = itertools.count()


def handle(state_module: StateModuleKit) -> Tensor:
    """What `call` is given for a state_module: () int64 on the CPU. It keeps nothing alive."""
    number = next(_numbers)
    _state_modules[number] = state_module
    return torch.tensor(number, device="cpu")


def call(handle: Tensor, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
    """What the state_module makes of the inputs: of the shape and dtype of the first, but `width` wide."""
    return torch.ops.lamella.opaque(list(inputs), width, handle, part)


def _opaque(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    out = _state_modules[int(handle)].compute(part, inputs).contiguous()
    assert out.shape == (*inputs[0].shape[:-1], width)
    return out


def _shape(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    """Fake (meta) kernel: output shape only."""
    return inputs[0].new_empty(*inputs[0].shape[:-1], width)


_library = operation("opaque(Tensor[] inputs, SymInt width, Tensor handle, str part) -> Tensor", _opaque, _shape)
