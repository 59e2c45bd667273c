"""Unify attention layers that differ only in position-dependent operations, so that one program serves them all.

A form is a set of operations. A layer can run as any form that covers its own operations: the extra operations become
exact no-ops, such as a rotation by angle zero, and the results stay bitwise equal.
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
        pairs: number of channel pairs that are rotated; 0 for no rotation.
        interleaved: True if a pair is channels (2i, 2i + 1), False if it is (i, i + pairs).
        eps: epsilon of the head norm without a weight; None if there is no such norm.
        scales: whether queries are multiplied by a position-dependent temperature.
    """

    pairs: int
    interleaved: bool
    eps: float | None
    scales: bool

    @classmethod
    def from_config(cls, config: AttentionConfig) -> AttentionForm:
        """Return the form that contains exactly the operations of a config."""
        return cls(
            pairs=config.rope.dim // 2 if config.rope else 0,
            interleaved=config.rope is not None and config.rope.interleaved,
            eps=config.qk_norm.eps if config.qk_norm and not config.qk_norm_weight else None,
            scales=config.temperature is not None,
        )

    def covers(self, other: AttentionForm) -> bool:
        """Return True if a layer of form `other` can run as this form.

        This form has every operation that `other` needs, and its extra operations can be made no-ops.
        """
        rotates = other.pairs == 0 or (other.pairs, other.interleaved) == (self.pairs, self.interleaved)
        return rotates and other.eps in (None, self.eps) and other.scales <= self.scales

    def join(self, other: AttentionForm) -> AttentionForm | None:
        """Return the smallest form that covers both forms; None if no form does."""
        rotating = self if self.pairs else other
        eps = other.eps if self.eps is None else self.eps
        both = AttentionForm(rotating.pairs, rotating.interleaved, eps, self.scales or other.scales)
        return both if both.covers(self) and both.covers(other) else None


class SwitchedHeadNorm(HeadNorm):
    """`HeadNorm` that a tensor turns on or off, so that layers with and without the norm share one program."""

    is_on: Tensor

    def __init__(self, size: int, eps: float, device: torch.device, is_on: bool) -> None:
        super().__init__(size, eps, device)
        self.register_buffer("is_on", torch.tensor(is_on, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of x (T, heads, size) if `is_on`, otherwise x."""
        return torch.where(self.is_on, super().forward(x), x)


def apply_form(layer: Attention, form: AttentionForm) -> None:
    """Add no-op operations to a layer until it has all operations of `form`. Results stay bitwise equal.

    Args:
        layer: changed in place.
        form: must cover the layer's own form.
    """
    own, device = AttentionForm.from_config(layer.config), next(layer.parameters()).device
    assert form.covers(own)
    if form.pairs and layer.rotary is None:
        layer.rotary = Rotary(RopeConfig(dim=2 * form.pairs, interleaved=form.interleaved), device)
        layer.rotary.key = f"identity of {form.pairs}, {form.interleaved}"
        layer.rotary.frequencies = torch.zeros_like(layer.rotary.frequencies)  # cos is 1 and sin is 0
    if form.scales and layer.temperature is None:
        layer.temperature = Temperature(TemperatureConfig(scale=0.0, floor_scale=1))  # 1 + 0 * log(...)
    if form.eps is not None:
        # Replace the layer's own norm too: layers of one form must have the same module types.
        layer.head_norm = SwitchedHeadNorm(layer.config.head_dim, form.eps, device, own.eps is not None)


class PositionInputs(NamedTuple):
    """Tensors that depend on positions, as inputs of an attention layer's program.

    Attributes:
        rope: cos and sin, or None without a rotation.
        temperature: (T,) fp32 factors of the queries, or None.
    """

    rope: Rope | None
    temperature: Tensor | None

    @classmethod
    def from_layer(cls, layer: Attention, positions: Positions) -> PositionInputs:
        """Return the inputs of one layer; layers with equal angles or factors share one computation."""
        return cls(
            None if layer.rotary is None else positions.rope(layer.rotary),
            None if layer.temperature is None else positions.temperature(layer.temperature),
        )


class GivenPositions(Positions):
    """`Positions` inside a program: returns precomputed cos/sin and temperatures instead of computing them."""

    def __init__(self, index: Tensor, inputs: PositionInputs | None) -> None:
        super().__init__(index)
        self._inputs = inputs

    def rope(self, rotary: Rotary) -> Rope:
        """Return the precomputed cos and sin."""
        assert self._inputs is not None and self._inputs.rope is not None
        return self._inputs.rope

    def temperature(self, temperature: Temperature) -> Tensor:
        """Return the precomputed factors of the queries, (T,) fp32."""
        assert self._inputs is not None and self._inputs.temperature is not None
        return self._inputs.temperature
