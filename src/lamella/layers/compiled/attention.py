"""Attention layers that differ in what they do by positions, made alike, so that one program computes them.

A form is a set of operations. A layer takes a form that covers its own operations: it gets parts for the others that
change no bit of its results, such as a rotation by zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.config import AttentionConfig, RopeConfig, TemperatureConfig
from lamella.layers.attention import Attention
from lamella.layers.norm import HeadNorm
from lamella.layers.rotary import Positions, Rotary, Temperature
from lamella.ops.operands import Rope


@dataclass(frozen=True)
class AttentionForm:
    """Operations of an attention layer on queries and keys between projection and attention.

    Attributes:
        pairs: pairs of channels that are rotated; 0 for no rotation.
        interleaved: whether a pair's channels are neighbours.
        eps: of the norm without a weight; None where there is no such norm.
        scales: whether queries are multiplied by a temperature.
    """

    pairs: int
    interleaved: bool
    eps: float | None
    scales: bool

    @classmethod
    def from_config(cls, config: AttentionConfig) -> AttentionForm:
        """Return the form of a layer's own operations."""
        return cls(
            pairs=config.rope.dim // 2 if config.rope else 0,
            interleaved=config.rope is not None and config.rope.interleaved,
            eps=config.qk_norm.eps if config.qk_norm and not config.qk_norm_weight else None,
            scales=config.temperature is not None,
        )

    def covers(self, other: AttentionForm) -> bool:
        """Return True if a layer of form `other` can run as this form.

        This form has every operation that `other` has, and its further operations can be made to change nothing.
        """
        rotates = other.pairs == 0 or (other.pairs, other.interleaved) == (self.pairs, self.interleaved)
        return rotates and other.eps in (None, self.eps) and other.scales <= self.scales

    def join(self, other: AttentionForm) -> AttentionForm | None:
        """Return the smallest form that covers both; None if there is none."""
        rotating = self if self.pairs else other
        eps = other.eps if self.eps is None else self.eps
        both = AttentionForm(rotating.pairs, rotating.interleaved, eps, self.scales or other.scales)
        return both if both.covers(self) and both.covers(other) else None


class SwitchedHeadNorm(HeadNorm):
    """A `HeadNorm` that a tensor switches on or off, so that layers with and without it are one program."""

    is_on: Tensor

    def __init__(self, size: int, eps: float, device: torch.device, is_on: bool) -> None:
        super().__init__(size, eps, device)
        self.register_buffer("is_on", torch.tensor(is_on, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (T, heads, size), or x."""
        return torch.where(self.is_on, super().forward(x), x)


def take_form(layer: Attention, form: AttentionForm) -> None:
    """Give a layer the operations of a form that covers its own. Its results stay the same, bit for bit."""
    own, device = AttentionForm.from_config(layer.config), next(layer.parameters()).device
    assert form.covers(own)
    if form.pairs and layer.rotary is None:
        layer.rotary = Rotary(RopeConfig(dim=2 * form.pairs, interleaved=form.interleaved), device)
        layer.rotary.key = f"identity of {form.pairs}, {form.interleaved}"
        layer.rotary.frequencies = torch.zeros_like(layer.rotary.frequencies)  # cos is 1 and sin is 0
    if form.scales and layer.temperature is None:
        layer.temperature = Temperature(TemperatureConfig(scale=0.0, floor_scale=1))  # 1 + 0 * log(...)
    if form.eps is not None:
        # Also where the layer has the norm: layers of one form have the same parts.
        layer.head_norm = SwitchedHeadNorm(layer.config.head_dim, form.eps, device, own.eps is not None)


class PositionInputs(NamedTuple):
    """Tensors that an attention layer computes from positions, as inputs of its program."""

    rope: Rope | None
    temperature: Tensor | None  # (T,) fp32

    @classmethod
    def from_layer(cls, layer: Attention, positions: Positions) -> PositionInputs:
        """Return a layer's, computed once for all layers alike."""
        return cls(
            None if layer.rotary is None else positions.rope(layer.rotary),
            None if layer.temperature is None else positions.temperature(layer.temperature),
        )


class GivenPositions(Positions):
    """Positions of one layer in its program: what would be computed from them is given."""

    def __init__(self, index: Tensor, inputs: PositionInputs | None) -> None:
        super().__init__(index)
        self._inputs = inputs

    def rope(self, rotary: Rotary) -> Rope:
        """Return the given rotation."""
        assert self._inputs is not None and self._inputs.rope is not None
        return self._inputs.rope

    def temperature(self, temperature: Temperature) -> Tensor:
        """Return the given factors."""
        assert self._inputs is not None and self._inputs.temperature is not None
        return self._inputs.temperature
