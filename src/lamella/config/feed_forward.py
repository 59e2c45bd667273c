"""The channel-mixing parts of layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lamella.config.checks import check
from lamella.config.parts import CanonConfig

ACTIVATIONS = (
    *("silu", "gelu", "gelu_pytorch_tanh", "relu", "relu2", "sigmoid", "identity"),
    *("gelu_10", "hardswish", "laplace", "leaky_relu", "mish", "quick_gelu", "relu6", "sqrtsoftplus", "tanh"),
)


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
        """Canon convolutions inside the part."""
        return () if self.canon is None else (self.canon,)

    @property
    def is_swiglu(self) -> bool:
        """True for `silu(gate) * up`, which has kernels of its own."""
        return self.gated and self.activation == "silu"


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
    canons: ClassVar[tuple[CanonConfig, ...]] = ()

    def __post_init__(self) -> None:
        for field in ("num_experts", "top_k", "intermediate_size"):
            check(getattr(self, field) > 0, f"moe.{field}", getattr(self, field), "positive")
        check(self.top_k <= self.num_experts, "moe.top_k", self.top_k, f"at most num_experts={self.num_experts}")
        check(self.shared_size is None or self.shared_size > 0, "moe.shared_size", self.shared_size, "positive")


# What can stand as a layer's feed-forward. Other packages' configs stand beside this union, see `lamella.layers.build`.
FeedForwardConfig = MLPConfig | MoEConfig
