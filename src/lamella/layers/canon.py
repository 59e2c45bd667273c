"""Canon layers: short causal convolutions with a skip, and what a decoder layer's convolutions remember together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lamella.config import CanonConfig
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.ops.short_conv import short_conv
from lamella.state.spec import SlotState


class CanonHistory(nn.Module):
    """The last W-1 inputs of all canon convolutions of one decoder layer, side by side in one slot tensor.

    One tensor instead of one per convolution keeps the kinds of state, and so an engine's bookkeeping, few.
    """

    def __init__(self, kit: Kit, kernel: int, channels: int, prefix: str) -> None:
        super().__init__()
        self.holder = kit.slot_state(SlotState((kernel - 1, channels), kit.dtype), prefix)
        self._taken = 0

    def take(self, channels: int) -> slice:
        """The next free channels."""
        start, self._taken = self._taken, self._taken + channels
        assert self._taken <= self.holder.spec.shape[1]
        return slice(start, self._taken)


class Canon(nn.Module):
    """One canon convolution. weight (channels, 1, W), column W-1 multiplies the current token."""

    def __init__(self, config: CanonConfig, channels: int, kit: Kit, history: CanonHistory) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(channels, 1, config.kernel, dtype=kit.dtype, device=kit.device))
        self.bias = nn.Parameter(torch.empty(channels, dtype=kit.dtype, device=kit.device)) if config.bias else None
        self.history, self.channels = history, history.take(channels)

    def forward(self, x: Tensor) -> Tensor:
        rows, slots = self.history.holder.current()
        return short_conv(
            x,
            self.weight.squeeze(1),
            self.bias,
            require_batch().ragged,
            None if rows is None else rows[:, :, self.channels],
            slots,
            activation=self.config.activation,
            residual=self.config.residual,
        )
