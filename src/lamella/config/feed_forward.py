"""The channel-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.config.checks import check
from lamella.config.parts import CanonConfig

if TYPE_CHECKING:
    from lamella.layers.canon import CanonHistory
    from lamella.layers.feed_forward import MLP
    from lamella.layers.kit import Kit


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """SwiGLU feed-forward: `down(silu(gate(x)) * up(x))`, with an optional canon over [gate|up]."""

    intermediate_size: int
    gate_up_bias: bool = False
    down_bias: bool = False
    canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        check(self.intermediate_size > 0, "mlp.intermediate_size", self.intermediate_size, "positive")

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None) -> MLP:
        """The module; `history` holds what the layer's canon convolutions remember."""
        from lamella.layers.feed_forward import MLP

        return MLP(self, kit, hidden_size, prefix, history)


# What can stand as a layer's feed-forward. Later kinds join this union and bring their own `build`.
FeedForwardConfig = MLPConfig
