"""Opaque operations, which torch.compile does not trace, including one for modules with state or communication.

The module that computes is identified by a tensor with a number (a handle). A Python number or name would be compiled
into the program, and each layer would need its own program.
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
    """Register an operation in `torch.ops.lamella`.

    Args:
        signature: name and signature, in the form of torch's schemas.
        compute: the implementation.
        shape: fake (meta) kernel, which returns tensors with the output shapes.

    Returns:
        The library; the operation exists as long as this object.
    """
    library, name = Library("lamella", "FRAGMENT"), signature.partition("(")[0]
    library.define(signature, tags=(torch.Tag.needs_fixed_stride_order,))
    library.impl(name, compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lamella::{name}", shape, lib=library)
    return library


class OpaqueModule(Protocol):
    """Object whose computations must not be traced."""

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Run the computation `part`.

        Args:
            part: name of the computation.
            inputs: (T, ...) each.

        Returns:
            A new tensor (T, ..., width) in the dtype of the first input.
        """
        ...


_modules: WeakValueDictionary[int, OpaqueModule] = WeakValueDictionary()
_numbers = itertools.count()


def handle(module: OpaqueModule) -> Tensor:
    """Return the handle of a module for `call`: () int64 on the CPU. It does not keep the module alive."""
    number = next(_numbers)
    _modules[number] = module
    return torch.tensor(number, device="cpu")


def call(handle: Tensor, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
    """Run a computation of a module as one opaque operation.

    Args:
        handle: handle of the module.
        part: name of the computation.
        inputs: inputs of the computation.
        width: size of the output's last dimension.

    Returns:
        The shape and dtype of the first input, except for the last dimension.
    """
    return torch.ops.lamella.opaque(list(inputs), width, handle, part)


def _opaque(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    out = _modules[int(handle)].compute(part, inputs).contiguous()
    assert out.shape == (*inputs[0].shape[:-1], width)
    return out


def _shape(inputs: Sequence[Tensor], width: int, handle: Tensor, part: str) -> Tensor:
    """Fake (meta) kernel: output shape only."""
    return inputs[0].new_empty(*inputs[0].shape[:-1], width)


_library = operation("opaque(Tensor[] inputs, SymInt width, Tensor handle, str part) -> Tensor", _opaque, _shape)
