"""The gated delta rule with a per-request state (gated delta nets and Kimi delta attention)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.delta_rule import cpu, reference
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch

_MAX_KEY_DIM = 256  # limit of the Triton kernel, whose programs hold whole columns of a matrix

_table = BackendTable("delta_rule", __name__)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply the gated delta rule token by token, continued from each request's state; see `reference.delta_rule`.

    Args:
        q: (T, HK, DK).
        k: (T, HK, DK).
        v: (T, HV, DV), HV a multiple of HK.
        decay: (T, HV), or (T, HV, DK) for a decay of each key channel.
        beta: (T, HV).
        a_log: (HV,) fp32.
        dt_bias: (HV,) or (HV, DK) fp32.
        batch: lengths of the requests.
        state: matrices (slots, HV, DK, DV), updated in place; with None every request starts from zero.
        out: (T, HV, DV) contiguous, is written; None to allocate it.

    Returns:
        (T, HV, DV) in the dtype of v.
    """
    return _table.choose(v, q)(q, k, v, decay, beta, a_log, dt_bias, batch, state, out)


@_table.lazy("triton", lambda v, q: q.shape[-1] <= _MAX_KEY_DIM)
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.delta_rule import triton

    return triton.delta_rule


@_table.backend("native")
def _native(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None = None,
    out: Tensor | None = None,
) -> Tensor:
    matrix, slots = state or (None, None)
    y = native.delta_rule(q, k, v, decay, beta, a_log, dt_bias, matrix, slots, batch.query_start_loc, batch.seq_lens)
    return y if out is None else out.copy_(y)


_table.backend("torch")(cpu.delta_rule)
_table.backend("reference")(reference.delta_rule)


@_table.lazy("fla", within="triton")
def _fla() -> Callable[..., Tensor]:
    from lamella.ops.delta_rule import triton

    return partial(triton.delta_rule, chunked=True)
