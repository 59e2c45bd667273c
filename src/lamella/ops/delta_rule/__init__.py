"""The gated delta rule with a per-request state (gated delta nets and Kimi delta attention)."""

from __future__ import annotations

from torch import Tensor

from lamella.ops.delta_rule import cpu
from lamella.ops.ragged import RaggedBatch


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
    return cpu.delta_rule(q, k, v, decay, beta, a_log, dt_bias, batch, state, slots, out)
