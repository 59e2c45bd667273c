"""Canon layers: short causal convolutions with a skip connection."""

from __future__ import annotations

from torch import Tensor

from lamella.config import CanonConfig
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.layers.norm import LayerNorm, RMSNorm
from lamella.layers.short_conv import ConvHistory, ShortConv
from lamella.layers.state_modules import Computation
from lamella.ops.backend import use_fused
from lamella.ops.operands import ConvStep, ResidualNorm
from lamella.ops.short_conv import norm_short_conv, short_conv, short_conv_swiglu
from lamella.ops.swiglu import swiglu
from lamella.parallel.sharding import Split


class Canon(ShortConv):
    """Canon convolution over the channels of this rank.

    It runs alone, fused into the projection before it, or fused with the norm before it.

    Attributes:
        part: name of the convolution; unique among the convolutions that share the layer's history.
    """

    def __init__(self, config: CanonConfig, channels: Split, kit: Kit, history: ConvHistory, part: str) -> None:
        computations: dict[str, Computation] = {
            part: self._convolve, f"{part}.swiglu": self._convolve_and_gate, f"{part}.after_norm": self._after_norm
        }  # fmt: skip
        super().__init__(config, channels, kit, history, computations, is_whole_state=True)
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (T, channels) over time; return (T, channels)."""
        return self.history.state_module.run(self.part, (x,), self.size)

    def swiglu(self, x: Tensor) -> Tensor:
        """Convolve x = [gate | up] (T, channels); return `silu(gate) * up` of the result, (T, channels / 2)."""
        if self.history.state_module.inline and not use_fused(x):
            return swiglu(self(x))
        return self.history.state_module.run(f"{self.part}.swiglu", (x,), self.size // 2)

    def after_norm(self, x: Tensor, residual: Tensor, norm: RMSNorm | LayerNorm) -> tuple[Tensor, Tensor]:
        """Return the convolution of `norm(x + residual)`, and the sum `x + residual`; both (T, channels)."""
        state_module = self.history.state_module
        if isinstance(norm, RMSNorm):
            if not state_module.inline:
                return state_module.run_after_norm(self.part, x, residual, norm.weight, norm.eps)
            if use_fused(x) and not norm.round_twice and not require_batch().snapshots:
                # `early` is safe: slots and positions are written at the start of the step, before any layer runs.
                step = ResidualNorm(residual, norm.weight, norm.eps)
                return norm_short_conv(x, step, self.weights(), require_batch().ragged, self.state(), early=True)
        normed, total = norm(x, residual)
        return self(normed), total

    @property
    def is_step(self) -> bool:
        """True if every request of the current batch has slot state and exactly one new token."""
        batch = require_batch()
        return batch.slots is not None and batch.ragged.num_decodes == batch.ragged.num_requests

    def step(self) -> ConvStep:
        """Return the operands with which a larger kernel computes the convolution. Needs `is_step`."""
        state = self.state()
        assert state is not None
        return ConvStep(self.weights(), state, require_batch().ragged.positions)

    def _convolve(self, x: Tensor, out: Tensor | None) -> Tensor:
        return short_conv(x, self.weights(), require_batch().ragged, self.state(x), out)

    def _convolve_and_gate(self, x: Tensor, out: Tensor | None) -> Tensor:
        return short_conv_swiglu(x, self.weights(), require_batch().ragged, self.state(x), out)

    def _after_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, total: Tensor
    ) -> tuple[Tensor, Tensor]:
        norm = ResidualNorm(residual, weight, eps)
        return norm_short_conv(x, norm, self.weights(), require_batch().ragged, self.state(), out, total)


def build_canon(
    config: CanonConfig | None, channels: Split, kit: Kit, history: ConvHistory | None, part: str
) -> Canon | None:
    """Build the canon of one part of a layer.

    Args:
        config: config of the canon; None if the part has none.
        channels: channels of the convolved tensor, as divided over the ranks.
        kit: builds the slot state.
        history: state of the layer's convolutions; not None if any part of the layer has a canon.
        part: name of the part, unique in the layer.

    Returns:
        The convolution, or None if `config` is None.
    """
    if config is None:
        return None
    assert history is not None, "a layer with a canon needs a ConvHistory"
    return Canon(config, channels, kit, history, part)
