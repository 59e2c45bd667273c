"""Parts that a layer has in several places: norms and short convolutions."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Normalisation with a learned weight.

    The `kind` is "rms", by the root mean square, or "layer", by mean and variance, which has a bias too.
    """

    eps: float
    kind: str = "rms"

    def __post_init__(self) -> None:
        check(self.eps >= 0, "norm.eps", self.eps, "not negative")
        check(self.kind in ("rms", "layer"), "norm.kind", self.kind, "rms or layer")


@dataclass(frozen=True, kw_only=True)
class CanonConfig:
    """Canon layer (arXiv 2512.17351): a causal depthwise convolution of width `kernel`.

    `y = [residual] x + act(bias + conv(x))`, with SiLU as act when `activation`.
    """

    kernel: int = 4
    bias: bool = False
    activation: bool = False
    residual: bool = True

    def __post_init__(self) -> None:
        check(self.kernel >= 1, "canon.kernel", self.kernel, "at least 1")
