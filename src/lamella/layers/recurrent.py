"""Base class of recurrent mixers: a short convolution and a recurrent matrix per head, updated in one computation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lamella.layers.kit import Kit
from lamella.layers.short_conv import ConvHistory
from lamella.ops.operands import RecurrentState
from lamella.state.spec import SlotState

_PART = "mixer"


class RecurrentMixer(nn.Module):
    """Mixer with two slot states per request: a convolution window and recurrent fp32 matrices.

    A subclass builds its `ShortConv` over `self.history`, calls `declare`, and reads and writes the state only in
    `core`. An engine treats `core` as one operation and may call it in pieces or outside a compiled program. The result
    goes through the projection `output`.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.history = ConvHistory(kernel)

    @property
    def output(self) -> nn.Module:
        """The projection that follows `core`."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the inputs of `core` on this rank."""
        raise NotImplementedError

    def declare(self, kit: Kit, prefix: str, matrix: Sequence[int]) -> None:
        """Declare the state: the convolution window, and a recurrent state of shape `matrix` on this rank."""
        self.history.reserve(0, {_PART: self.core})
        self.history.declare(kit, prefix, SlotState(tuple(matrix), torch.float32))

    def core(self, *inputs: Tensor | None) -> Tensor:
        """Compute the convolution, the recurrence and the gate.

        Args:
            inputs: tensors (T, ...) of the `widths`, then the output tensor (T, width) to write, or None.

        Returns:
            (T, width).
        """
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], width: int) -> Tensor:
        """Run `core` on inputs (T, ...) through the engine's state module; return (T, width)."""
        return self.history.state_module.run(_PART, inputs, width)

    def state(self) -> RecurrentState | None:
        """Return the recurrent matrices (slots, ...) and the batch's slot ids; None in a plain forward."""
        current = self.history.state_module.current()
        return None if current is None else RecurrentState(current.tensors[1], current.slots)


def fp32_parameter(size: int | tuple[int, ...], kit: Kit) -> nn.Parameter:
    """Return an uninitialized parameter that is fp32 whatever the model's dtype."""
    shape = (size,) if isinstance(size, int) else size
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=kit.device))
