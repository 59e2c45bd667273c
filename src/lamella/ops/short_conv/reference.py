"""Short causal convolution over a ragged batch in plain torch, without a loop over requests."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import ConvState, ConvWeights, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import add_rms_norm
from lamella.ops.swiglu.reference import swiglu


def short_conv(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute the depthwise causal convolution in fp32, rounded once.

    `c_t = bias + sum_o weight[:, W-1-o] * x_{t-o}` with taps o = 0..W-1. A tap counts only if o <= the token's absolute
    position, so that inputs of an earlier request in the slot are never read. Then `silu(c)` with `conv.activation`,
    and `x + c` with `conv.residual`.

    The new inputs are written to the slots of `state`, and zeros for positions before a request's first token. The
    arguments are those of `lamella.ops.short_conv.short_conv`.
    """
    (weight, bias, activation, residual), num_tokens = conv, x.shape[0]
    width = weight.shape[1]
    taps, x_fp32 = weight.float(), x.float()
    index = torch.arange(num_tokens, device=x.device)
    local = index - batch.query_start_loc[batch.token_request]
    total = x_fp32 * taps[:, width - 1]
    for offset in range(1, width):
        tap = x_fp32[(index - offset).clamp(min=0)]
        inside = (local >= offset)[:, None]
        seen = (batch.positions >= offset)[:, None]
        if state is None:
            seen = seen & inside
        else:
            row = (batch.positions - offset) % (width - 1)
            tap = torch.where(inside, tap, state.history[state.slots[batch.token_request], row].float())
        total = total + torch.where(seen, tap * taps[:, width - 1 - offset], 0.0)
    if bias is not None:
        total = total + bias.float()
    if activation:
        total = torch.nn.functional.silu(total)
    if residual:
        total = total + x_fp32
    if state is not None:
        state.history[state.slots] = _next_history(x, batch, state.history[state.slots])
    y = total.to(x.dtype)
    return y if out is None else out.copy_(y)


def short_conv_swiglu(
    x: Tensor, conv: ConvWeights, batch: RaggedBatch, state: ConvState | None = None, out: Tensor | None = None
) -> Tensor:
    """Compute `short_conv` of x (T, 2 * I) and then `swiglu`; return (T, I)."""
    y = swiglu(short_conv(x, conv, batch, state))
    return y if out is None else out.copy_(y)


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
    """Compute `add_rms_norm(x, norm)` and then `short_conv`; return the result and the residual. `early` is unused."""
    normed, new_residual = add_rms_norm(x, norm)
    y = short_conv(normed, conv, batch, state, out)
    return y, new_residual if total is None else total.copy_(new_residual)


def _next_history(x: Tensor, batch: RaggedBatch, old: Tensor) -> Tensor:
    """Return the ring buffers `old` (R, W-1, C) updated by each request's new tokens."""
    rows = old.shape[1]
    row = torch.arange(rows, device=x.device)
    bounds = batch.query_start_loc
    last = batch.seq_lens[:, None] - 1
    position = last - (last - row) % rows  # latest position stored in each row; negative if there is none yet
    local = position - last - 1 + bounds.diff()[:, None]  # index among the new tokens; negative if the row is unchanged
    fresh = x[(bounds[:-1, None] + local).clamp(min=0)]
    state = torch.where((local >= 0)[:, :, None], fresh.to(old.dtype), old)
    return torch.where((position >= 0)[:, :, None], state, 0.0)
