"""Rotary position embedding: frequencies of each variant, and the angles of a batch.

The variants follow `transformers`' modeling_rope_utils; everything is fp32, and no table bounds the positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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
    """Angle per position of each pair, (dim / 2,) fp32."""
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
    turns = scaling.original_length * base / (2 * math.pi)  # full turns within the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = (turns > high).float() if high == low else ((turns - low) / (high - low)).clamp(0, 1)
    return base * kept + base / scaling.factor * (1 - kept)


def _yarn(base: Tensor, config: RopeConfig, scaling: YarnScaling) -> Tensor:
    def pair_with_turns(turns: float) -> float:
        return config.dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with_turns(scaling.beta_fast), pair_with_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(config.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = (1 - ramp) * scaling.extrapolation_factor
    return base / scaling.factor * (1 - kept) + base * kept


class Rotary:
    """By which angles queries and keys are turned: those of their positions, or of these modulo a `period`."""

    def __init__(self, config: RopeConfig, device: torch.device, period: int | None = None) -> None:
        self.period = period
        self.key = repr((config, period))  # of two with equal keys the angles are the same
        scaling = config.scaling
        self.magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling | LongRopeScaling) else 1.0
        self.frequencies = inverse_frequencies(config).to(device)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin (T, dim / 2) fp32 of positions (T,)."""
        return angles(positions, self.frequencies, self.magnitude, self.period)


class Turn(NamedTuple):
    """What a step does to the queries and keys of an attention layer by their positions.

    A part that the layer lacks is None, or, where layers with and without it are computed as one, changes nothing.
    """

    rope: Rope | None
    scale: Tensor | None  # (T,) fp32, of queries
    normed: Tensor | None  # () bool: whether the norm without a weight counts; None: it does, where there is one


class Positions:
    """Where the tokens of a forward stand in their requests, and what follows of it, once for all layers alike."""

    def __init__(self, index: Tensor, turn: Turn | None = None) -> None:
        """index (T,), absolute; `turn` is the layer's, where that has been computed before."""
        self.index, self.turn = index, turn
        self._angles: dict[str, tuple[Tensor, Tensor]] = {}
        self._identities: dict[int, tuple[Tensor, Tensor]] = {}
        self._temperatures: dict[TemperatureConfig, Tensor] = {}

    def angles(self, rotary: Rotary) -> tuple[Tensor, Tensor]:
        """cos and sin (T, dim / 2) fp32."""
        if rotary.key not in self._angles:
            self._angles[rotary.key] = rotary.angles(self.index)
        return self._angles[rotary.key]

    def identity(self, pairs: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, pairs) fp32 of turning nothing, which leaves every bit as it is."""
        if pairs not in self._identities:
            ones = torch.ones(self.index.shape[0], pairs, device=self.index.device)
            self._identities[pairs] = ones, torch.zeros_like(ones)
        return self._identities[pairs]

    def temperature(self, config: TemperatureConfig) -> Tensor:
        """What queries are multiplied by, (T,) fp32."""
        if config not in self._temperatures:
            self._temperatures[config] = temperature(self.index, config.scale, config.floor_scale)
        return self._temperatures[config]

    def rows(self, index: Tensor) -> Positions:
        """Of some of the tokens, index (n,)."""
        return Positions(self.index[index])
