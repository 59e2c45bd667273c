"""Configs of components that occur at several places of a layer: norms and short convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Normalization with a learned weight.

    Attributes:
        eps: added to the mean square or variance.
        kind: "rms" (root mean square), or "layer" (mean and variance, with a learned bias).
    """

    eps: float
    kind: str = "rms"

    def __post_init__(self) -> None:
        check(self.eps >= 0, "norm.eps", self.eps, "not negative")
        check(self.kind in ("rms", "layer"), "norm.kind", self.kind, "rms or layer")


@dataclass(frozen=True, kw_only=True)
class CanonConfig:
    """Canon layer (arXiv 2512.17351): causal depthwise convolution, `y = x + act(bias + conv(x))`.

    Attributes:
        kernel: width in tokens.
        bias: True if the convolution has a bias.
        activation: True for SiLU as `act`, False for the identity.
        residual: True if `x` is added.
    """

    kernel: int = 4
    bias: bool = False
    activation: bool = False
    residual: bool = True

    def __post_init__(self) -> None:
        check(self.kernel >= 1, "canon.kernel", self.kernel, "at least 1")
