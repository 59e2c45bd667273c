"""SwiGLU in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` (..., I) for gate_up (..., 2 * I) = [gate | up], in fp32, rounded once."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
