"""Configs of feed-forward parts."""

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
    """Feed-forward `down(act(gate(x)) * up(x))`, by default SwiGLU; `down(act(up(x)))` if not `gated`.

    Attributes:
        intermediate_size: channels between the projections.
        gated: True if there is a gate projection.
        activation: one of `ACTIVATIONS`.
        gate_up_bias: True if gate and up projections have a bias.
        down_bias: True if the down projection has a bias.
        canon: convolution over [gate|up] ("canon D"); None: no convolution.
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
        """Canon convolutions inside the feed-forward."""
        return () if self.canon is None else (self.canon,)

    @property
    def is_swiglu(self) -> bool:
        """True for `silu(gate) * up`, which has its own kernels."""
        return self.gated and self.activation == "silu"


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts as in Llama 4: `shared(x) + sum of expert_e(w_e x)` over the token's `top_k` experts.

    The experts of a token have its `top_k` largest router logits. w_e is the sigmoid of expert e's logit, without
    normalization over experts. It scales the input of the expert, not its output: a gated expert is not homogeneous, so
    the two differ. All experts are SwiGLU.

    Attributes:
        num_experts: number of routed experts.
        top_k: routed experts per token.
        intermediate_size: width of a routed expert.
        shared_size: width of the expert that all tokens use; None: no shared expert.
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


# Feed-forwards of this package. Other packages can define their own configs, see `lamella.layers.build`.
FeedForwardConfig = MLPConfig | MoEConfig
