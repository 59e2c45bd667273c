"""The channel-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lamella.config.checks import check
from lamella.config.parts import CanonConfig

if TYPE_CHECKING:
    from lamella.layers.canon import CanonHistory
    from lamella.layers.feed_forward import MLP
    from lamella.layers.kit import Kit
    from lamella.layers.moe import MoE


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


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts, of which each token has some, as in Llama 4: `shared(x) + sum of expert_e(w_e x)`.

    A token's experts are the `top_k` of the largest router logits, and w_e is the sigmoid of the logit, of each by
    itself. It weighs what enters the expert: a gated expert is not homogeneous, so weighing what comes out would be
    another model. Experts are SwiGLU of width `intermediate_size`, and so is the one that all tokens share, of width
    `shared_size` where there is one.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_size: int | None = None

    canon: ClassVar[None] = None  # no convolution inside

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "intermediate_size"):
            check(getattr(self, field) > 0, f"moe.{field}", getattr(self, field), "positive")
        check(self.top_k <= self.num_experts, "moe.top_k", self.top_k, f"at most num_experts={self.num_experts}")
        check(self.shared_size is None or self.shared_size > 0, "moe.shared_size", self.shared_size, "positive")

    def build(self, kit: Kit, hidden_size: int, prefix: str, history: CanonHistory | None) -> MoE:
        """The module; there is no convolution in it that `history` could be for."""
        from lamella.layers.moe import MoE

        return MoE(self, kit, hidden_size, prefix)


# What can stand as a layer's feed-forward. Later kinds join this union and bring their own `build`.
FeedForwardConfig = MLPConfig | MoEConfig
