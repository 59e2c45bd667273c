"""State state_modules as operations that torch.compile does not look into, see `ops.opaque`.

Which state_module computes reaches a program as a tensor, its handle, so that layers alike are one program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.layers.decoder import LanguageModel
from lamella.layers.state_modules import PagedAttention, SlotStateModule, find_state_modules
from lamella.ops import opaque


class OpaqueAttention(PagedAttention):
    """Paged attention that is one operation to torch.compile."""

    handle: Tensor

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `PagedAttention.forward`."""
        if torch.compiler.is_compiling():
            return opaque.call(self.handle, "attention", (q, k, v), self.spec.head_dim)
        return super().forward(q, k, v)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return attention of [q, k, v], when the operation runs."""
        return self(*inputs)


class OpaqueSlots(SlotStateModule):
    """Slot state whose computations are one operation each to torch.compile."""

    handle: Tensor

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """See `SlotStateModule.run`."""
        if torch.compiler.is_compiling():
            return opaque.call(self.handle, part, inputs, width)
        return super().run(part, inputs, width)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """Return one of the `parts`, when the operation runs."""
        result: Tensor = self.parts[part](*inputs, None)
        return result


def make_opaque(model: LanguageModel) -> None:
    """Have torch.compile take state, and sums over ranks, as operations that it does not look into.

    The state_modules stay the same objects: an engine has bound memory to them, and layers refer to them.
    """
    for state_module in find_state_modules(model):
        state_module.__class__ = OpaqueAttention if isinstance(state_module, PagedAttention) else OpaqueSlots
        state_module.handle = opaque.handle(state_module)  # type: ignore[arg-type]
    model.group.handle = opaque.handle(model.group)
