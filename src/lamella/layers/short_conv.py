"""Short causal convolutions, and the slot state that the convolutions of a layer or mixer share."""

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
    """Last W-1 inputs of several convolutions, concatenated along the channels of one slot tensor.

    One tensor for all convolutions keeps the number of slot states, and an engine's bookkeeping, small. Other state of
    the same computations, such as a recurrent matrix, is declared together with it in the same state module.

    Attributes:
        state_module: slot state of the convolutions, from the kit; set by `declare`.
        kernel: width W of the convolutions, at least 2.
    """

    state_module: SlotStateModule

    def __init__(self, kernel: int) -> None:
        super().__init__()
        # The ops need at least one stored input. `ShortConv` extends a convolution of width 1 by a tap of zeros.
        self.kernel, self._num_channels = max(kernel, _LEAST_TAPS), 0
        self._parts: dict[str, Computation] = {}
        self._channels: dict[str, slice] = {}
        self._convolutions: set[str] = set()

    def reserve(self, channels: int, parts: Mapping[str, Computation], is_whole_state: bool = False) -> slice:
        """Reserve channels of the slot tensor for one convolution.

        Args:
            channels: number of channels of the convolution.
            parts: computations that read and write these channels, by name.
            is_whole_state: whether the convolution of their first input is the only state of these computations.

        Returns:
            The reserved channels in the slot tensor.
        """
        if is_whole_state and channels:
            self._convolutions |= set(parts)
        start, self._num_channels = self._num_channels, self._num_channels + channels
        self._parts |= parts
        if channels:
            self._channels |= dict.fromkeys(parts, slice(start, self._num_channels))
        return slice(start, self._num_channels)

    def declare(self, kit: Kit, prefix: str, *other_states: SlotState) -> None:
        """Create the state module, after every convolution has reserved its channels.

        Args:
            kit: builds the state module.
            prefix: dotted path of the state.
            other_states: further slot states of the same computations.
        """
        self.state_module = kit.slot_state(
            (SlotState((self.kernel - 1, self._num_channels), kit.dtype), *other_states), prefix
        )
        self.state_module.parts |= self._parts
        self.state_module.channels |= self._channels
        self.state_module.convolutions |= self._convolutions


class ShortConv(nn.Module):
    """Causal convolution over the channels of this rank.

    A checkpoint may store several convolutions, under the keys of `channels`, that are concatenated here.

    Attributes:
        weight: (channels, 1, W); column W-1 multiplies the current token.
        bias: (channels,), or None.
        history: slot state shared with other convolutions.
        channels: this convolution's channels in the slot tensor of `history`.
    """

    def __init__(
        self,
        config: CanonConfig,
        channels: Split | Mapping[str, Split],
        kit: Kit,
        history: ConvHistory,
        computations: Mapping[str, Computation] | None = None,
        is_whole_state: bool = False,
    ) -> None:
        super().__init__()
        assert max(config.kernel, _LEAST_TAPS) == history.kernel
        parts: Mapping[str, Split] = {}
        if not isinstance(channels, Split):
            parts, channels = channels, Split.join(channels.values())
        self.config, self.size = config, channels.size
        # The weights of one tap are contiguous over the channels, so that kernels load them in wide vectors.
        taps = torch.empty(config.kernel, self.size, dtype=kit.dtype, device=kit.device)
        self.weight = nn.Parameter(taps.T[:, None, :])
        self.bias = nn.Parameter(torch.empty(self.size, dtype=kit.dtype, device=kit.device)) if config.bias else None
        bound = config.kernel**-0.5
        layout = ParameterLayout((channels,), parts, initial=(-bound, bound))
        self.layouts = {"weight": layout, "bias": layout}
        self.history = history
        self.channels = history.reserve(self.size, computations or {}, is_whole_state)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (T, channels); return (T, channels). Call it only inside a computation over the slot state."""
        return short_conv(x, self.weights(), require_batch().ragged, self.state(x))

    def weights(self) -> ConvWeights:
        """Return weight, bias and options in the form that the ops take."""
        weight = self.weight.squeeze(1)
        if self.config.kernel < _LEAST_TAPS:
            weight = torch.cat((torch.zeros_like(weight).T, weight.T)).T  # in the layout of the other taps
        return ConvWeights(weight, self.bias, self.config.activation, self.config.residual)

    def state(self, x: Tensor | None = None) -> ConvState | None:
        """Return the state of this convolution in the current batch; None in a plain forward.

        Args:
            x: input of the convolution (T, channels); required if the state module is not `inline`.
        """
        return self.history.state_module.window(self.channels, x)
