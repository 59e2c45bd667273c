"""Tensors of the state pools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lamella.state.memory import StateMemory
from lamella.state.spec import SlotState

SLOTS = 6


class Module:
    """A state module with slot state only, whose tensors are what it was bound to."""

    prefix = "test"

    def __init__(self, *specs: SlotState) -> None:
        self.specs = specs

    def bind(self, *tensors: torch.Tensor) -> None:
        self.tensors = tensors


def make_memory(*modules: Module) -> StateMemory:
    size = StateMemory.size(modules, {}, 16, SLOTS)
    return StateMemory(modules, {}, 16, SLOTS, torch.zeros(size, dtype=torch.uint8))


SHAPES = [
    [SlotState((3, 8), torch.bfloat16)],
    [SlotState((3, 5), torch.bfloat16), SlotState((2, 4, 4), torch.float32)],  # 30 bytes: no whole words
    [SlotState((1,), torch.float16), SlotState((3, 8), torch.bfloat16), SlotState((7,), torch.float32)],
]


@pytest.mark.parametrize("specs", SHAPES, ids=["words", "odd", "three dtypes"])
@given(st.lists(st.tuples(st.integers(0, SLOTS), st.integers(0, SLOTS)).filter(lambda p: p[0] != p[1]), max_size=12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_copies_launched_together_equal_copies_one_by_one(specs, pairs):
    modules = [Module(*specs), Module(*specs)]
    memory = make_memory(*modules)
    tensors = [tensor for module in modules for tensor in module.tensors]
    for number, tensor in enumerate(tensors):
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) % 251 + number)
        tensor[0, ...] = torch.nan  # bits are copied, whatever they say
    expected = [tensor.clone() for tensor in tensors]
    for source, target in pairs:
        for tensor in expected:
            tensor[target] = tensor[source].clone()
    memory.copy_slots(pairs)
    for tensor, right in zip(tensors, expected, strict=True):
        torch.testing.assert_close(tensor, right, rtol=0, atol=0, equal_nan=True)
