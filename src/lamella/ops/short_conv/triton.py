"""Short causal convolution in Triton, alone or fused with the norm before it or the gate after it.

One launch computes prefills and decodes together without a race on the histories. Each of the first R programs has one
request; only this program accesses the request's history, and it computes the outputs that need the history. The
further programs compute all other outputs, whose taps are within x. They iterate over tokens with the last taps in
registers, while the next tokens are being loaded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import rounded, widened
from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, start_successor, wait, wait_for_predecessor
from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.triton import add_rms_norm, row_block, row_scale
from lamella.ops.swiglu.triton import silu

BLOCK = 512  # channels per program
MAX_TOKENS = 32  # per program; each is one bit of an integer
CHUNK = 4  # tokens being loaded at the same time; twice as many, the minimum per program, are at least W - 1
PROGRAMS = 1024  # number of programs to reach before programs get more tokens than the minimum
_NO_STATE = (None, None)


def short_conv(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute `reference.short_conv`; the channels of a history must be contiguous.

    A weight with stride 1 over channels is read faster.
    """
    return _convolve(x, conv, batch, state, out, gated=False)


def short_conv_swiglu(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute `swiglu(short_conv(x, ...))`, bitwise equal, of x (T, 2 * I); return (T, I)."""
    return _convolve(x, conv, batch, state, out, gated=True)


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
    """Compute `add_rms_norm(x, norm)` and then `short_conv`, bitwise equal; return the result and the new residual.

    One launch is used if every request has one new token, and if rows are wide and aligned enough to keep the order of
    the norm's own sum. x and residual are (T, C), the norm's weight is (C,) fp32. With `early`, the launch directly
    ahead in the stream may write x, but not history, slots or positions, and the next launch may start before this
    kernel's wait (see `start_successor`).
    """
    residual, norm_weight, eps = norm
    rows, columns, warps = row_block(x.shape[1])
    aligned = all(side.stride(0) % 16 == 0 and side.data_ptr() % 16 == 0 for side in (x, residual))
    if batch.num_decodes < batch.num_requests or rows > 1 or not aligned:
        normed, total = add_rms_norm(x, norm, total=total)
        return short_conv(normed, conv, batch, state, out), total
    tokens, channels = x.shape
    assert x.stride(1) == residual.stride(1) == 1 and residual.shape == x.shape and residual.dtype == x.dtype
    assert norm_weight.is_contiguous() and norm_weight.shape == (channels,)
    _check(x, conv, batch, state)
    weight, bias, activation, skip = conv
    history, slots = state or _NO_STATE
    block = min(columns, 256 * warps)
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) if t is None else t for t in (out, total))
    assert all(side.shape == x.shape and side.dtype == x.dtype and side.is_contiguous() for side in (y, total))
    _norm_step[(tokens, cdiv(channels, block))](
        x,
        residual,
        norm_weight,
        weight,
        bias,
        history,
        slots,
        batch.positions,
        y,
        total,
        x.stride(0),
        residual.stride(0),
        *weight.stride(),
        *_history_strides(history),
        eps,
        N=channels,
        WIDTH=weight.shape[1],
        ACTIVATION=activation,
        RESIDUAL=skip,
        COLUMNS=columns,
        BLOCK=block,
        EARLY=early,
        num_warps=warps,
        enable_fp_fusion=False,
        **dependent_launch(x),
    )
    return y, total


def _convolve(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None, out: Tensor | None, gated: bool
) -> Tensor:
    tokens, channels = x.shape
    assert x.stride(1) == 1 and channels % (1 + gated) == 0
    _check(x, conv, batch, state)
    weight, bias, activation, residual = conv
    history, slots = state or _NO_STATE
    width = channels // (1 + gated)
    decode = batch.num_decodes == batch.num_requests
    blocks = cdiv(width, BLOCK)
    # Many tokens per program share the loads of weights and previous tokens; few tokens give more programs.
    block_tokens = min(MAX_TOKENS, max(2 * CHUNK, next_power_of_2(tokens * blocks // PROGRAMS)))
    programs = batch.num_requests + (0 if decode else cdiv(tokens, block_tokens))
    y = torch.empty((tokens, width), dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == (tokens, width) and y.dtype == x.dtype and y.is_contiguous()
    _short_conv[(programs, blocks)](
        x,
        weight,
        bias,
        history,
        slots,
        batch.query_start_loc,
        batch.positions,
        batch.token_request,
        y,
        batch.num_requests,
        tokens,
        block_tokens,
        x.stride(0),
        *weight.stride(),
        *_history_strides(history),
        N=width,
        WIDTH=weight.shape[1],
        ACTIVATION=activation,
        RESIDUAL=residual,
        GATED=gated,
        DECODE=decode,
        BLOCK=BLOCK,
        MAX_TOKENS=MAX_TOKENS,
        CHUNK=CHUNK,
        num_warps=_warps(gated, weight.shape[1], x.element_size()),
        enable_fp_fusion=False,  # fusion depends on the surrounding code, but all these kernels must give equal bits
        **dependent_launch(x),
    )
    return y


def _warps(gated: bool, width: int, element_size: int) -> int:
    """Return the channels per program: windows and weights are in registers, so wide windows allow fewer channels."""
    return 4 if (1 + gated) * width * element_size <= 16 else 8


def _check(x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None) -> None:
    (channels, width), bias = conv.weight.shape, conv.bias
    assert x.shape == (batch.num_tokens, channels) and 2 <= width <= 8
    assert bias is None or (bias.shape == (channels,) and bias.is_contiguous())
    if state is not None:
        history, slots = state
        assert history.shape[1:] == (width - 1, channels) and history.stride(2) == 1 and history.dtype == x.dtype
        assert slots.shape == (batch.num_requests,) and slots.is_contiguous()


def _history_strides(history: Tensor | None) -> tuple[int, int]:
    return (0, 0) if history is None else (history.stride(0), history.stride(1))


@triton.jit
def load_taps(weight, bias, channel, mask, stride_channel, stride_tap, WIDTH: tl.constexpr):
    """Load the WIDTH weights of each channel, oldest tap first, and then the bias if there is one."""
    taps = ()
    for tap in tl.static_range(WIDTH):
        pointer = weight + channel * stride_channel + tap * stride_tap
        taps += (tl.load(pointer, mask=mask, other=0.0).to(tl.float32),)
    if bias is not None:
        taps += (tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32),)
    return taps


@triton.jit
def load_history(history, stride_row, channel, mask, position, WIDTH: tl.constexpr, dtype: tl.constexpr):
    """Load the WIDTH-1 inputs before `position`, oldest first; zeros before position 0 or without a history."""
    rows = ()
    for index in tl.static_range(WIDTH - 1):
        if history is None:
            rows += (tl.zeros(channel.shape, dtype),)
        else:
            # The input at position - (WIDTH-1) + index; its row is that position modulo WIDTH-1.
            seen = position >= WIDTH - 1 - index
            row = (position + index).to(tl.int32) % (WIDTH - 1)
            rows += (tl.load(history + row * stride_row + channel, mask=mask & seen, other=0.0),)
    return rows


@triton.jit
def store_history(history, stride_row, channel, mask, position, value, WIDTH: tl.constexpr):
    """Store the input `value` at `position` in the history, if there is one, over the input WIDTH-1 before it."""
    if history is not None:
        tl.debug_barrier()  # if a layout is unaligned, one thread may load what another stores
        newest = position.to(tl.int32) % (WIDTH - 1)
        for row in tl.static_range(WIDTH - 1):
            # At the start of a request, rows of later positions contain another request's inputs: set them to zero.
            kept = tl.where(row == newest, value, 0.0).to(value.dtype)
            tl.store(history + row * stride_row + channel, kept, mask=mask & ((row == newest) | (row > position)))


@triton.jit
def convolve(
    rows,
    taps,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Return the output at the last of rows[first : first + WIDTH], rounded to their dtype."""
    return _weigh(rows, taps, first, WIDTH, ACTIVATION, RESIDUAL).to(rows[first].dtype)


@triton.jit
def _weigh(
    rows,
    taps,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Return `convolve` before rounding, with explicit FMAs: compiler fusion depends on the surrounding code."""
    current = rows[first + WIDTH - 1].to(tl.float32)
    total = current * taps[WIDTH - 1]
    if RESIDUAL and not ACTIVATION:
        total = tl.fma(current, taps[WIDTH - 1], current)
    for offset in tl.static_range(1, WIDTH):
        total = tl.fma(rows[first + WIDTH - 1 - offset].to(tl.float32), taps[WIDTH - 1 - offset], total)
    if len(taps) > WIDTH:
        total += taps[WIDTH]
    if ACTIVATION:
        total = silu(total)
        if RESIDUAL:
            total += current
    return total


@triton.jit
def _request_rows(
    x,
    history,
    stride_x,
    stride_row,
    channel,
    mask,
    start,
    count,
    position,
    WIDTH: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Load the WIDTH-1 inputs before a request's new tokens and as many new ones (DECODE: one); update the history."""
    rows = load_history(history, stride_row, channel, mask, position, WIDTH, x.dtype.element_ty)
    for token in tl.static_range(1 if DECODE else WIDTH - 1):
        pointer = x + (start + token) * stride_x + channel
        rows += (tl.load(pointer, mask=mask & (token < count), other=0.0),)
    if DECODE:
        store_history(history, stride_row, channel, mask, position, rows[WIDTH - 1], WIDTH)
    elif history is not None:
        tl.debug_barrier()  # as in store_history
        last = position + count - 1
        for row in tl.static_range(WIDTH - 1):
            # The latest position of this row: a new token, an old one, or negative if there is none.
            latest = last - (last - row + WIDTH - 1) % (WIDTH - 1)
            token = latest - position
            value = tl.load(x + (start + token) * stride_x + channel, mask=mask & (token >= 0), other=0.0)
            tl.store(history + row * stride_row + channel, value, mask=mask & ((token >= 0) | (latest < 0)))
    return rows


@triton.jit
def _request(
    x,
    history,
    slots,
    query_start_loc,
    positions,
    y,
    request,
    stride_x,
    stride_slot,
    stride_row,
    channel,
    mask,
    taps,
    up_taps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Compute the outputs of a request that need its history, and update the history."""
    if DECODE:
        start = request.to(tl.int64)
        count = 1
    else:
        start = tl.load(query_start_loc + request).to(tl.int64)
        count = tl.load(query_start_loc + request + 1) - start
    position = tl.load(positions + start)
    if history is not None:
        history += tl.load(slots + request) * stride_slot
    rows = _request_rows(x, history, stride_x, stride_row, channel, mask, start, count, position, WIDTH, DECODE)
    up_rows = ()
    if GATED:
        up_rows = _request_rows(
            x, history, stride_x, stride_row, channel + N, mask, start, count, position, WIDTH, DECODE
        )
    for token in tl.static_range(1 if DECODE else WIDTH - 1):
        value = _output(rows, up_rows, taps, up_taps, token, WIDTH, ACTIVATION, RESIDUAL, GATED, x.dtype.element_ty)
        tl.store(y + (start + token) * N + channel, value, mask=mask & (token < count))


@triton.jit
def _load_rows(x, stride_x, channel, mask, first, end, COUNT: tl.constexpr):
    """Load COUNT rows of x from row `first` on; undefined from row `end` on and outside the mask."""
    rows = ()
    for i in tl.static_range(COUNT):
        row = tl.cast(first + i, tl.int64)
        rows += (tl.load(x + row * stride_x + channel, mask=mask & (row < end)),)
    return rows


@triton.jit
def _free_tokens(token_request, first, end, WIDTH: tl.constexpr, MAX_TOKENS: tl.constexpr):
    """Return a bit for each token from `first` to `end` that needs no history."""
    index = tl.arange(0, MAX_TOKENS)
    token = first + index
    inside = (token >= WIDTH - 1) & (token < end)
    # If the oldest tap belongs to the same request, all taps do.
    oldest = tl.load(token_request + token - (WIDTH - 1), mask=inside, other=-1)
    free = inside & (oldest == tl.load(token_request + token, mask=inside, other=-1))
    return tl.sum(free.to(tl.int32) << index)


@triton.jit
def _block(
    x,
    token_request,
    y,
    first,
    end,
    stride_x,
    channel,
    mask,
    taps,
    up_taps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Compute the outputs of the tokens from `first` to `end` that need no history."""
    before = mask & (first > 0)
    rows = widened(_load_rows(x, stride_x, channel, before, first - (WIDTH - 1), end, WIDTH - 1))
    ahead = _load_rows(x, stride_x, channel, mask, first, end, CHUNK)
    up_rows = ()
    up_ahead = ()
    if GATED:
        up_rows = widened(_load_rows(x, stride_x, channel + N, before, first - (WIDTH - 1), end, WIDTH - 1))
        up_ahead = _load_rows(x, stride_x, channel + N, mask, first, end, CHUNK)
    free = _free_tokens(token_request, first, end, WIDTH, MAX_TOKENS)
    for token in range(first, end, CHUNK):
        rows += widened(ahead)
        ahead = _load_rows(x, stride_x, channel, mask, token + CHUNK, end, CHUNK)
        if GATED:
            up_rows += widened(up_ahead)
            up_ahead = _load_rows(x, stride_x, channel + N, mask, token + CHUNK, end, CHUNK)
        for i in tl.static_range(CHUNK):
            value = _output(rows, up_rows, taps, up_taps, i, WIDTH, ACTIVATION, RESIDUAL, GATED, x.dtype.element_ty)
            tl.store(y + tl.cast(token + i, tl.int64) * N + channel, value, mask=mask & ((free >> i) & 1 != 0))
        free = free >> CHUNK
        rows = rows[CHUNK:]
        up_rows = up_rows[CHUNK:]


@triton.jit
def _output(
    rows,
    up_rows,
    taps,
    up_taps,
    first: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Return `convolve`; with GATED, of both halves, combined by the gate."""
    value = _weigh(rows, taps, first, WIDTH, ACTIVATION, RESIDUAL)
    if GATED:
        up = _weigh(up_rows, up_taps, first, WIDTH, ACTIVATION, RESIDUAL)
        value = silu(rounded(value, dtype)) * rounded(up, dtype)
    return value.to(dtype)


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "block_tokens"])
def _short_conv(
    x,
    weight,
    bias,
    history,
    slots,
    query_start_loc,
    positions,
    token_request,
    y,
    num_requests,
    num_tokens,
    block_tokens,
    stride_x,
    stride_channel,
    stride_tap,
    stride_slot,
    stride_row,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_TOKENS: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    program = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < N
    taps = load_taps(weight, bias, channel, mask, stride_channel, stride_tap, WIDTH)
    up_taps = ()
    if GATED:
        up_taps = load_taps(weight, bias, channel + N, mask, stride_channel, stride_tap, WIDTH)
    wait_for_predecessor(PDL)
    if DECODE or program < num_requests:
        _request(
            x,
            history,
            slots,
            query_start_loc,
            positions,
            y,
            program,
            stride_x,
            stride_slot,
            stride_row,
            channel,
            mask,
            taps,
            up_taps,
            N,
            WIDTH,
            ACTIVATION,
            RESIDUAL,
            GATED,
            DECODE,
        )
    else:
        first = (program - num_requests) * block_tokens
        _block(
            x,
            token_request,
            y,
            first,
            min(first + block_tokens, num_tokens),
            stride_x,
            channel,
            mask,
            taps,
            up_taps,
            N,
            WIDTH,
            ACTIVATION,
            RESIDUAL,
            GATED,
            MAX_TOKENS,
            CHUNK,
        )


@triton.jit
def _norm_step(
    x,
    residual,
    norm_weight,
    weight,
    bias,
    history,
    slots,
    positions,
    y,
    total,
    stride_x,
    stride_residual,
    stride_channel,
    stride_tap,
    stride_slot,
    stride_row,
    eps,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = channel < N
    taps = load_taps(weight, bias, channel, mask, stride_channel, stride_tap, WIDTH)
    norm = tl.load(norm_weight + channel, mask=mask, other=0.0)
    if EARLY:
        start_successor(PDL)
    else:
        wait_for_predecessor(PDL)
    if history is not None:
        history += tl.load(slots + token) * stride_slot
    position = tl.load(positions + token)
    rows = load_history(history, stride_row, channel, mask, position, WIDTH, x.dtype.element_ty)
    if EARLY:
        wait(PDL)
    x += token * stride_x
    residual += token * stride_residual
    kept = _sum(x, residual, channel, mask)
    # Every program needs the norm of the whole row, in the layout of the norm's own kernel for equal bits.
    column = tl.arange(0, COLUMNS)[None, :]
    scale = row_scale(_sum(x, residual, column, column < N).to(tl.float32), N, eps)
    tl.store(total + token * N + channel, kept, mask=mask)
    rows += ((kept.to(tl.float32) * scale * norm).to(kept.dtype),)
    store_history(history, stride_row, channel, mask, position, rows[WIDTH - 1], WIDTH)
    tl.store(y + token * N + channel, convolve(rows, taps, 0, WIDTH, ACTIVATION, RESIDUAL), mask=mask)


@triton.jit
def _sum(x, residual, column, mask):
    """Return x + residual, rounded to their dtype."""
    value = tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(residual + column, mask=mask, other=0.0).to(tl.float32)
    return value.to(x.dtype.element_ty)
