"""Rotary position embedding and its scalings."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Positions divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check(self.factor > 0, "rope.factor", self.factor, "positive")


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware base change for contexts of `length` tokens, beyond the trained `original_length`.

    The rotation of a cached key cannot change afterwards, so `length` is chosen once, when the model is built (an
    engine takes its `max_model_len`), and not per request as in `transformers`. Up to the trained length it is the
    unscaled rotation.
    """

    factor: float
    original_length: int
    length: int

    def __post_init__(self) -> None:
        check(self.factor >= 1, "rope.factor", self.factor, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's "NTK by parts": long wavelengths divided by `factor`, short ones kept, a blend between.

    `low_freq_factor == high_freq_factor` (Llama 4 Scout) is a step instead of a blend.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self) -> None:
        check(self.factor > 0, "rope.factor", self.factor, "positive")
        check(
            self.low_freq_factor <= self.high_freq_factor,
            "rope.low_freq_factor",
            self.low_freq_factor,
            f"at most high_freq_factor={self.high_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): a blend by dimension, and cos/sin multiplied by `attention_factor`."""

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    extrapolation_factor: float = 1.0  # weight of the unscaled rotation in the blend

    def __post_init__(self) -> None:
        for field in ("factor", "beta_fast", "beta_slow"):
            check(getattr(self, field) > 0, f"rope.{field}", getattr(self, field), "positive")


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): a factor for each pair, and cos/sin multiplied by `attention_factor`.

    A file has two lists of factors, for contexts up to the trained length and beyond. Like the length of
    `DynamicScaling`, the list is chosen once, when the model is built, and not per request as in `transformers`.
    """

    factors: tuple[float, ...]
    attention_factor: float

    def __post_init__(self) -> None:
        check(all(factor > 0 for factor in self.factors), "rope.factors", self.factors, "positive")
        check(self.attention_factor > 0, "rope.attention_factor", self.attention_factor, "positive")


RopeScaling = LinearScaling | DynamicScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of the first `dim` channels of each head.

    `interleaved` rotates the pairs (2i, 2i+1), otherwise the pairs are (i, i + dim/2).
    """

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        check(self.dim > 0 and self.dim % 2 == 0, "rope.dim", self.dim, "a positive even number")
        check(self.theta > 0, "rope.theta", self.theta, "positive")
        yarn = isinstance(self.scaling, YarnScaling)
        check(not yarn or self.theta > 1, "rope.theta", self.theta, "more than 1 for yarn scaling")
        dynamic = isinstance(self.scaling, DynamicScaling)
        if isinstance(self.scaling, LongRopeScaling):
            count = len(self.scaling.factors)
            check(count == self.dim // 2, "rope.factors", count, f"as many as pairs of channels, {self.dim // 2}")
        check(not dynamic or self.dim > 2, "rope.dim", self.dim, "more than 2 for dynamic scaling")
