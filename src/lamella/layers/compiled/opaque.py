"""State modules as operations that torch.compile does not trace, see `ops.opaque`.

A program gets the state module as a tensor (its handle), so that layers of the same kind share one program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import PagedAttention, SlotStateModule, find_state_modules
from lamella.ops import opaque


class OpaqueAttention(PagedAttention):
    """Paged attention that torch.compile sees as one opaque operation."""

    handle: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run `PagedAttention.forward`, as one opaque operation while compiling."""
        if torch.compiler.is_compiling():
            return opaque.call(self.handle, "attention", (q, k, v), self.spec.head_dim)
        return super().forward(q, k, v)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the attention of inputs [q, k, v]; called when the opaque operation runs."""
        return self(*inputs)


class OpaqueSlots(SlotStateModule):
    """Slot state module whose computations torch.compile sees as one opaque operation each."""

    handle: Tensor

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """Run `SlotStateModule.run`, as one opaque operation while compiling."""
        if torch.compiler.is_compiling():
            return opaque.call(self.handle, part, inputs, width)
        return super().run(part, inputs, width)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return the result of one of the `parts`; called when the opaque operation runs."""
        result: Tensor = self.parts[part](*inputs, None)
        return result


def make_opaque(model: LanguageModel) -> None:
    """Turn the state modules and the all-reduce of a model into opaque operations, in place.

    The state modules stay the same objects, because engines have bound memory to them and layers refer to them.
    """
    for state_module in find_state_modules(model):
        state_module.__class__ = OpaqueAttention if isinstance(state_module, PagedAttention) else OpaqueSlots
        state_module.handle = opaque.handle(state_module)  # type: ignore[arg-type]
    model.group.handle = opaque.handle(model.group)
