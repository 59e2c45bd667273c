"""Short causal convolutions, and what those of a layer or a mixer remember together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lamella.config import CanonConfig
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.layers.parameters import ParameterLayout
from lamella.layers.state_modules import Computation, SlotStateModule
from lamella.ops.operands import ConvState, ConvWeights
from lamella.ops.short_conv import short_conv
from lamella.parallel.sharding import Split
from lamella.state.spec import SlotState

_LEAST_TAPS = 2


class ConvHistory(nn.Module):
    """The last W-1 inputs of several convolutions, side by side in one slot tensor.

    One tensor instead of one per convolution keeps the kinds of state, and so an engine's bookkeeping, few. What else
    the same computations keep, a recurrent matrix, is declared with it and lies in the same state_module.
    """

    state_module: SlotStateModule

    def __init__(self, kernel: int) -> None:
        super().__init__()
        # The operations keep at least one input; a convolution of width 1 has a first tap of zeros, see `ShortConv`.
        self.kernel, self._taken = max(kernel, _LEAST_TAPS), 0
        self._parts: dict[str, Computation] = {}
        self._channels: dict[str, slice] = {}
        self._convolutions: set[str] = set()

    def take(self, channels: int, parts: Mapping[str, Computation], alone: bool = False) -> slice:
        """Reserve one convolution's channels.

        Args:
            channels: of the convolution.
            parts: what reads and writes them, by name.
            alone: whether the convolution of their first input is all the state that these parts have.

        Returns:
            The channels in the slot tensor.
        """
        if alone and channels:
            self._convolutions |= set(parts)
        start, self._taken = self._taken, self._taken + channels
        self._parts |= parts
        if channels:
            self._channels |= dict.fromkeys(parts, slice(start, self._taken))
        return slice(start, self._taken)

    def declare(self, kit: Kit, prefix: str, *more: SlotState) -> None:
        """Ask for the state, once every convolution has taken its channels."""
        self.state_module = kit.slot_state((SlotState((self.kernel - 1, self._taken), kit.dtype), *more), prefix)
        self.state_module.parts |= self._parts
        self.state_module.channels |= self._channels
        self.state_module.convolutions |= self._convolutions


class ShortConv(nn.Module):
    """A convolution of the rank's channels. weight (channels, 1, W), column W-1 multiplies the current token.

    A checkpoint may hold it as several, under the names that `channels` has.
    """

    def __init__(
        self,
        config: CanonConfig,
        channels: Split | Mapping[str, Split],
        kit: Kit,
        history: ConvHistory,
        computations: Mapping[str, Computation] | None = None,
        alone: bool = False,
    ) -> None:
        super().__init__()
        assert max(config.kernel, _LEAST_TAPS) == history.kernel
        parts: Mapping[str, Split] = {}
        if not isinstance(channels, Split):
            parts, channels = channels, Split.join(channels.values())
        self.config, self.size = config, channels.size
        # A tap's weights of all channels lie side by side, so that kernels load many at once.
        taps = torch.empty(config.kernel, self.size, dtype=kit.dtype, device=kit.device)
        self.weight = nn.Parameter(taps.T[:, None, :])
        self.bias = nn.Parameter(torch.empty(self.size, dtype=kit.dtype, device=kit.device)) if config.bias else None
        bound = config.kernel**-0.5
        layout = ParameterLayout((channels,), parts, initial=(-bound, bound))
        self.layouts = {"weight": layout, "bias": layout}
        self.history = history
        self.channels = history.take(self.size, computations or {}, alone)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (T, channels), within a computation over the state: (T, channels)."""
        return short_conv(x, self.weights(), require_batch().ragged, self.state(x))

    def weights(self) -> ConvWeights:
        """Return the weights as operations take them."""
        weight = self.weight.squeeze(1)
        if self.config.kernel < _LEAST_TAPS:
            weight = torch.cat((torch.zeros_like(weight).T, weight.T)).T  # in the layout of the other taps
        return ConvWeights(weight, self.bias, self.config.activation, self.config.residual)

    def state(self, x: Tensor | None = None) -> ConvState | None:
        """Return the state in the current batch; None in a plain forward.

        The input x is needed where the state_module is not `inline`.
        """
        return self.history.state_module.window(self.channels, x)
