"""Gated delta rule in Triton: token by token, with a tile of the state in registers.

A program processes some columns of one value head's state for all new tokens of a request; columns are independent. A
decode step is bound by reading and writing the state once. Long prompts are faster in chunks (see `fla`), and use this
kernel only if `fla` is not available.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.arithmetic import sigmoid, softplus, sum_three, sum_two
from lamella.ops.delta_rule import fla
from lamella.ops.delta_rule.reference import L2_EPS
from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch

MAX_KEY_DIM = 256
# Columns of the state per program: rows of 64 bytes, in as many registers per thread as are available. Both depend on
# the sizes of a head only, so that a token's bits do not depend on the number of other tokens.
COLUMNS = 16
ENTRIES_PER_WARP = 1024
GATE_BLOCK = 1024


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
    *,
    chunked: bool | None = None,
) -> Tensor:
    """Compute `reference.delta_rule` for DK <= 256. Operands may have any stride over tokens; `out` is contiguous.

    Decodes have their own launch, so that their bits do not depend on prompts in the batch. Prompts use the chunked
    kernels of `fla` if `chunked` is True; by default if these kernels are available and faster.
    """
    tokens, heads, value_dim = v.shape
    key_heads, key_dim = q.shape[1:]
    assert q.shape == k.shape == (tokens, key_heads, key_dim) and heads % key_heads == 0 and key_dim <= MAX_KEY_DIM
    assert decay.shape[:2] == beta.shape == (tokens, heads) and decay.shape[2:] in ((), (key_dim,))
    assert a_log.shape == (heads,) and dt_bias.shape == decay.shape[1:]
    assert a_log.is_contiguous() and dt_bias.is_contiguous()
    assert tokens == batch.num_tokens and all(x[:1].is_contiguous() for x in (q, k, v, decay, beta))
    if state is not None:
        matrix, slots = state
        assert matrix.dtype == torch.float32 and matrix.shape[1:] == (heads, key_dim, value_dim)
        assert matrix[:1].is_contiguous() and slots.shape == (batch.num_requests,) and slots.is_contiguous()
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device) if out is None else out
    assert y.shape == v.shape and y.dtype == v.dtype and y.is_contiguous()
    operands = q, k, v, decay, beta, a_log, dt_bias, batch, state, y
    decodes = batch.num_decodes
    if decodes:
        _launch(*operands, 0, decodes, decode=True)
    if decodes < batch.num_requests:
        if chunked is None:
            chunked = fla.serves(v, key_dim, tokens - decodes, batch.num_requests - decodes)
        if chunked:
            logs, rates = gates(decay[decodes:], beta[decodes:], a_log, dt_bias)
            fla.delta_rule(q[decodes:], k[decodes:], v[decodes:], logs, rates, batch, state, y[decodes:])
        else:
            _launch(*operands, decodes, batch.num_requests - decodes, decode=False)
    return y


def gates(decay: Tensor, beta: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return `reference.log_decay` (T, HV) or (T, HV, DK), and `sigmoid(beta)` (T, HV); fp32, contiguous."""
    tokens, heads = beta.shape
    channels = decay[0, 0].numel()
    logs = torch.empty(decay.shape, dtype=torch.float32, device=decay.device)
    rates = torch.empty(beta.shape, dtype=torch.float32, device=beta.device)
    width = heads * channels
    _gates[(tokens, cdiv(width, GATE_BLOCK))](
        decay,
        beta,
        a_log,
        dt_bias,
        logs,
        rates,
        decay.stride(0),
        beta.stride(0),
        HEADS=heads,
        CHANNELS=channels,
        COLUMNS=min(GATE_BLOCK, next_power_of_2(width)),
        num_warps=4,
        **dependent_launch(decay),
    )
    return logs, rates


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
    first: int,
    count: int,
    *,
    decode: bool,
) -> None:
    """Launch the kernel for `count` requests from `first` on."""
    (_, heads, value_dim), (_, key_heads, key_dim) = v.shape, q.shape
    rows, columns = next_power_of_2(key_dim), min(COLUMNS, next_power_of_2(value_dim))
    blocks = cdiv(value_dim, columns)
    matrix, slots = state or (None, None)
    _delta_rule[(heads * blocks, count)](
        q,
        k,
        v,
        decay,
        beta,
        a_log,
        dt_bias,
        matrix,
        slots,
        batch.query_start_loc,
        batch.seq_lens,
        out,
        first,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        decay.stride(0),
        beta.stride(0),
        0 if matrix is None else matrix.stride(0),
        key_dim**-0.5,
        L2_EPS,
        HEADS=heads,
        GROUP=heads // key_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BY_CHANNEL=decay.dim() == 3,
        DECODE=decode,
        BLOCKS=blocks,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(1, rows * columns // ENTRIES_PER_WARP),
        **dependent_launch(v),
    )


@triton.jit
def log_decay(decay, rate, bias):
    """Return `reference.log_decay`; rate is exp(a_log)."""
    return -rate * softplus(decay.to(tl.float32) + bias)


@triton.jit
def _load_token(
    q,
    k,
    v,
    decay,
    beta,
    token,
    live,
    stride_q,
    stride_k,
    stride_v,
    stride_decay,
    stride_beta,
    row_mask,
    column_mask,
    BY_CHANNEL: tl.constexpr,
):
    """Load a token's operands of a head from pointers to the first token; zeros unless it is `live`."""
    keys = tl.load(k + token * stride_k, mask=row_mask & live, other=0.0)
    queries = tl.load(q + token * stride_q, mask=row_mask & live, other=0.0)
    values = tl.load(v + token * stride_v, mask=column_mask & live, other=0.0)
    if BY_CHANNEL:
        decays = tl.load(decay + token * stride_decay, mask=row_mask & live, other=0.0)
    else:
        decays = tl.load(decay + token * stride_decay, mask=live, other=0.0)
    return queries, keys, values, decays, tl.load(beta + token * stride_beta, mask=live, other=0.0)


@triton.jit
def _step(memory, operands, rate, bias, scale, eps, BY_CHANNEL: tl.constexpr):
    """Return the state after a token (rows, columns) and the output (columns,), fp32.

    All sums read the old state, and the norms are applied to their results, so that the sums do not wait for each
    other.
    """
    q, k, v = operands[0].to(tl.float32), operands[1].to(tl.float32), operands[2].to(tl.float32)
    factor = tl.exp(log_decay(operands[3], rate, bias))
    key_square, query_square, product = sum_three(k * k, q * q, q * k)
    found_key, found_query = sum_two(memory * (k * factor)[:, None], memory * (q * factor)[:, None])
    key_norm = tl.rsqrt(key_square + eps)
    query_norm = tl.rsqrt(query_square + eps) * scale
    update = sigmoid(operands[4].to(tl.float32)) * (v - found_key * key_norm)
    if BY_CHANNEL:
        memory *= factor[:, None]
    else:
        memory *= factor
    memory += (k * key_norm)[:, None] * update[None, :]
    return memory, (found_query + product * key_norm * update) * query_norm


@triton.jit(do_not_specialize=["first"])
def _delta_rule(
    q,
    k,
    v,
    decay,
    beta,
    a_log,
    dt_bias,
    state,
    slots,
    query_start_loc,
    seq_lens,
    out,
    first,
    stride_q,
    stride_k,
    stride_v,
    stride_decay,
    stride_beta,
    stride_slot,
    scale,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BY_CHANNEL: tl.constexpr,
    DECODE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    head = tl.program_id(0) // BLOCKS
    request = first + tl.program_id(1)
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    row_mask, column_mask = row < KEY_DIM, column < VALUE_DIM
    mask = row_mask[:, None] & column_mask[None, :]
    rate = tl.exp(tl.load(a_log + head).to(tl.float32))
    if BY_CHANNEL:
        bias = tl.load(dt_bias + head * KEY_DIM + row, mask=row_mask, other=0.0).to(tl.float32)
    else:
        bias = tl.load(dt_bias + head).to(tl.float32)
    wait_for_predecessor(PDL)
    if DECODE:
        start = request.to(tl.int64)
        count = 1
    else:
        start = tl.load(query_start_loc + request).to(tl.int64)
        count = tl.load(query_start_loc + request + 1) - start.to(tl.int32)
    q += start * stride_q + head // GROUP * KEY_DIM + row
    k += start * stride_k + head // GROUP * KEY_DIM + row
    v += start * stride_v + head * VALUE_DIM + column
    beta += start * stride_beta + head
    if BY_CHANNEL:
        decay += start * stride_decay + head * KEY_DIM + row
    else:
        decay += start * stride_decay + head
    out += (start * HEADS + head) * VALUE_DIM + column
    if state is None:
        memory = tl.zeros((ROWS, COLUMNS), tl.float32)
    else:
        state += tl.load(slots + request) * stride_slot + head * (KEY_DIM * VALUE_DIM)
        state += row[:, None] * VALUE_DIM + column[None, :]
        # A request whose first token is among the new ones starts from zero.
        memory = tl.load(state, mask=mask & (tl.load(seq_lens + request) > count), other=0.0)
    ahead = _load_token(
        q, k, v, decay, beta, 0, count > 0, stride_q, stride_k, stride_v, stride_decay, stride_beta,
        row_mask, column_mask, BY_CHANNEL,
    )  # fmt: skip
    if DECODE:
        memory, y = _step(memory, ahead, rate, bias, scale, eps, BY_CHANNEL)
        tl.store(out, y.to(out.dtype.element_ty), mask=column_mask)
    else:
        for index in range(count):
            operands = ahead
            token = tl.cast(index + 1, tl.int64)
            ahead = _load_token(
                q, k, v, decay, beta, token, token < count, stride_q, stride_k, stride_v, stride_decay, stride_beta,
                row_mask, column_mask, BY_CHANNEL,
            )  # fmt: skip
            memory, y = _step(memory, operands, rate, bias, scale, eps, BY_CHANNEL)
            tl.store(out + tl.cast(index, tl.int64) * (HEADS * VALUE_DIM), y.to(out.dtype.element_ty), mask=column_mask)
    if state is not None:
        tl.debug_barrier()  # if a tile has fewer elements than threads, one thread may load what another stores
        tl.store(state, memory, mask=mask & (count > 0))


@triton.jit
def _gates(
    decay,
    beta,
    a_log,
    dt_bias,
    logs,
    rates,
    stride_decay,
    stride_beta,
    HEADS: tl.constexpr,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < HEADS * CHANNELS
    rate = tl.exp(tl.load(a_log + column // CHANNELS, mask=mask, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + column, mask=mask, other=0.0).to(tl.float32)
    wait_for_predecessor(PDL)
    value = log_decay(tl.load(decay + token * stride_decay + column, mask=mask, other=0.0), rate, bias)
    tl.store(logs + token * (HEADS * CHANNELS) + column, value, mask=mask)
    own = column < HEADS
    rate = sigmoid(tl.load(beta + token * stride_beta + column, mask=own, other=0.0).to(tl.float32))
    tl.store(rates + token * HEADS + column, rate, mask=own)
