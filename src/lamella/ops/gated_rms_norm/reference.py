"""RMS norm of each head's output, multiplied by a gate, in plain torch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import silu

Activation = Literal["silu", "sigmoid"]


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight * act(gate)` over the last dimension, in fp32, rounded once.

    Args:
        x: (T, H, D).
        gate: (T, H, D).
        weight: (D,) fp32.
        eps: added to the mean square.
        activation: "silu" or "sigmoid".

    Returns:
        (T, H, D) in the dtype of x.
    """
    x_fp32, gates = x.float(), gate.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    factor = silu(gates) if activation == "silu" else gates.sigmoid()
    return (x_fp32 * scale * weight.float() * factor).to(x.dtype)
