"""Selective scan chunk by chunk: all work except one multiply-add per token is done for a whole chunk at once.

Every entry of a state has its own decay, so the tokens of a chunk cannot be combined by a matrix product as for a decay
per head. Decays are exponentiated token by token and multiplied, so that nothing overflows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import iterate_chunks, longest_first, read_states, split_by_kind
from lamella.ops.selective_scan.reference import step_size

CHUNK = 64
CHUNK_ENTRIES = 1 << 20  # state entries of all tokens of a chunk together, so that they fit into the CPU's cache


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
    """Compute `reference.selective_scan`. The host reads the lengths, unless every request has one new token."""
    out = torch.empty(dt.shape, dtype=x.dtype, device=x.device) if out is None else out
    for decode, rows, part in split_by_kind(batch):
        some = None if state is None else state.of_requests(rows)
        of_tokens = x[rows], dt[rows], b[rows], c[rows], z[rows]
        operands = *of_tokens, a_log, dt_bias, d, part, some, out[rows]
        _step(*operands) if decode else _prefill(*operands)
    return out


def _step(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor | None,
    d: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
) -> None:
    """Compute one new token of each request."""
    heads = dt.shape[1]
    x_fp32 = x.float().repeat_interleave(heads // x.shape[1], 1)
    delta = step_size(dt, dt_bias)
    inputs = b.float().repeat_interleave(heads // b.shape[1], 1)[:, :, None]
    memory = read_states(batch, state, tuple(a_log.shape))
    memory *= (delta[..., None] * -a_log.float().exp()).exp_()
    memory.addcmul_((delta * x_fp32)[..., None], inputs)
    y = (memory @ c.float()[..., None])[..., 0] + d.float() * x_fp32
    out.copy_(y * silu(z.float()))
    if state is not None:
        state.matrix[state.slots] = memory


def _prefill(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    z: Tensor,
    a_log: Tensor,
    dt_bias: Tensor | None,
    d: Tensor,
    batch: RaggedBatch,
    state: RecurrentState | None,
    out: Tensor,
) -> None:
    """Compute all requests and heads at once, token by token."""
    heads, rate = dt.shape[1], -a_log.float().exp()
    order = longest_first(batch)
    memory = read_states(batch, state, tuple(a_log.shape))[order]
    for chunk in iterate_chunks(batch, order, max(1, min(CHUNK, CHUNK_ENTRIES // memory.numel()))):
        x_fp32 = chunk.gather(x).repeat_interleave(heads // x.shape[1], 1)
        bias = None if dt_bias is None else dt_bias[:, None]
        delta = chunk.zero_padding(step_size(chunk.gather(dt), bias))
        inputs = chunk.gather(b).repeat_interleave(heads // b.shape[1], 1)
        # (width, n, H, P, N): the entries of a token are contiguous.
        decays = _tokens_first(delta)[..., None].mul(rate).exp_()
        states = _tokens_first(delta * x_fp32)[..., None] * _tokens_first(inputs)[..., None, :]
        now = memory[: chunk.requests]
        for token in range(states.shape[0]):
            now = states[token].addcmul_(decays[token], now)
        memory[: chunk.requests] = now
        y = (states @ _tokens_first(chunk.gather(c))[..., None])[..., 0].movedim(0, 2) + d.float()[:, None] * x_fp32
        chunk.scatter(out, y * silu(chunk.gather(z)))
    if state is not None:
        state.matrix[state.slots[order]] = memory


def _tokens_first(x: Tensor) -> Tensor:
    return x.movedim(2, 0)
