"""Selective scan in Triton: token by token, with a tile of states in registers.

A tile is some channels of any heads with the whole width of their states; channels are independent. Decode steps and
short prompts iterate over the tokens of a request in one launch. Few long prompts would leave most of the GPU idle, so
they are split into chunks in three launches: the first computes what each chunk adds to the state, the second iterates
over the chunks to get the state before each of them, and the third computes the outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import sigmoid, softplus
from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch

ENTRIES = 1024  # state entries per program
ENTRIES_PER_WARP = 256  # so that no entry of a smaller tile is in two warps
MAX_WIDTH = 256  # of a state row
CHUNK = 64  # tokens
# Chunks do nearly twice the work. They pay off if requests have this many new tokens each, and if there would be fewer
# programs than this without chunks. Neither limit has been measured.
MIN_LENGTH = 128
PROGRAMS = 1024
_LOG2_E = tl.constexpr(1.4426950408889634)


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
    *,
    chunked: bool | None = None,
) -> Tensor:
    """Compute `reference.selective_scan` for N <= 256. Operands may have any stride over tokens; `out` is contiguous.

    Prompts are split into chunks if `chunked` is True; by default if that should be faster. Decodes have their own
    launch, so that their bits do not depend on prompts in the batch.
    """
    (tokens, heads, channels), width = dt.shape, b.shape[2]
    assert z.shape == dt.shape and x.shape == (tokens, x.shape[1], channels) and b.shape == (tokens, b.shape[1], width)
    assert c.shape == (tokens, heads, width) and heads % x.shape[1] == heads % b.shape[1] == 0 and width <= MAX_WIDTH
    assert tokens == batch.num_tokens and all(t[:1].is_contiguous() for t in (x, dt, b, c, z))
    assert a_log.shape == (heads, channels, width) and a_log.is_contiguous()
    assert d.shape == (heads, channels) and d.is_contiguous()
    assert dt_bias is None or (dt_bias.shape == (heads, channels) and dt_bias.is_contiguous())
    matrix, slots = state or (None, None)
    if state is not None:
        assert state.matrix.dtype == torch.float32 and state.matrix.shape[1:] == a_log.shape
        assert state.matrix[:1].is_contiguous()
        assert state.slots.shape == (batch.num_requests,) and state.slots.is_contiguous()
    y = torch.empty(dt.shape, dtype=x.dtype, device=x.device) if out is None else out
    assert y.shape == dt.shape and y.dtype == x.dtype and y.is_contiguous()

    columns = next_power_of_2(width)
    rows = min(max(1, ENTRIES // columns), next_power_of_2(heads * channels))
    blocks = cdiv(heads * channels, rows)
    operands = (x, dt, b, c, z, a_log, dt_bias, d)
    memory = (matrix, slots, batch.query_start_loc, batch.seq_lens, y)
    strides = (*(t.stride(0) for t in (x, dt, b, c, z)), 0 if matrix is None else matrix.stride(0))
    sizes = {
        "CHANNELS": heads * channels,
        "PER_HEAD": channels,
        "WIDTH": width,
        "X_GROUP": heads // x.shape[1],
        "B_GROUP": heads // b.shape[1],
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": max(1, rows * columns // ENTRIES_PER_WARP),
        **dependent_launch(x),
    }
    decodes = batch.num_decodes
    prompts, prompt_tokens = batch.num_requests - decodes, tokens - decodes
    if decodes:
        _scan[(blocks, decodes)](*operands, *memory, 0, *strides, DECODE=True, **sizes)
    if not prompts:
        return y
    if chunked is None:
        chunked = prompt_tokens >= MIN_LENGTH * prompts and blocks * prompts < PROGRAMS
    if not chunked:
        _scan[(blocks, prompts)](*operands, *memory, decodes, *strides, DECODE=False, **sizes)
        return y
    # The chunks of prompt r have the numbers from `start // CHUNK + r` on. The numbers are unique; the few unused
    # numbers belong to programs that do nothing.
    chunks = prompt_tokens // CHUNK + prompts
    states = torch.empty((chunks, *a_log.shape), dtype=torch.float32, device=x.device)
    totals = torch.empty((chunks, heads, channels), dtype=torch.float32, device=x.device)
    between = (*memory, states, totals, decodes, prompts)
    _chunk[(blocks, chunks)](*operands, *between, *strides, OUTPUTS=False, CHUNK=CHUNK, **sizes)
    _between_chunks[(blocks, prompts)](
        a_log,
        *memory[:4],
        states,
        totals,
        decodes,
        strides[-1],
        CHANNELS=heads * channels,
        WIDTH=width,
        CHUNK=CHUNK,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=sizes["num_warps"],
        **dependent_launch(x),
    )
    _chunk[(blocks, chunks)](*operands, *between, *strides, OUTPUTS=True, CHUNK=CHUNK, **sizes)
    return y


@triton.jit
def _load_constants(
    a_log,
    dt_bias,
    d,
    channel,
    column,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the decay rates in powers of two (rows, columns), and each channel's step bias and factor, fp32."""
    inside = channel < CHANNELS
    mask = inside[:, None] & (column < WIDTH)[None, :]
    entry = channel[:, None] * WIDTH + column[None, :]
    rates = tl.exp(tl.load(a_log + entry, mask=mask, other=0.0).to(tl.float32)) * -_LOG2_E
    if dt_bias is None:
        bias = tl.zeros(channel.shape, tl.float32)
    else:
        bias = tl.load(dt_bias + channel, mask=inside, other=0.0).to(tl.float32)
    return rates, bias, tl.load(d + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pointers(
    x,
    dt,
    b,
    c,
    z,
    start,
    channel,
    column,
    stride_x,
    stride_dt,
    stride_b,
    stride_c,
    stride_z,
    PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    X_GROUP: tl.constexpr,
    B_GROUP: tl.constexpr,
):
    """Return pointers to the operands of the token `start`."""
    head = channel // PER_HEAD
    x += start * stride_x + head // X_GROUP * PER_HEAD + channel % PER_HEAD
    dt += start * stride_dt + channel
    b += start * stride_b + (head // B_GROUP * WIDTH)[:, None] + column[None, :]
    c += start * stride_c + (head * WIDTH)[:, None] + column[None, :]
    z += start * stride_z + channel
    return x, dt, b, c, z


@triton.jit
def _load_token(
    pointers,
    token,
    live,
    stride_x,
    stride_dt,
    stride_b,
    stride_c,
    stride_z,
    inside,
    mask,
    OUTPUTS: tl.constexpr,
):
    """Load the operands of a later token; zeros unless it is `live`."""
    step = tl.load(pointers[1] + token * stride_dt, mask=inside & live, other=0.0)
    value = tl.load(pointers[0] + token * stride_x, mask=inside & live, other=0.0)
    entry = tl.load(pointers[2] + token * stride_b, mask=mask & live, other=0.0)
    operands = (step, value, entry)
    if OUTPUTS:
        operands += (tl.load(pointers[3] + token * stride_c, mask=mask & live, other=0.0),)
        operands += (tl.load(pointers[4] + token * stride_z, mask=inside & live, other=0.0),)
    return operands


@triton.jit
def _advance(memory, operands, rates, bias):
    """Return the states after a token, and its step size."""
    step = softplus(operands[0].to(tl.float32) + bias)
    added = (step * operands[1].to(tl.float32))[:, None] * operands[2].to(tl.float32)
    return memory * tl.exp2(step[:, None] * rates) + added, step


@triton.jit
def _output(memory, operands, factor):
    """Return the output of a token, from the states after it."""
    y = tl.sum(memory * operands[3].to(tl.float32), axis=1) + factor * operands[1].to(tl.float32)
    gate = operands[4].to(tl.float32)
    return y * (gate * sigmoid(gate))


@triton.jit
def _walk(
    memory,
    pointers,
    out,
    count,
    rates,
    bias,
    factor,
    stride_x,
    stride_dt,
    stride_b,
    stride_c,
    stride_z,
    inside,
    mask,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Process `count` tokens from the pointers on; store the outputs, return the states and the sum of the steps."""
    total = tl.zeros_like(bias)
    ahead = _load_token(
        pointers, 0, count > 0, stride_x, stride_dt, stride_b, stride_c, stride_z, inside, mask, OUTPUTS
    )
    for index in range(count):
        operands = ahead
        token = tl.cast(index + 1, tl.int64)
        ahead = _load_token(
            pointers, token, token < count, stride_x, stride_dt, stride_b, stride_c, stride_z, inside, mask, OUTPUTS
        )
        memory, step = _advance(memory, operands, rates, bias)
        total += step
        if OUTPUTS:
            y = _output(memory, operands, factor)
            tl.store(out + tl.cast(index, tl.int64) * CHANNELS, y.to(out.dtype.element_ty), mask=inside)
    return memory, total


@triton.jit(do_not_specialize=["first"])
def _scan(
    x,
    dt,
    b,
    c,
    z,
    a_log,
    dt_bias,
    d,
    state,
    slots,
    query_start_loc,
    seq_lens,
    out,
    first,
    stride_x,
    stride_dt,
    stride_b,
    stride_c,
    stride_z,
    stride_slot,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    X_GROUP: tl.constexpr,
    B_GROUP: tl.constexpr,
    DECODE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Scan the requests from `first` on, token by token."""
    channel, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    request = first + tl.program_id(1)
    inside = channel < CHANNELS
    mask = inside[:, None] & (column < WIDTH)[None, :]
    rates, bias, factor = _load_constants(a_log, dt_bias, d, channel, column, CHANNELS, WIDTH)
    wait_for_predecessor(PDL)
    if DECODE:
        start = request.to(tl.int64)
        count = 1
    else:
        start = tl.load(query_start_loc + request).to(tl.int64)
        count = tl.load(query_start_loc + request + 1) - start.to(tl.int32)
    if state is None:
        memory = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        state += tl.load(slots + request) * stride_slot + channel[:, None] * WIDTH + column[None, :]
        # A request whose first token is among the new ones starts from zero.
        memory = tl.load(state, mask=mask & (tl.load(seq_lens + request) > count), other=0.0)
    pointers = _pointers(
        x, dt, b, c, z, start, channel, column, stride_x, stride_dt, stride_b, stride_c, stride_z,
        PER_HEAD, WIDTH, X_GROUP, B_GROUP,
    )  # fmt: skip
    out += start * CHANNELS + channel
    if DECODE:
        operands = _load_token(pointers, 0, True, stride_x, stride_dt, stride_b, stride_c, stride_z, inside, mask, True)
        memory, _ = _advance(memory, operands, rates, bias)
        tl.store(out, _output(memory, operands, factor).to(out.dtype.element_ty), mask=inside)
    else:
        memory, _ = _walk(
            memory, pointers, out, count, rates, bias, factor, stride_x, stride_dt, stride_b, stride_c, stride_z,
            inside, mask, CHANNELS, True,
        )  # fmt: skip
    if state is not None:
        tl.debug_barrier()  # if a tile has fewer elements than threads, one thread may load what another stores
        tl.store(state, memory, mask=mask & (count > 0))


@triton.jit
def _first_chunk(query_start_loc, first, request, CHUNK: tl.constexpr):
    """Return the number of a prompt's first chunk; its tokens start at the token `first`."""
    return (tl.load(query_start_loc + first + request) - first) // CHUNK + request


@triton.jit(do_not_specialize=["first", "prompts"])
def _chunk(
    x,
    dt,
    b,
    c,
    z,
    a_log,
    dt_bias,
    d,
    state,
    slots,
    query_start_loc,
    seq_lens,
    out,
    states,
    totals,
    first,
    prompts,
    stride_x,
    stride_dt,
    stride_b,
    stride_c,
    stride_z,
    stride_slot,
    CHANNELS: tl.constexpr,
    PER_HEAD: tl.constexpr,
    WIDTH: tl.constexpr,
    X_GROUP: tl.constexpr,
    B_GROUP: tl.constexpr,
    OUTPUTS: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """With OUTPUTS, compute the outputs of a chunk from the state before it, in `states`.

    Otherwise write the state after the chunk, started from zero, to `states`, and the sum of its steps to `totals`.
    """
    channel, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    number = tl.program_id(1)
    inside = channel < CHANNELS
    mask = inside[:, None] & (column < WIDTH)[None, :]
    rates, bias, factor = _load_constants(a_log, dt_bias, d, channel, column, CHANNELS, WIDTH)
    wait_for_predecessor(PDL)
    # The last request whose first chunk has at most this number.
    low, high = 0, prompts
    while high - low > 1:
        middle = (low + high) // 2
        before = _first_chunk(query_start_loc, first, middle, CHUNK) <= number
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    skipped = (number - _first_chunk(query_start_loc, first, low, CHUNK)) * CHUNK
    start = (tl.load(query_start_loc + first + low) + skipped).to(tl.int64)
    count = tl.minimum(tl.load(query_start_loc + first + low + 1) - start.to(tl.int32), CHUNK)
    if count > 0:
        pointers = _pointers(
            x, dt, b, c, z, start, channel, column, stride_x, stride_dt, stride_b, stride_c, stride_z,
            PER_HEAD, WIDTH, X_GROUP, B_GROUP,
        )  # fmt: skip
        own = states + tl.cast(number, tl.int64) * (CHANNELS * WIDTH) + channel[:, None] * WIDTH + column[None, :]
        memory = tl.load(own, mask=mask & OUTPUTS, other=0.0)
        results = out + start * CHANNELS + channel
        memory, total = _walk(
            memory, pointers, results, count, rates, bias, factor, stride_x, stride_dt, stride_b, stride_c, stride_z,
            inside, mask, CHANNELS, OUTPUTS,
        )  # fmt: skip
        if not OUTPUTS:
            tl.store(own, memory, mask=mask)
            tl.store(totals + tl.cast(number, tl.int64) * CHANNELS + channel, total, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _between_chunks(
    a_log,
    state,
    slots,
    query_start_loc,
    seq_lens,
    states,
    totals,
    first,
    stride_slot,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Replace each chunk's state in `states` by the state before the chunk; write the last state to the slot."""
    channel, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    request = first + tl.program_id(1)
    inside = channel < CHANNELS
    mask = inside[:, None] & (column < WIDTH)[None, :]
    entry = channel[:, None] * WIDTH + column[None, :]
    rates = tl.exp(tl.load(a_log + entry, mask=mask, other=0.0).to(tl.float32)) * -_LOG2_E
    wait_for_predecessor(PDL)
    number = tl.cast(_first_chunk(query_start_loc, first, tl.program_id(1), CHUNK), tl.int64)
    length = tl.load(query_start_loc + request + 1) - tl.load(query_start_loc + request)
    chunks = tl.cdiv(length, CHUNK)
    if state is None:
        memory = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        state += tl.load(slots + request) * stride_slot + entry
        memory = tl.load(state, mask=mask & (tl.load(seq_lens + request) > length), other=0.0)
    states += number * (CHANNELS * WIDTH) + entry
    totals += number * CHANNELS + channel
    added = tl.load(states, mask=mask & (chunks > 0), other=0.0)
    total = tl.load(totals, mask=inside & (chunks > 0), other=0.0)
    for index in range(chunks):
        left, passed = added, total
        after = tl.cast(index + 1, tl.int64)
        added = tl.load(states + after * (CHANNELS * WIDTH), mask=mask & (after < chunks), other=0.0)
        total = tl.load(totals + after * CHANNELS, mask=inside & (after < chunks), other=0.0)
        tl.store(states + tl.cast(index, tl.int64) * (CHANNELS * WIDTH), memory, mask=mask)
        memory = memory * tl.exp2(passed[:, None] * rates) + left
    if state is not None:
        tl.debug_barrier()  # as in _scan
        tl.store(state, memory, mask=mask & (length > 0))
