"""Selective scan of "The Mamba in the Llama" over a ragged batch in plain torch, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import read_states


def step_size(dt: Tensor, dt_bias: Tensor | None) -> Tensor:
    """Return `softplus(dt + dt_bias)` in fp32."""
    return softplus(dt.float() if dt_bias is None else dt.float() + dt_bias.float())


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
    """Update each head's state S (P, N) token by token; in fp32, rounded once.

    With `delta = softplus(dt + dt_bias)` and `A = -exp(a_log)`, each token computes `S <- exp(delta A) S + delta x b^T`
    (elementwise; delta and x per channel P), and its output is `(S c + d x) silu(z)`.

    Mamba (https://arxiv.org/abs/2312.00752) with the heads of the attention that it replaces
    (https://arxiv.org/abs/2408.15237).

    Args:
        x: (T, X, P); head h reads x of `h // (H / X)`.
        dt: (T, H, P).
        b: (T, G, N); head h reads b of `h // (H / G)`.
        c: (T, H, N).
        z: (T, H, P).
        a_log: (H, P, N) fp32.
        dt_bias: (H, P) fp32, or None.
        d: (H, P) fp32.
        batch: lengths of the requests.
        state: matrices (slots, H, P, N) fp32, contiguous within a slot, updated in place. A request whose first token
            is among the new ones starts from zero, whatever its slot contains. With None every request does.
        out: (T, H, P) contiguous, is written; None to allocate it.

    Returns:
        (T, H, P) in the dtype of x.
    """
    heads = dt.shape[1]
    x_fp32 = x.float().repeat_interleave(heads // x.shape[1], 1)
    delta = step_size(dt, dt_bias)
    rate = -a_log.float().exp()
    inputs, outputs = b.float().repeat_interleave(heads // b.shape[1], 1), c.float()
    memory = read_states(batch, state, tuple(a_log.shape))
    out = torch.empty(dt.shape, dtype=x.dtype, device=x.device) if out is None else out
    starts, lengths = batch.query_start_loc[:-1], batch.query_start_loc.diff()
    for step in range(int(lengths.max())):
        active = (lengths > step).nonzero()[:, 0]
        token = starts[active] + step
        now = memory[active] * (delta[token][..., None] * rate).exp()
        now = now + (delta[token] * x_fp32[token])[..., None] * inputs[token][:, :, None, :]
        y = torch.einsum("rhpn,rhn->rhp", now, outputs[token]) + d.float() * x_fp32[token]
        out[token] = (y * silu(z[token].float())).to(x.dtype)
        memory[active] = now
    if state is not None:
        state.matrix[state.slots] = memory
    return out
