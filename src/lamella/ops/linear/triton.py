"""Products of very few rows with a weight matrix in Triton: each program holds whole rows of the weight in registers.

With one row, the time is that of reading the weight. Every program therefore issues the loads of all its weights at
once, even before it waits for the kernel ahead, whose result it needs (see `launch.start_successor`). The residual sum
and the norm before the product are cheap enough for every program to compute them itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, start_successor, wait
from lamella.ops.linear.limits import serves
from lamella.ops.operands import ConvStep, ResidualNorm
from lamella.ops.short_conv.triton import convolve, load_history, load_taps, store_history
from lamella.ops.swiglu.triton import silu

__all__ = ["fused_linear", "linear", "serves", "fp32_linear"]

_NO_NORM = (None, None, 0.0)
_NO_CONV = ((None, None, False, False), (None, None), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `reference.linear`. Rows do not depend on each other."""
    return _launch(x, weight, bias, False, False, None, None)[0]


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Compute `reference.fp32_linear`."""
    return _launch(x, weight, None, True, False, None, None)[0]


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gated: bool = False,
    norm: ResidualNorm | None = None,
    conv: ConvStep | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute `reference.fused_linear` with fewer roundings: only residual and convolved product are rounded."""
    return _launch(x, weight, bias, False, gated, norm, conv)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    fp32_out: bool,
    gated: bool,
    norm: ResidualNorm | None,
    conv: ConvStep | None,
) -> tuple[Tensor, Tensor | None]:
    """Launch the kernel; return y and the new residual. With `fp32_out`, y are the unrounded sums in fp32."""
    rows, size = x.shape
    outputs = weight.shape[0] // (2 if gated else 1)
    y = torch.empty((rows, outputs), dtype=torch.float32 if fp32_out else x.dtype, device=x.device)
    total = None if norm is None else torch.empty((rows, size), dtype=x.dtype, device=x.device)
    tile, num_warps = _tile(weight, rows == 1 and gated, conv is not None)
    padded = next_power_of_2(size)
    block = max(1, tile // padded // (2 if gated else 1))
    residual, norm_weight, eps = norm or _NO_NORM
    (taps, conv_bias, activation, skip), (history, slots), positions = conv or _NO_CONV
    _kernel[(cdiv(outputs, block),)](
        x, x.stride(0), residual, 0 if residual is None else residual.stride(0), norm_weight, eps, weight, bias,
        taps, 0 if taps is None else taps.stride(0), 0 if taps is None else taps.stride(1), conv_bias,
        history, 0 if history is None else history.stride(0), 0 if history is None else history.stride(1),
        slots, positions, y, total,
        ROWS=rows, OUTPUTS=outputs, SIZE=size, PADDED=padded, BLOCK=block, GATED=gated,
        WIDTH=0 if taps is None else taps.shape[1], ACTIVATION=activation, SKIP=skip,
        num_warps=num_warps, **dependent_launch(x),
    )  # fmt: skip
    return y, total


def _tile(weight: Tensor, gated: bool, convolved: bool) -> tuple[int, int]:
    """Return the weight elements of a program, and its warps.

    32 KiB per program keep enough bytes in flight. Small matrices need more programs, and a long row must fit into one.
    """
    size = next_power_of_2(weight.shape[1])
    if size <= 1024:
        return 1 << (14 if gated and not convolved else 13), 2
    if size <= 2048:
        return 1 << (13 if weight.numel() < 5 << 20 else 14), 4
    return max(1 << 14, size), 8


@triton.jit
def _dot(weight, x):
    """Return the sums over the inputs of weight (BLOCK, PADDED) times x (1, PADDED)."""
    return tl.sum(weight.to(tl.float32) * x, axis=1)


@triton.jit
def _after(y, bias_ptr, scale, outputs, mask):
    """Apply the norm's scale and then the bias to a product."""
    if scale is not None:
        y *= scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + outputs, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _kernel(
    x_ptr, x_stride, residual_ptr, residual_stride, norm_ptr, eps, weight_ptr, bias_ptr,
    taps_ptr, stride_channel, stride_tap, conv_bias_ptr, history_ptr, stride_slot, stride_row, slots_ptr, positions_ptr,
    y_ptr, total_ptr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    GATED: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # Let the next kernel load its weights while this kernel waits for its own.
    start_successor(PDL)
    outputs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inputs = tl.arange(0, PADDED)[None, :]
    inside = inputs < SIZE
    valid = outputs < OUTPUTS
    # One pointer per thread plus constant offsets, so that the loads are issued as early as possible.
    mask = (valid[:, None] | (OUTPUTS % BLOCK == 0)) & (inside | (PADDED == SIZE))
    offsets = tl.arange(0, BLOCK)[:, None] * SIZE + inputs
    weight_ptr += tl.program_id(0).to(tl.int64) * (BLOCK * SIZE)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    if GATED:
        up_weight = tl.load(weight_ptr + OUTPUTS * SIZE + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    if norm_ptr is not None:
        norm_weight = tl.load(norm_ptr + inputs, mask=inside, other=0.0)
    if WIDTH > 0:
        taps = load_taps(taps_ptr, conv_bias_ptr, outputs, valid, stride_channel, stride_tap, WIDTH)
        if GATED:
            up_taps = load_taps(taps_ptr, conv_bias_ptr, outputs + OUTPUTS, valid, stride_channel, stride_tap, WIDTH)
        # The history was written in the previous step.
        rows = ()
        up_rows = ()
        for row in tl.static_range(ROWS):
            slot_ptr = history_ptr + tl.load(slots_ptr + row) * stride_slot
            position = tl.load(positions_ptr + row)
            rows += (load_history(slot_ptr, stride_row, outputs, valid, position, WIDTH, x_ptr.dtype.element_ty),)
            if GATED:
                up_rows += (
                    load_history(
                        slot_ptr, stride_row, outputs + OUTPUTS, valid, position, WIDTH, x_ptr.dtype.element_ty
                    ),
                )
    wait(PDL)
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * x_stride + inputs, mask=inside, other=0.0)
        scale = None
        if residual_ptr is not None:
            kept = tl.load(residual_ptr + row * residual_stride + inputs, mask=inside, other=0.0)
            total = (x.to(tl.float32) + kept.to(tl.float32)).to(x.dtype)
            if tl.program_id(0) == 0:
                tl.store(total_ptr + row * SIZE + inputs, total, mask=inside)
            # The norm's scale is a factor of the whole sum: compute both sums together, and multiply at the end.
            x_fp32 = total.to(tl.float32)
            scale = tl.rsqrt(tl.sum(x_fp32 * x_fp32, axis=1) / SIZE + eps)
            x_fp32 = x_fp32 * norm_weight
        else:
            x_fp32 = x.to(tl.float32)
        y = _after(_dot(weight, x_fp32), bias_ptr, scale, outputs, valid)
        if GATED:
            up = _after(_dot(up_weight, x_fp32), bias_ptr, scale, outputs + OUTPUTS, valid)
        if WIDTH > 0:
            # No other program accesses the history of these channels.
            slot_ptr = history_ptr + tl.load(slots_ptr + row) * stride_slot
            position = tl.load(positions_ptr + row)
            y = _convolve(
                y.to(x.dtype), rows[row], taps, slot_ptr, stride_row, outputs, valid, position, WIDTH, ACTIVATION, SKIP
            )
            if GATED:
                up = _convolve(
                    up.to(x.dtype), up_rows[row], up_taps, slot_ptr, stride_row, outputs + OUTPUTS, valid, position,
                    WIDTH, ACTIVATION, SKIP,
                )  # fmt: skip
        if GATED:
            y = silu(y) * up
        tl.store(y_ptr + row * OUTPUTS + outputs, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _convolve(
    current, old, taps, history, stride_row, channels, mask, position,
    WIDTH: tl.constexpr, ACTIVATION: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Return the convolution (fp32) of one new token's channels after the `old` ones; store them in the history."""
    rows = old + (current,)  # noqa: RUF005 (Triton knows no starred tuple)
    store_history(history, stride_row, channels, mask, position, current, WIDTH)
    return convolve(rows, taps, 0, WIDTH, ACTIVATION, SKIP).to(tl.float32)
