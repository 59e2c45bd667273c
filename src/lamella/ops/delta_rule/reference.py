"""Gated delta rule over a ragged batch in plain torch, token by token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.ragged_chunks import read_states

L2_EPS = 1e-6


def log_decay(decay: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return `-exp(a_log) * softplus(decay + dt_bias)` in fp32; never positive.

    Args:
        decay: (T, HV) or (T, HV, DK).
        a_log: (HV,) fp32.
        dt_bias: (HV,) or (HV, DK) fp32.

    Returns:
        The shape of `decay`.
    """
    rate = a_log.float().exp()
    return -(rate if decay.dim() == 2 else rate[:, None]) * softplus(decay.float() + dt_bias.float())


def l2_norm(x: Tensor) -> Tensor:
    """Return `x / sqrt(sum(x^2) + 1e-6)` over the last dimension, in fp32; zero vectors stay zero."""
    x_fp32 = x.float()
    return x_fp32 * torch.rsqrt(x_fp32.square().sum(-1, keepdim=True) + L2_EPS)


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
) -> Tensor:
    """Update each value head's matrix S (DK, DV) token by token; in fp32, rounded once.

    With q and k l2-normalized, q scaled by DK^-0.5, `g = -exp(a_log) * softplus(decay + dt_bias)` and
    `b = sigmoid(beta)`, each token computes `S <- exp(g) S` (one factor per head, or one per row of S),
    `u = b (v - S^T k)`, `S <- S + k u^T`, and its output is `S^T q`.

    Gated DeltaNet: https://arxiv.org/abs/2412.06464; a decay per key channel: Kimi Delta Attention,
    https://arxiv.org/abs/2510.26692.

    Args:
        q: (T, HK, DK).
        k: (T, HK, DK).
        v: (T, HV, DV); value head h reads key head `h // (HV / HK)`.
        decay: (T, HV) or (T, HV, DK).
        beta: (T, HV).
        a_log: (HV,) fp32.
        dt_bias: (HV,) or (HV, DK) fp32.
        batch: lengths of the requests.
        state: matrices (slots, HV, DK, DV) fp32, contiguous within a slot, updated in place. A request whose first
            token is among the new ones starts from zero, whatever its slot contains. With None every request does.
        out: (T, HV, DV) contiguous, is written; None to allocate it.

    Returns:
        (T, HV, DV) in the dtype of v.
    """
    group = v.shape[1] // q.shape[1]
    q_fp32 = (l2_norm(q) * q.shape[-1] ** -0.5).repeat_interleave(group, 1)
    k_fp32 = l2_norm(k).repeat_interleave(group, 1)
    factor = log_decay(decay, a_log, dt_bias).exp()
    factor = factor[..., None, None] if decay.dim() == 2 else factor[..., None]
    rate = beta.float().sigmoid()[..., None]
    memory = read_states(batch, state, (v.shape[1], q.shape[2], v.shape[2]))
    out = torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out
    starts, lengths = batch.query_start_loc[:-1], batch.query_start_loc.diff()
    for step in range(int(lengths.max())):
        active = (lengths > step).nonzero()[:, 0]
        token = starts[active] + step
        now = memory[active] * factor[token]
        kept = torch.einsum("rhkv,rhk->rhv", now, k_fp32[token])
        update = rate[token] * (v[token].float() - kept)
        now = now + k_fp32[token][..., None] * update[:, :, None, :]
        out[token] = torch.einsum("rhkv,rhk->rhv", now, q_fp32[token]).to(v.dtype)
        memory[active] = now
    if state is not None:
        state.matrix[state.slots] = memory
    return out
