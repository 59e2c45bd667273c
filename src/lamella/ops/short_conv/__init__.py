"""Short causal convolution with per-request history (canon layers, and the conv in front of recurrent mixers)."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native
from lamella.ops.ragged import RaggedBatch
from lamella.ops.short_conv import reference


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: RaggedBatch,
    history: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    activation: bool = False,
    residual: bool = False,
) -> Tensor:
    """See `reference.short_conv`."""
    if use_native(x):
        return native.short_conv(
            x, weight, bias, history, slots, batch.query_start_loc, batch.positions, activation, residual
        )
    return reference.short_conv(x, weight, bias, batch, history, slots, activation=activation, residual=residual)
