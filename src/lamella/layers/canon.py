"""Canon layers: short causal convolutions with a skip, and what a decoder layer's convolutions remember together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.config import CanonConfig
from lamella.distributed.sharding import Split
from lamella.layers.context import require_batch
from lamella.layers.kit import Computation, Kit, SlotHolder
from lamella.layers.norm import RMSNorm
from lamella.ops.backend import use_fused
from lamella.ops.ragged import RaggedBatch
from lamella.ops.short_conv import norm_short_conv, short_conv, short_conv_swiglu
from lamella.ops.short_conv.reference import ConvStep
from lamella.ops.swiglu import swiglu
from lamella.state.spec import SlotState


class CanonHistory(nn.Module):
    """The last W-1 inputs of all canon convolutions of one decoder layer, side by side in one slot tensor.

    One tensor instead of one per convolution keeps the kinds of state, and so an engine's bookkeeping, few.
    """

    holder: SlotHolder

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.kernel, self._taken = kernel, 0
        self._parts: dict[str, Computation] = {}

    def take(self, channels: int, parts: Mapping[str, Computation]) -> slice:
        """Room for one convolution's channels; `parts` are what reads and writes them."""
        start, self._taken = self._taken, self._taken + channels
        self._parts |= parts
        return slice(start, self._taken)

    def declare(self, kit: Kit, prefix: str) -> None:
        """Ask for the state, once every convolution of the layer has taken its channels."""
        self.holder = kit.slot_state(SlotState((self.kernel - 1, self._taken), kit.dtype), prefix)
        self.holder.parts |= self._parts


class Canon(nn.Module):
    """A canon convolution of the rank's channels. weight (channels, 1, W), column W-1 multiplies the current token.

    `part` is what it is called among those that share the layer's history.
    """

    def __init__(self, config: CanonConfig, channels: Split, kit: Kit, history: CanonHistory, part: str) -> None:
        super().__init__()
        assert config.kernel == history.kernel
        self.config, self.size, self.part = config, channels.size, part
        # A tap's weights of all channels lie side by side, so that kernels load many at once.
        taps = torch.empty(config.kernel, self.size, dtype=kit.dtype, device=kit.device)
        self.weight = nn.Parameter(taps.T[:, None, :])
        self.bias = nn.Parameter(torch.empty(self.size, dtype=kit.dtype, device=kit.device)) if config.bias else None
        self.splits = {"weight": (channels,), "bias": (channels,)}
        self.history = history
        computations: dict[str, Computation] = {
            part: self._convolve, f"{part}.swiglu": self._convolve_and_gate, f"{part}.after_norm": self._after_norm
        }  # fmt: skip
        self.channels = history.take(self.size, computations)

    def forward(self, x: Tensor) -> Tensor:
        """x (T, channels) -> (T, channels)."""
        return self.history.holder.run(self.part, x, self.size)

    def swiglu(self, x: Tensor) -> Tensor:
        """`silu(gate) * up` of the convolved x (T, channels) = [gate | up]."""
        if self.history.holder.inline and not use_fused(x):
            return swiglu(self(x))
        return self.history.holder.run(f"{self.part}.swiglu", x, self.size // 2)

    def after_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The convolution of `norm(x, residual)`, and the new residual."""
        holder = self.history.holder
        if not holder.inline:
            return holder.run_after_norm(self.part, x, residual, norm.weight, norm.eps)
        if use_fused(x):
            return norm_short_conv(x, residual, norm.weight, norm.eps, *self.operands())
        normed, total = norm(x, residual)
        return self(normed), total

    @property
    def is_step(self) -> bool:
        """Whether every request in flight has one new token, and a history."""
        batch = require_batch()
        return batch.slots is not None and batch.ragged.num_decodes == batch.ragged.num_requests

    def step(self) -> ConvStep:
        """The operands where `is_step`."""
        weight, bias, _, history, slots, activation, residual = self.operands()
        assert history is not None and slots is not None
        return ConvStep(weight, bias, history, slots, activation, residual)

    def operands(
        self, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, RaggedBatch, Tensor | None, Tensor | None, bool, bool]:
        """What a convolution is given beside its input: weight (C, W), bias, batch, history, slots, activation,
        residual. The input is needed where the holder is not `inline`."""
        history, slots = self.history.holder.window(self.channels, x)
        return (
            self.weight.squeeze(1),
            self.bias,
            require_batch().ragged,
            history,
            slots,
            self.config.activation,
            self.config.residual,
        )

    def _convolve(self, x: Tensor, out: Tensor | None) -> Tensor:
        return short_conv(x, *self.operands(x), out)

    def _convolve_and_gate(self, x: Tensor, out: Tensor | None) -> Tensor:
        return short_conv_swiglu(x, *self.operands(x), out)

    def _after_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        return norm_short_conv(x, residual, weight, eps, *self.operands(), out, total)
