"""Mamba mixer, in the form that attention layers are distilled into: x and B have grouped heads."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lamella.config import CanonConfig, MambaConfig
from lamella.layers.context import require_batch
from lamella.layers.gated_delta_net import STEP_BIAS
from lamella.layers.kit import Kit
from lamella.layers.parameters import ParameterLayout
from lamella.layers.recurrent import RecurrentMixer, fp32_parameter
from lamella.layers.rotary import Positions
from lamella.layers.short_conv import ShortConv
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.selective_scan import selective_scan


class Mamba(RecurrentMixer):
    """Mamba mixer.

    In order: projection to [z | x | B | C], step sizes by a low-rank projection, convolution of x, selective scan,
    gate, output projection. Heads of x and B are repeated like key/value heads in grouped-query attention.
    """

    def __init__(self, config: MambaConfig, kit: Kit, hidden_size: int, prefix: str) -> None:
        super().__init__(config.kernel)
        self.config = config
        state, bias = config.state_size, config.linear_bias
        heads, groups = kit.partition.even(config.heads, "heads"), kit.partition.even(config.kv_heads, "kv_heads")
        inner, narrow = heads.times(state), groups.times(state)
        sections = (config.inner_size, config.kv_size, config.kv_size, config.inner_size)
        self.in_proj = kit.merged_linear(hidden_size, {"in_proj": sections}, bias, f"{prefix}.in_proj")
        self.step_in_proj = kit.replicated_linear(
            hidden_size, {"dt_in_proj": config.dt_rank}, bias, f"{prefix}.step_in_proj"
        )
        # The scan adds the bias of this projection in fp32.
        self.step_proj = kit.merged_linear(config.dt_rank, {"dt_proj": config.inner_size}, False, f"{prefix}.step_proj")
        self.out_proj = kit.row_linear(config.inner_size, hidden_size, bias, f"{prefix}.out_proj")
        shape = CanonConfig(kernel=config.kernel, bias=config.conv_bias, activation=True, residual=False)
        convolved = inner if config.repeat_before_conv else narrow
        self.conv1d = ShortConv(shape, convolved, kit, self.history)
        self.A_log, self.D = fp32_parameter((inner.size, state), kit), fp32_parameter(inner.size, kit)
        self.step_bias = fp32_parameter(inner.size, kit) if config.dt_bias else None
        self.layouts = {
            "A_log": ParameterLayout((inner,), initial=(0.0, math.log(state))),
            "D": ParameterLayout((inner,), initial=(1.0, 1.0)),
            "step_bias": ParameterLayout((inner,), initial=STEP_BIAS),
        }
        self.sizes = (inner.size, narrow.size, narrow.size, inner.size)
        self.declare(kit, f"{prefix}.state", (heads.size, state, state))

    @property
    def output(self) -> nn.Module:
        """The projection that follows `core`."""
        return self.out_proj

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the inputs of `core` on this rank."""
        return (sum(self.sizes), self.sizes[0])

    def forward(self, positions: Positions, entry: SublayerInput) -> Tensor:
        """Return the output of the mixer (T, hidden_size) for an input (T, hidden_size)."""
        x = entry.tensor()
        steps = self.step_proj(self.step_in_proj(x))
        return self.out_proj(self.run((self.in_proj(x), steps), self.sizes[0]))

    def core(self, projected: Tensor, steps: Tensor, out: Tensor | None) -> Tensor:  # type: ignore[override]
        """Return the gated output (T, width) of the convolution and the recurrence; write it to `out` if given."""
        state, repeats = self.config.state_size, self.config.heads // self.config.kv_heads

        def by_head(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, state))

        z, x, b, c = projected.split(self.sizes, -1)
        if self.config.repeat_before_conv and repeats > 1:
            x = by_head(x).repeat_interleave(repeats, 1).flatten(1)
        # Twice the bias: the training code adds it in the projection and again in the scan.
        bias = None if self.step_bias is None else by_head(2 * self.step_bias)
        y = selective_scan(
            by_head(self.conv1d(x)),
            by_head(steps),
            by_head(b),
            by_head(c),
            by_head(z),
            self.A_log.unflatten(0, (-1, state)),
            bias,
            by_head(self.D),
            require_batch().ragged,
            self.state(),
        ).flatten(1)
        return y if out is None else out.copy_(y)
