"""Short causal convolution with per-request history (canon layers, and the conv in front of recurrent mixers)."""

from __future__ import annotations

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import use_native, use_triton
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import add_rms_norm
from lamella.ops.short_conv import reference
from lamella.ops.swiglu import swiglu


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: RaggedBatch,
    history: Tensor | None = None,
    slots: Tensor | None = None,
    activation: bool = False,
    residual: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.short_conv`; the result is in `out` (T, C), contiguous, where that is given."""
    if use_triton(x):
        from lamella.ops.short_conv import triton

        return triton.short_conv(
            x, weight, bias, batch, history, slots, activation=activation, residual=residual, out=out
        )
    if use_native(x):
        y = native.short_conv(
            x, weight, bias, history, slots, batch.query_start_loc, batch.positions, activation, residual
        )
    else:
        y = reference.short_conv(x, weight, bias, batch, history, slots, activation=activation, residual=residual)
    return y if out is None else out.copy_(y)


def short_conv_swiglu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: RaggedBatch,
    history: Tensor | None = None,
    slots: Tensor | None = None,
    activation: bool = False,
    residual: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """`swiglu` of the convolved x (T, 2 I), in one kernel on a GPU; in `out` (T, I), contiguous, where given."""
    if use_triton(x):
        from lamella.ops.short_conv import triton

        return triton.short_conv_swiglu(
            x, weight, bias, batch, history, slots, activation=activation, residual=residual, out=out
        )
    y = swiglu(short_conv(x, weight, bias, batch, history, slots, activation, residual))
    return y if out is None else out.copy_(y)


def norm_short_conv(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    batch: RaggedBatch,
    history: Tensor | None,
    slots: Tensor | None,
    activation: bool,
    skip: bool,
    out: Tensor | None = None,
    total: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """The convolution of `add_rms_norm(x, residual, ...)`, and the new residual, in one kernel on a GPU; with `skip`,
    `y = x + c`. The results are in `out` and `total`, both (T, C) and contiguous, where those are given. With `early`
    that kernel may read history, slots and positions while what was launched directly ahead still runs.
    """
    if use_triton(x):
        from lamella.ops.short_conv import triton

        return triton.norm_short_conv(
            x, residual, norm_weight, eps, weight, bias, batch, history, slots,
            activation=activation, residual_connection=skip, out=out, total=total, early=early,
        )  # fmt: skip
    normed, new_residual = add_rms_norm(x, residual, norm_weight, eps)
    y = short_conv(normed, weight, bias, batch, history, slots, activation, skip, out)
    return y, new_residual if total is None else total.copy_(new_residual)
