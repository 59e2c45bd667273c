"""Dense feed-forward of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from lamella.config import MLPConfig
from lamella.layers.canon import build_canon
from lamella.layers.kit import Kit
from lamella.layers.short_conv import ConvHistory
from lamella.layers.sublayer_input import SublayerInput
from lamella.ops.activation import activate
from lamella.parallel.sharding import Split


class MLP(nn.Module):
    """Gated feed-forward `down(act(gate) * up)`, or `down(act(up))` if the config is not gated.

    If the config has a canon, it convolves [gate | up] before the activation.
    """

    def __init__(
        self,
        config: MLPConfig,
        kit: Kit,
        hidden_size: int,
        prefix: str,
        history: ConvHistory | None,
        reduce: bool = True,
    ) -> None:
        """Build the projections. Without `reduce` the output is this rank's partial sum, see `Kit.row_linear`."""
        super().__init__()
        self.config = config
        size = config.intermediate_size
        channels = kit.partition.even(size, "intermediate_size")
        parts = {"gate_proj": size, "up_proj": size} if config.gated else {"up_proj": size}
        self.gate_up_proj = kit.merged_linear(hidden_size, parts, config.gate_up_bias, f"{prefix}.gate_up_proj")
        self.down_proj = kit.row_linear(size, hidden_size, config.down_bias, f"{prefix}.down_proj", reduce)
        canon_channels = Split.join([channels] * len(parts))
        self.canon = build_canon(config.canon, canon_channels, kit, history, "feed_forward")

    def forward(self, entry: SublayerInput) -> Tensor:
        """Return the output (T, hidden_size) for an input (T, hidden_size)."""
        if self.config.is_swiglu:
            return self.down_proj(entry.project(self.gate_up_proj, self.canon, gated=True))
        projected = entry.project(self.gate_up_proj, self.canon)
        return self.down_proj(activate(projected, self.config.activation, self.config.gated))
