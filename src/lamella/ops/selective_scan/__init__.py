"""The selective scan with a per-request state (Mamba mixers)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.selective_scan import cpu, reference

_MAX_WIDTH = 256  # limit of the Triton kernel, whose programs hold whole rows of a state

_table = BackendTable("selective_scan", __name__)


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
    state: RecurrentState | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Apply the selective scan token by token, continued from each request's state; see `reference.selective_scan`.

    Args:
        x: (T, X, P), H a multiple of X.
        dt: (T, H, P).
        b: (T, G, N), H a multiple of G.
        c: (T, H, N).
        z: (T, H, P).
        a_log: (H, P, N) fp32.
        dt_bias: (H, P) fp32, or None.
        d: (H, P) fp32.
        batch: lengths of the requests.
        state: matrices (slots, H, P, N), updated in place; with None every request starts from zero.
        out: (T, H, P) contiguous, is written; None to allocate it.

    Returns:
        (T, H, P) in the dtype of x.
    """
    return _table.choose(x, b)(x, dt, b, c, z, a_log, dt_bias, d, batch, state, out)


@_table.lazy("triton", lambda x, b: b.shape[-1] <= _MAX_WIDTH)
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.selective_scan import triton

    return triton.selective_scan


@_table.backend("native")
def _native(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor | None,
    d: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None = None,
    out: Tensor | None = None,
) -> Tensor:
    matrix, slots = state or (None, None)
    y = native.selective_scan(x, dt, b, c, z, a_log, dt_bias, d, matrix, slots, batch.query_start_loc, batch.seq_lens)
    return y if out is None else out.copy_(y)


_table.backend("torch")(cpu.selective_scan)
_table.backend("reference")(reference.selective_scan)
