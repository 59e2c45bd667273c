"""Kimi delta attention mixer (KDA)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lamella.config import CanonConfig, KimiDeltaConfig
from lamella.layers.context import require_batch
from lamella.layers.gated_delta_net import STEP_BIAS
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm
from lamella.layers.parameters import ParameterLayout
from lamella.layers.recurrent import RecurrentMixer, fp32_parameter
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ShortConv
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.delta_rule import delta_rule
from lamella.ops.gated_rms_norm import gated_rms_norm


class KimiDelta(RecurrentMixer):
    """Kimi delta attention.

    In order: projection to [q | k | v | beta], low-rank projections to decay and gate, convolution of [q | k | v],
    delta rule with one decay per key channel, gated RMS norm, output projection.
    """

    def __init__(self, config: KimiDeltaConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__(config.kernel)
        self.config = config
        heads = kit.partition.even(config.num_heads, "heads")
        channels, size, dim = heads.times(config.head_dim), config.size, config.head_dim
        qkv = {"q_proj": size, "k_proj": size, "v_proj": size}
        self.qkvb_proj = kit.merged_linear(
            hidden_size, {**qkv, "beta_proj": config.num_heads}, False, f"{prefix}.qkvb_proj"
        )
        low = {"f_a_proj": dim, "g_a_proj": dim}
        self.low_proj = kit.replicated_linear(hidden_size, low, False, f"{prefix}.low_proj")
        self.decay_proj = kit.merged_linear(dim, {"f_b_proj": size}, False, f"{prefix}.decay_proj")
        self.gate_proj = kit.merged_linear(dim, {"g_b_proj": size}, False, f"{prefix}.gate_proj")
        self.o_proj = kit.row_linear(size, hidden_size, False, f"{prefix}.o_proj")
        shape = CanonConfig(kernel=config.kernel, activation=True, residual=False)
        convs = {"q_conv": channels, "k_conv": channels, "v_conv": channels}
        self.convolution = ShortConv(shape, convs, kit, self.history)
        self.A_log, self.dt_bias = fp32_parameter(heads.size, kit), fp32_parameter(channels.size, kit)
        self.layouts = {
            "A_log": ParameterLayout((heads,), initial=(0.0, math.log(16))),
            "dt_bias": ParameterLayout((channels,), initial=STEP_BIAS),
        }
        self.norm = RMSNorm(dim, config.norm.eps, kit.device)
        self.sizes = (3 * channels.size, heads.size)
        self.declare(kit, f"{prefix}.state", (heads.size, dim, dim))

    @property
    def output(self) -> nn.Module:
        """The projection that follows `core`."""
        return self.o_proj

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the inputs of `core` on this rank."""
        return (sum(self.sizes), self.sizes[0] // 3, self.sizes[0] // 3)

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        x, dim = entry.tensor(), self.config.head_dim
        decay, gate = self.low_proj(x).split(dim, -1)
        inputs = (self.qkvb_proj(x), self.decay_proj(decay), self.gate_proj(gate))
        return self.o_proj(self.run(inputs, self.sizes[0] // 3))

    def core(self, projected: Tensor, decay: Tensor, gate: Tensor, out: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return the gated output (T, width) of the convolution and the recurrence; write it to `out` if given."""

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, self.config.head_dim))

        qkv, beta = projected.split(self.sizes, -1)
        q, k, v = map(by_head, self.convolution(qkv).chunk(3, -1))
        bias = by_head(self.dt_bias)
        mixed = delta_rule(q, k, v, by_head(decay), beta, self.A_log, bias, require_batch().ragged, self.state())
        y = gated_rms_norm(mixed, by_head(gate), self.norm.weight, self.norm.eps, self.config.gate).flatten(1)
        return y if out is None else out.copy_(y)
