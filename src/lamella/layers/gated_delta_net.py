"""Gated delta net mixer (GDN)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lamella.config import CanonConfig, GatedDeltaNetConfig
from lamella.layers.context import require_batch
from lamella.layers.kit import Kit
from lamella.layers.norm import RMSNorm
from lamella.layers.parameters import ParameterLayout
from lamella.layers.recurrent import RecurrentMixer, fp32_parameter
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ShortConv
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.delta_rule import delta_rule
from lamella.ops.gated_rms_norm import gated_rms_norm
from lamella.parallel.sharding import Split

# `softplus` maps these bounds to step sizes of 0.001 and 0.1: the range at the start of training.
STEP_BIAS = (math.log(math.expm1(1e-3)), math.log(math.expm1(1e-1)))


class GatedDeltaNet(RecurrentMixer):
    """Gated delta net.

    In order: projection to [q | k | v | z | beta | decay], convolution of [q | k | v], delta rule, RMS norm gated by z,
    output projection.
    """

    def __init__(self, config: GatedDeltaNetConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__(config.kernel)
        self.config = config
        keys, values = (
            kit.partition.even(config.key_heads, "key_heads"),
            kit.partition.even(config.value_heads, "value_heads"),
        )
        key_channels, value_channels = keys.times(config.key_head_dim), values.times(config.value_head_dim)
        self.qkvzba_proj = kit.merged_linear(
            hidden_size,
            {
                "in_proj_qkvz": (config.key_size, config.key_size, config.value_size, config.value_size),
                "in_proj_ba": (config.value_heads, config.value_heads),
            },
            False,
            f"{prefix}.qkvzba_proj",
        )
        self.out_proj = kit.row_linear(config.value_size, hidden_size, False, f"{prefix}.out_proj")
        convolved = Split.join((key_channels, key_channels, value_channels))
        shape = CanonConfig(kernel=config.kernel, activation=True, residual=False)
        self.convolution = ShortConv(shape, convolved, kit, self.history)
        self.A_log, self.dt_bias = (fp32_parameter(values.size, kit) for _ in "Ad")
        self.layouts = {
            "A_log": ParameterLayout((values,), initial=(0.0, math.log(16))),
            "dt_bias": ParameterLayout((values,), initial=STEP_BIAS),
        }
        self.norm = RMSNorm(config.value_head_dim, config.norm.eps, kit.device)
        self.sizes = (convolved.size, value_channels.size, values.size, values.size)
        self.qkv_sizes = (key_channels.size, key_channels.size, value_channels.size)
        matrix = (values.size, config.key_head_dim, config.value_head_dim)
        self.declare(kit, f"{prefix}.state", matrix)

    @property
    def output(self) -> nn.Module:
        """The projection that follows `core`."""
        return self.out_proj

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the inputs of `core` on this rank."""
        return (sum(self.sizes),)

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        return self.out_proj(self.run((entry.project(self.qkvzba_proj),), self.sizes[1]))

    def core(self, projected: Tensor, out: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return the gated output (T, width) of the convolution and the recurrence; write it to `out` if given."""
        qkv, z, beta, decay = projected.split(self.sizes, -1)
        q, k, v = self.convolution(qkv).split(self.qkv_sizes, -1)
        key_dim, value_dim = self.config.key_head_dim, self.config.value_head_dim
        mixed = delta_rule(
            q.unflatten(-1, (-1, key_dim)),
            k.unflatten(-1, (-1, key_dim)),
            v.unflatten(-1, (-1, value_dim)),
            decay,
            beta,
            self.A_log,
            self.dt_bias,
            require_batch().ragged,
            self.state(),
        )
        y = gated_rms_norm(mixed, z.unflatten(-1, (-1, value_dim)), self.norm.weight, self.norm.eps, "silu").flatten(1)
        return y if out is None else out.copy_(y)
