"""Products of a few dozen rows with a weight matrix: tiles for the tensor cores, whose long side is the weight's.

At so many rows a step still waits for the weight more than for the arithmetic, and there are fewer tiles of the result
than a device has processors. So the outputs take the side of a tile that the hardware wants to be long, and the rows
the other, which may be 16; what is left over is the inputs, which several programs share where tiles are few. Each then
writes its sums in fp32, and a second kernel adds them up, in the order of the inputs: there is no counter to be kept
between calls, so graphs and streams may do as they like, and the bits do not depend on who comes last.

While it waits for the kernel ahead, a program has the first part of its weight brought into the second-level cache; it
reads nothing before, so whoever writes a weight need not be thought of.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import dependent_launch, start_successor, wait, wait_for_predecessor
from lamella.ops.swiglu.triton import silu

FORMS = frozenset({"gated"})
MIN_ROWS, MAX_ROWS = 3, 256
_LARGE = 1 << 25  # weight elements from which on the product is a library's
_PROGRAMS = 96  # at most so many, if the inputs are shared among several
_MIN_INPUTS = 256  # of each of them
_SHARED = 96 << 10  # bytes of stages: two programs fit into a processor, of this kernel or of this and the next
_AHEAD = 1 << 17  # bytes of the weight that a program asks for in advance; all at once stay below the cache's size
_PIECE = tl.constexpr(128)  # elements that are asked for at once
_BLOCK = 512  # outputs of a program that adds up


class Settings(NamedTuple):
    """How a product runs; changes its speed, and results only in rounding."""

    rows: int  # of a tile, a power of two >= 16
    outputs: int  # a power of two >= 16, and >= 64 for the tensor cores' widest instructions; twice as many if gated
    inputs: int  # at a time, a power of two >= 16
    splits: int  # programs that share the inputs
    num_warps: int
    num_stages: int


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes x (T, in) and weight (out, in), and is to: by shape and layout alone."""
    return (
        MIN_ROWS <= x.shape[0] <= MAX_ROWS
        and weight.numel() < _LARGE
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.dtype == x.dtype
        and x.shape[1] % 8 == 0
        and x.stride(1) == 1
        and weight.is_contiguous()
        and weight.data_ptr() % 16 == 0
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    wide: bool = False,
    gated: bool = False,
    settings: Settings | None = None,
) -> Tensor:
    """`x W^T + b`, see `reference.linear`. Rows do not depend on one another.

    wide: the unrounded sums are given, in fp32.
    gated: of the result [gate | up] (T, 2 I), `silu(gate) * up` (T, I).
    """
    (rows, size), count = x.shape, weight.shape[0]
    assert weight.shape[1] == size and not (gated and count % 2)
    outputs = count // 2 if gated else count
    if settings is None:
        settings = choose(rows, outputs, size, gated)
    chunk = triton.cdiv(triton.cdiv(size, settings.inputs), settings.splits) * settings.inputs
    splits = triton.cdiv(size, chunk)
    y = torch.empty((rows, outputs), dtype=torch.float32 if wide else x.dtype, device=x.device)
    parts = y if splits == 1 else torch.empty((splits, rows, count), dtype=torch.float32, device=x.device)
    ahead = min(chunk, _AHEAD // (weight.itemsize * settings.outputs * (2 if gated else 1)))
    _kernel[(triton.cdiv(rows, settings.rows), triton.cdiv(outputs, settings.outputs), splits)](
        x, x.stride(0), weight, bias, parts, rows,
        OUTPUTS=outputs, SIZE=size, CHUNK=chunk, AHEAD=ahead, GATED=gated, PARTIAL=splits > 1,
        ROWS=settings.rows, COLUMNS=settings.outputs, INPUTS=settings.inputs,
        num_warps=settings.num_warps, num_stages=settings.num_stages, **dependent_launch(x),
    )  # fmt: skip
    if splits > 1:
        _add_up[(rows, triton.cdiv(outputs, _BLOCK))](
            parts, bias, y, rows,
            SPLITS=splits, OUTPUTS=outputs, GATED=gated, BLOCK=_BLOCK, num_warps=4, **dependent_launch(x),
        )  # fmt: skip
    return y


def choose(rows: int, outputs: int, size: int, gated: bool) -> Settings:
    """The settings of a product with weight (outputs, size), twice as many outputs if gated."""
    tile = min(128, max(16, triton.next_power_of_2(rows)))
    tiles = triton.cdiv(rows, tile) * triton.cdiv(outputs, 64)
    splits = 1
    while 2 * splits * tiles <= _PROGRAMS and 2 * splits * _MIN_INPUTS <= size:
        splits *= 2
    stage = 2 * 64 * (tile + (128 if gated else 64))
    return Settings(tile, 64, 64, splits, 4, min(6, _SHARED // stage))


@triton.jit
def _ask(addresses):
    """Have the `_PIECE` elements at each address, of two bytes, brought into the second-level cache."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 256; mov.b32 $0, 0;", "=r,l", [addresses],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _finish(y, up, bias_ptr, outputs, inside, OUTPUTS: tl.constexpr, GATED: tl.constexpr):
    """What stands behind the sums over all inputs: the bias, then the gate."""
    if bias_ptr is not None:
        y += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        if bias_ptr is not None:
            up += tl.load(bias_ptr + OUTPUTS + outputs, mask=inside, other=0.0).to(tl.float32)
        y = silu(y) * up
    return y


@triton.jit(do_not_specialize=["rows"])
def _kernel(
    x_ptr, x_stride, weight_ptr, bias_ptr, out_ptr, rows,
    OUTPUTS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr, GATED: tl.constexpr,
    PARTIAL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INPUTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    start_successor(PDL)
    # Neighbouring programs share the weight's tile, which comes from memory once.
    first = tl.program_id(2) * CHUNK
    outputs = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    if PDL and AHEAD >= _PIECE and SIZE >= _PIECE:
        weight_rows = weight_ptr + tl.minimum(outputs, OUTPUTS - 1).to(tl.int64)[:, None] * SIZE
        # Four at once, so that no two threads ask for the same.
        pieces = tl.arange(0, 4)[None, :] * _PIECE
        for start in tl.static_range(0, AHEAD, 4 * _PIECE):
            piece = first + tl.minimum(start + pieces, AHEAD - _PIECE)
            addresses = weight_rows + tl.minimum(piece, SIZE - _PIECE)
            _ask(addresses.to(tl.int64))
            if GATED:
                _ask((addresses + OUTPUTS * SIZE).to(tl.int64))
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inputs = tl.arange(0, INPUTS)
    here, inside = (row < rows)[None, :], (outputs < OUTPUTS)[:, None]
    x_ptrs = x_ptr + first + row.to(tl.int64)[None, :] * x_stride + inputs[:, None]
    weight_ptrs = weight_ptr + first + outputs.to(tl.int64)[:, None] * SIZE + inputs[None, :]
    y = tl.zeros((COLUMNS, ROWS), tl.float32)
    up = tl.zeros((COLUMNS, ROWS), tl.float32)
    wait(PDL)
    for start in tl.range(0, CHUNK, INPUTS):
        left = (inputs < SIZE - first - start) | (SIZE % CHUNK == 0)
        mask = inside & left[None, :]
        x = tl.load(x_ptrs + start, mask=here & left[:, None], other=0.0)
        y = tl.dot(tl.load(weight_ptrs + start, mask=mask, other=0.0), x, y)
        if GATED:
            up = tl.dot(tl.load(weight_ptrs + start + OUTPUTS * SIZE, mask=mask, other=0.0), x, up)
    here &= inside
    if PARTIAL:
        width: tl.constexpr = 2 * OUTPUTS if GATED else OUTPUTS
        out_ptr += (tl.program_id(2) * rows + row).to(tl.int64)[None, :] * width + outputs[:, None]
        tl.store(out_ptr, y, mask=here)
        if GATED:
            tl.store(out_ptr + OUTPUTS, up, mask=here)
    else:
        y = _finish(y, up, bias_ptr, outputs[:, None], inside, OUTPUTS, GATED)
        out_ptr += row.to(tl.int64)[None, :] * OUTPUTS + outputs[:, None]
        tl.store(out_ptr, y.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows"])
def _add_up(
    parts_ptr, bias_ptr, y_ptr, rows,
    SPLITS: tl.constexpr, OUTPUTS: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, outputs = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < OUTPUTS
    width: tl.constexpr = 2 * OUTPUTS if GATED else OUTPUTS
    y = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    wait_for_predecessor(PDL)
    for split in tl.static_range(SPLITS):
        part_ptr = parts_ptr + (split * rows + row) * width + outputs
        y += tl.load(part_ptr, mask=inside, other=0.0)
        if GATED:
            up += tl.load(part_ptr + OUTPUTS, mask=inside, other=0.0)
    y = _finish(y, up, bias_ptr, outputs, inside, OUTPUTS, GATED)
    tl.store(y_ptr + row * OUTPUTS + outputs, y.to(y_ptr.dtype.element_ty), mask=inside)
