"""Rotary position embedding (RoPE): frequencies of each scaling variant, and cos/sin of a batch.

The variants follow `transformers.modeling_rope_utils`. All values are fp32. cos and sin are computed per step rather
than read from a table, so positions have no upper bound.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lamella.config import (
    DynamicScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    TemperatureConfig,
    YarnScaling,
)
from lamella.ops.operands import Rope
from lamella.ops.rotary import angles, temperature


def inverse_frequencies(config: RopeConfig) -> Tensor:
    """Return the RoPE frequencies, (dim / 2,) fp32: the rotation angle per position of each channel pair."""
    scaling = config.scaling
    if isinstance(scaling, DynamicScaling):
        return _frequencies(config.dim, _dynamic_theta(config, scaling))
    base = _frequencies(config.dim, config.theta)
    if scaling is None:
        return base
    if isinstance(scaling, Llama3Scaling):
        return _llama3(base, scaling)
    if isinstance(scaling, YarnScaling):
        return _yarn(base, config, scaling)
    if isinstance(scaling, LongRopeScaling):
        return 1.0 / (torch.tensor(scaling.factors) * config.theta ** _exponents(config.dim))
    return base / scaling.factor


def _exponents(dim: int) -> Tensor:
    return torch.arange(0, dim, 2, dtype=torch.float32) / dim


def _frequencies(dim: int, theta: float) -> Tensor:
    return 1.0 / theta ** _exponents(dim)


def _dynamic_theta(config: RopeConfig, scaling: DynamicScaling) -> float:
    length = max(scaling.length, scaling.original_length)
    stretch = scaling.factor * length / scaling.original_length - (scaling.factor - 1)
    return config.theta * stretch ** (config.dim / (config.dim - 2))


def _llama3(base: Tensor, scaling: Llama3Scaling) -> Tensor:
    rotations = scaling.original_length * base / (2 * math.pi)  # within the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (rotations > high).float() if high == low else ((rotations - low) / (high - low)).clamp(0, 1)
    return base * kept + base / scaling.factor * (1 - kept)


def _yarn(base: Tensor, config: RopeConfig, scaling: YarnScaling) -> Tensor:
    def pair_with_rotations(rotations: float) -> float:
        return config.dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with_rotations(scaling.beta_fast), pair_with_rotations(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(config.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = (1 - ramp) * scaling.extrapolation_factor
    return base / scaling.factor * (1 - kept) + base * kept


class Rotary:
    """Rotary embedding of one layer.

    Attributes:
        period: positions are taken modulo this number before the rotation; None for absolute positions.
        key: identifies the angles; two layers with equal keys have equal cos and sin.
        frequencies: (dim / 2,) fp32, rotation angle per position of each channel pair.
        magnitude: factor of cos and sin (YaRN's and LongRoPE's attention factor).
        interleaved: True if a pair is channels (2i, 2i + 1), False if it is (i, i + dim / 2).
    """

    def __init__(self, config: RopeConfig, device: torch.device, period: int | None = None) -> None:
        self.period = period
        self.key = repr((config, period))
        scaling = config.scaling
        self.magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
        self.frequencies = inverse_frequencies(config).to(device)
        self.interleaved = config.interleaved

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin, (T, dim / 2) fp32 each, of positions (T,)."""
        return angles(positions, self.frequencies, self.magnitude, self.period)


class Temperature:
    """Position-dependent factors of the queries, see `ops.rotary.temperature`.

    Attributes:
        key: identifies the factors; two layers with equal keys have equal factors.
    """

    def __init__(self, config: TemperatureConfig) -> None:
        self.key = self.scale, self.floor_scale = config.scale, config.floor_scale

    def factors(self, positions: Tensor) -> Tensor:
        """Return the factors (T,) fp32 at positions (T,)."""
        return temperature(positions, self.scale, self.floor_scale)


class Positions:
    """Positions of the tokens of one forward, with cos/sin and temperatures cached across layers."""

    def __init__(self, index: Tensor) -> None:
        """Start with empty caches; `index` (T,) holds the absolute positions."""
        self.index = index
        self._ropes: dict[str, Rope] = {}
        self._temperatures: dict[tuple[float, int], Tensor] = {}

    def rope(self, rotary: Rotary) -> Rope:
        """Return cos and sin of the tokens; layers with equal keys share one computation."""
        if rotary.key not in self._ropes:
            self._ropes[rotary.key] = Rope(*rotary.angles(self.index), rotary.interleaved)
        return self._ropes[rotary.key]

    def temperature(self, temperature: Temperature) -> Tensor:
        """Return the factors of the queries, (T,) fp32; layers with equal keys share one computation."""
        if temperature.key not in self._temperatures:
            self._temperatures[temperature.key] = temperature.factors(self.index)
        return self._temperatures[temperature.key]

    def rows(self, index: Tensor) -> Positions:
        """Return the positions of the tokens `index` (n,), with empty caches."""
        return Positions(self.index[index])
