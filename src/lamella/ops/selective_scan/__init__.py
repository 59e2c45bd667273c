"""The selective scan with a per-request state (Mamba mixers)."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.ragged import RaggedBatch
from lamella.ops.selective_scan import cpu

_MAX_WIDTH = 256  # of a state that a program of our Triton kernel holds


def selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor | None,
    d: Tensor,
    batch: RaggedBatch,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.selective_scan`; the result is in `out` (T, H, P), contiguous, where that is given."""
    if use_triton(x) and b.shape[-1] <= _MAX_WIDTH:
        from lamella.ops.selective_scan import triton

        return triton.selective_scan(x, dt, b, c, z, a_log, dt_bias, d, batch, state, slots, out)
    if use_native(x):
        y = native.selective_scan(
            x, dt, b, c, z, a_log, dt_bias, d, state, slots, batch.query_start_loc, batch.seq_lens
        )
        return y if out is None else out.copy_(y)
    return cpu.selective_scan(x, dt, b, c, z, a_log, dt_bias, d, batch, state, slots, out)
