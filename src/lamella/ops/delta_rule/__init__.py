"""The gated delta rule with a per-request state (gated delta nets and Kimi delta attention)."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.delta_rule import cpu
from lamella.ops.ragged import RaggedBatch

_MAX_KEY_DIM = 256  # of a memory whose columns a program of our Triton kernel holds


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: Tensor | None = None,
    slots: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.delta_rule`; the result is in `out` (T, HV, DV), contiguous, where that is given."""
    if use_triton(v) and q.shape[-1] <= _MAX_KEY_DIM:
        from lamella.ops.delta_rule import triton

        return triton.delta_rule(q, k, v, decay, beta, a_log, dt_bias, batch, state, slots, out)
    if use_native(v):
        y = native.delta_rule(q, k, v, decay, beta, a_log, dt_bias, state, slots, batch.query_start_loc, batch.seq_lens)
        return y if out is None else out.copy_(y)
    return cpu.delta_rule(q, k, v, decay, beta, a_log, dt_bias, batch, state, slots, out)
