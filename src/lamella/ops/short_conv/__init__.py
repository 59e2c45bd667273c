"""Short causal convolution with per-request history, for canon layers and recurrent mixers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lamella.ops import native
from lamella.ops.backend import BackendTable
from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import add_rms_norm
from lamella.ops.short_conv import reference
from lamella.ops.swiglu import swiglu

_conv = BackendTable("short_conv", __name__)
_conv_swiglu = BackendTable("short_conv_swiglu", __name__)
_norm_conv = BackendTable("norm_short_conv", __name__)


def short_conv(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Convolve x (T, C) over time, continued from each request's history; see `reference.short_conv`.

    Args:
        x: (T, C).
        conv: weights for C channels.
        batch: lengths of the requests.
        state: history of the requests, updated in place; with None every request starts without history.
        out: (T, C) contiguous, is written; None to allocate it.

    Returns:
        (T, C) in the dtype of x.
    """
    return _conv.choose(x)(x, conv, batch, state, out)


def short_conv_swiglu(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute `short_conv` and then `swiglu`, in one kernel on a GPU.

    Args:
        x: (T, 2 * I).
        conv: weights for 2 * I channels.
        batch: lengths of the requests.
        state: history of the requests, updated in place, or None.
        out: (T, I) contiguous, is written; None to allocate it.

    Returns:
        (T, I) in the dtype of x.
    """
    return _conv_swiglu.choose(x)(x, conv, batch, state, out)


def norm_short_conv(
    x: Tensor,
    norm: ResidualNorm,
    conv: ConvWeights,
    batch: RaggedBatch,
    state: ConvState | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `add_rms_norm(x, norm)` and then `short_conv`, in one kernel on a GPU.

    Args:
        x: (T, C).
        norm: residual, weight and epsilon.
        conv: weights for C channels.
        batch: lengths of the requests.
        state: history of the requests, updated in place, or None.
        out: (T, C) contiguous, is written with the convolution; None to allocate it.
        total: (T, C) contiguous, is written with the new residual; None to allocate it.
        early: whether the kernel may read history, slots and positions while the launch directly ahead still runs.

    Returns:
        The convolution and the new residual, (T, C) each.
    """
    return _norm_conv.choose(x)(x, norm, conv, batch, state, out, total, early)


@_conv.lazy("triton")
def _triton() -> Callable[..., Tensor]:
    from lamella.ops.short_conv import triton

    return triton.short_conv


@_conv.backend("native")
def _native(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    (weight, bias, activation, residual), (history, slots) = conv, state or (None, None)
    y = native.short_conv(x, weight, bias, history, slots, batch.query_start_loc, batch.positions, activation, residual)
    return y if out is None else out.copy_(y)


@_conv_swiglu.lazy("triton")
def _triton_swiglu() -> Callable[..., Tensor]:
    from lamella.ops.short_conv import triton

    return triton.short_conv_swiglu


@_conv_swiglu.backend("composed")
def _composed_swiglu(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    y = swiglu(short_conv(x, conv, batch, state))
    return y if out is None else out.copy_(y)


@_norm_conv.lazy("triton")
def _triton_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    from lamella.ops.short_conv import triton

    return triton.norm_short_conv


@_norm_conv.backend("composed")
def _composed_norm(
    x: Tensor,
    norm: ResidualNorm,
    conv: ConvWeights,
    batch: RaggedBatch,
    state: ConvState | None = None,
    out: Tensor | None = None,
    total: Tensor | None = None,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    normed, new_residual = add_rms_norm(x, norm)
    y = short_conv(normed, conv, batch, state, out)
    return y, new_residual if total is None else total.copy_(new_residual)


_conv.backend("reference")(reference.short_conv)
_conv_swiglu.backend("reference")(reference.short_conv_swiglu)
_norm_conv.backend("reference")(reference.norm_short_conv)
