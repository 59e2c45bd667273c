"""SwiGLU, the gated activation of Llama's feed-forward."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.swiglu import reference

_table = BackendTable("swiglu", __name__)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up`; see `reference.swiglu`.

    Args:
        gate_up: (..., 2 * I) = [gate | up].

    Returns:
        (..., I) in the dtype of gate_up.
    """
    return _table.choose(gate_up)(gate_up)


@_table.lazy("triton")
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.swiglu import triton

    return triton.swiglu


@_table.backend("native")
def _native(gate_up: Tensor) -> Tensor:
    return native.silu_mul(gate_up)


_table.backend("reference")(reference.swiglu)
