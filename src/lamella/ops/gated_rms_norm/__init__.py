"""RMS normalisation of each head's output, then a gate."""

from __future__ import annotations

from torch import Tensor

from lamella.ops.backend import use_triton
from lamella.ops.gated_rms_norm import reference
from lamella.ops.gated_rms_norm.reference import Activation

_MAX_WIDTH = 16384  # of a row that one program of our Triton kernel holds


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """See `reference.gated_rms_norm`."""
    if use_triton(x) and x.shape[-1] <= _MAX_WIDTH:
        from lamella.ops.gated_rms_norm import triton

        return triton.gated_rms_norm(x, gate, weight, eps, activation)
    return reference.gated_rms_norm(x, gate, weight, eps, activation)
