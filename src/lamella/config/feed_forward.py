"""The channel-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lamella.config.checks import check
from lamella.config.parts import CanonConfig

if TYPE_CHECKING:
    from lamella.layers.feed_forward import MLP
    from lamella.layers.kit import Kit
    from lamella.layers.short_conv import ConvHistory


ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "identity")


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Feed-forward `down(act(gate(x)) * up(x))`, or `down(act(up(x)))` where not `gated`; SwiGLU by default.

    With an optional canon over [gate|up].
    """

    intermediate_size: int
    gated: bool = True
    activation: str = "silu"
    gate_up_bias: bool = False
    down_bias: bool = False
    canon: CanonConfig | None = None

    def __post_init__(self) -> None:
        check(self.intermediate_size > 0, "mlp.intermediate_size", self.intermediate_size, "positive")
        check(self.activation in ACTIVATIONS, "mlp.activation", self.activation, f"one of {', '.join(ACTIVATIONS)}")

    @property
    def canons(self) -> tuple[CanonConfig, ...]:
        return () if self.canon is None else (self.canon,)

    @property
    def is_swiglu(self) -> bool:
        return self.gated and self.activation == "silu"

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: ConvHistory | None) -> MLP:
        """The module; `history` holds what the layer's canon convolutions remember."""
        from lamella.layers.feed_forward import MLP

        return MLP(self, kit, hidden_size, prefix, history)


# What can stand as a layer's feed-forward. Later kinds join this union and bring their own `build`.
FeedForwardConfig = MLPConfig
