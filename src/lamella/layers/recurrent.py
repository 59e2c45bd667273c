"""What the recurrent mixers partition: a short convolution, a matrix for each head, and one computation over both."""

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
    """A mixer that keeps the last inputs of its convolution and a recurrent matrix (fp32) for each request.

    A subclass builds its `ShortConv` over `self.history`, calls `declare`, and computes in `core` what reads and writes
    the state: to an engine that is one operation, which it calls as it likes. What comes out goes through the
    projection `output`.
    """

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.history = ConvHistory(kernel)

    @property
    def output(self) -> nn.Module:
        """The projection behind `core`."""
        raise NotImplementedError

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the inputs of `core`, on the rank."""
        raise NotImplementedError

    def declare(self, kit: Kit, prefix: str, matrix: Sequence[int]) -> None:
        """Ask for the state: the convolutions' windows, and a matrix of this shape on the rank."""
        self.history.take(0, {_PART: self.core})
        self.history.declare(kit, prefix, SlotState(tuple(matrix), torch.float32))

    def core(self, *inputs: Tensor | None) -> Tensor:
        """Return the convolution, the recurrence, and what follows them, of inputs (T, ...): (T, width).

        The last argument is where the output goes, or None.
        """
        raise NotImplementedError

    def run(self, inputs: Sequence[Tensor], width: int) -> Tensor:
        """`core` of inputs (T, ...), as the engine calls it: (T, width)."""
        return self.history.state_module.run(_PART, inputs, width)

    def state(self) -> RecurrentState | None:
        """Return the matrices (slots, ...) and slots of the current batch; None in a plain forward."""
        current = self.history.state_module.current()
        return None if current is None else RecurrentState(current.tensors[1], current.slots)


def fp32_parameter(size: int | tuple[int, ...], kit: Kit) -> nn.Parameter:
    """A parameter that is fp32 whatever the model's dtype, not filled yet."""
    shape = (size,) if isinstance(size, int) else size
    return nn.Parameter(torch.empty(shape, dtype=torch.float32, device=kit.device))
