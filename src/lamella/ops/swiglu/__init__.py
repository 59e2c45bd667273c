"""The gated activation of Llama's feed-forward."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.swiglu import reference


def swiglu(gate_up: Tensor) -> Tensor:
    """See `reference.swiglu`."""
    if use_native(gate_up):
        return native.silu_mul(gate_up)
    if use_triton(gate_up):
        from lamella.ops.swiglu import triton

        return triton.swiglu(gate_up)
    return reference.swiglu(gate_up)
