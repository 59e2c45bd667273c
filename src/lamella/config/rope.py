"""Configs of rotary position embedding (RoPE) and its scalings."""

from __future__ import annotations

from dataclasses import dataclass

from lamella.config.checks import check


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: positions are divided by `factor`."""

    factor: float

    def __post_init__(self) -> None:
        check(self.factor > 0, "rope.factor", self.factor, "positive")


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """NTK-aware change of the base for contexts longer than the trained length.

    The rotation of a cached key cannot change later. So `length` is fixed when the model is built, to the engine's
    `max_model_len`, and not chosen per request as in `transformers`. Up to `original_length` the rotation is unscaled.

    Attributes:
        factor: scaling factor.
        original_length: trained length in tokens.
        length: context length in tokens.
    """

    factor: float
    original_length: int
    length: int

    def __post_init__(self) -> None:
        check(self.factor >= 1, "rope.factor", self.factor, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's "NTK by parts": low frequencies are divided by `factor`, high ones kept, those between blended.

    With `low_freq_factor == high_freq_factor` (Llama 4 Scout) there is a step instead of a blend.

    Attributes:
        factor: divisor of low frequencies.
        low_freq_factor: wavelengths longer than `original_length / low_freq_factor` are scaled.
        high_freq_factor: wavelengths shorter than `original_length / high_freq_factor` are kept.
        original_length: trained length in tokens.
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
    """YaRN (arXiv 2309.00071): a blend of scaled and unscaled frequencies by channel.

    Attributes:
        factor: divisor of scaled frequencies.
        original_length: trained length in tokens.
        attention_factor: factor of cos and sin.
        beta_fast: rotations over the trained length above which frequencies are kept.
        beta_slow: rotations over the trained length below which frequencies are scaled.
        truncate: True to round the limits of the blend to whole channels.
        extrapolation_factor: weight of the unscaled frequencies in the blend.
    """

    factor: float
    original_length: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    extrapolation_factor: float = 1.0

    def __post_init__(self) -> None:
        for field in ("factor", "beta_fast", "beta_slow"):
            check(getattr(self, field) > 0, f"rope.{field}", getattr(self, field), "positive")


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): one divisor per frequency.

    A file has two lists of divisors, for contexts up to the trained length and for longer ones. As with
    `DynamicScaling`, the list is chosen when the model is built, not per request as in `transformers`.

    Attributes:
        factors: divisor of each frequency.
        attention_factor: factor of cos and sin.
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

    Attributes:
        dim: number of rotated channels; even.
        theta: base of the frequencies.
        interleaved: True to rotate channel pairs (2i, 2i + 1), False for pairs (i, i + dim / 2).
        scaling: change of the frequencies for longer contexts; None: no change.
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
