"""RMS norm of each head's output, multiplied by a gate."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops.backend import BackendTable
from lamella.ops.gated_rms_norm import reference
from lamella.ops.gated_rms_norm.reference import Activation
from lamella.ops.rms_norm import MAX_WIDTH

_table = BackendTable("gated_rms_norm", __name__)


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, activation: Activation = "silu") -> Tensor:
    """Return `rms_norm(x) * act(gate)` of each head; see `reference.gated_rms_norm`.

    Args:
        x: (T, H, D).
        gate: (T, H, D).
        weight: (D,) fp32.
        eps: added to the mean square.
        activation: "silu" or "sigmoid".

    Returns:
        (T, H, D) in the dtype of x.
    """
    return _table.choose(x)(x, gate, weight, eps, activation)


@_table.lazy("triton", lambda x: x.shape[-1] <= MAX_WIDTH)
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.gated_rms_norm import triton

    return triton.gated_rms_norm


_table.backend("reference")(reference.gated_rms_norm)
