"""The channel-mixing part of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from lamella.config import MLPConfig
from lamella.distributed.sharding import Split
from lamella.layers.block_input import BlockInput
from lamella.layers.canon import Canon, CanonHistory
from lamella.layers.kit import Kit


class MLP(nn.Module):
    """`down(silu(gate) * up)`, with [gate|up] through a canon first where there is one."""

    def __init__(
        self,
        config: MLPConfig,
        kit: Kit,
        hidden_size: int,
        prefix: str,
        history: CanonHistory | None,
        reduce: bool = True,
    ) -> None:
        """Without `reduce` each rank gives its part of the sum, see `Kit.row_linear`."""
        super().__init__()
        size = config.intermediate_size
        channels = kit.share.even(size, "intermediate_size")
        parts = {"gate_proj": size, "up_proj": size}
        self.gate_up_proj = kit.merged_linear(hidden_size, parts, config.gate_up_bias, f"{prefix}.gate_up_proj")
        self.down_proj = kit.row_linear(size, hidden_size, config.down_bias, f"{prefix}.down_proj", reduce)
        self.canon = None
        if config.canon:
            assert history is not None
            self.canon = Canon(config.canon, Split.join((channels, channels)), kit, history, "feed_forward")

    def forward(self, entry: BlockInput) -> Tensor:
        """(T, hidden_size) -> (T, hidden_size)."""
        return self.down_proj(entry.project(self.gate_up_proj, self.canon, gated=True))
