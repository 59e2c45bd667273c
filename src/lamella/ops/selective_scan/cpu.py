"""The selective scan chunk by chunk: all but one multiply-add of a token is done for a whole chunk at once.

Every entry of a state has a decay of its own, so that no product of matrices stands for the tokens of a chunk, as it
does where a head decays as one. Decays are exponentiated token by token, and multiplied: nothing can overflow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import by_kind, longest_first, read_states, walk
from lamella.ops.selective_scan.reference import step_size

CHUNK = 64
CHUNK_ENTRIES = 1 << 20  # of the states that a chunk holds for all its tokens at once: what a cache has room for


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
    """See `reference.selective_scan`; the result is in `out` (T, H, P) where that is given.

    The host reads the lengths, unless every request has one new token.
    """
    out = torch.empty(dt.shape, dtype=x.dtype, device=x.device) if out is None else out
    for decode, rows, part in by_kind(batch):
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
    """One new token of each request."""
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
    """All requests and heads at once, token after token."""
    heads, rate = dt.shape[1], -a_log.float().exp()
    order = longest_first(batch)
    memory = read_states(batch, state, tuple(a_log.shape))[order]
    for chunk in walk(batch, order, max(1, min(CHUNK, CHUNK_ENTRIES // memory.numel()))):
        x_fp32 = chunk.take(x).repeat_interleave(heads // x.shape[1], 1)
        bias = None if dt_bias is None else dt_bias[:, None]
        delta = chunk.blank(step_size(chunk.take(dt), bias))
        inputs = chunk.take(b).repeat_interleave(heads // b.shape[1], 1)
        # (width, n, H, P, N): the entries of a token lie together.
        decays = _tokens_first(delta)[..., None].mul(rate).exp_()
        states = _tokens_first(delta * x_fp32)[..., None] * _tokens_first(inputs)[..., None, :]
        now = memory[: chunk.requests]
        for token in range(states.shape[0]):
            now = states[token].addcmul_(decays[token], now)
        memory[: chunk.requests] = now
        y = (states @ _tokens_first(chunk.take(c))[..., None])[..., 0].movedim(0, 2) + d.float()[:, None] * x_fp32
        chunk.put(out, y * silu(chunk.take(z)))
    if state is not None:
        state.matrix[state.slots[order]] = memory


def _tokens_first(x: Tensor) -> Tensor:
    return x.movedim(2, 0)
