"""The short causal convolution over a ragged batch in plain torch, without a loop over requests."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lamella.ops.ragged import RaggedBatch


class ConvStep(NamedTuple):
    """What the convolution of a step is given beside its input, where every request has one new token."""

    weight: Tensor  # (C, W)
    bias: Tensor | None  # (C,)
    history: Tensor  # (slots, W-1, C), of which the rows `slots` take up x
    slots: Tensor  # (T,) int64
    activation: bool
    residual: bool


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    batch: RaggedBatch,
    history: Tensor | None = None,
    slots: Tensor | None = None,
    *,
    activation: bool = False,
    residual: bool = False,
) -> Tensor:
    """Depthwise causal convolution, continued from what each request saw before.

    `c_t = bias + sum_o weight[:, W-1-o] * x_{t-o}` with taps o = 0..W-1, where a tap counts only if o <= the token's
    absolute position: whatever an old request left in a slot can never be seen. Then `silu(c)` if `activation`, and
    `x + c` if `residual`. Arithmetic in fp32, rounded once.

    x (T, C); weight (C, W); bias (C,) or None; history (slots, W-1, C), any strides, of which the rows `slots` (R,)
    int64 are the requests': rings of their latest inputs, that at position p in row p % (W-1). The call writes what it
    is given there, and zeros for what stands before a request's first token. Without a history every request starts
    from nothing. Returns (T, C) in the dtype of x.
    """
    width, num_tokens = weight.shape[1], x.shape[0]
    taps, wide = weight.float(), x.float()
    index = torch.arange(num_tokens, device=x.device)
    local = index - batch.query_start_loc[batch.token_request]
    total = wide * taps[:, width - 1]
    for offset in range(1, width):
        tap = wide[(index - offset).clamp(min=0)]
        inside = (local >= offset)[:, None]
        seen = (batch.positions >= offset)[:, None]
        if history is None:
            seen = seen & inside
        else:
            assert slots is not None
            row = (batch.positions - offset) % (width - 1)
            tap = torch.where(inside, tap, history[slots[batch.token_request], row].float())
        total = total + torch.where(seen, tap * taps[:, width - 1 - offset], 0.0)
    if bias is not None:
        total = total + bias.float()
    if activation:
        total = torch.nn.functional.silu(total)
    if residual:
        total = total + wide
    if history is not None:
        assert slots is not None
        history[slots] = _next_history(x, batch, history[slots])
    return total.to(x.dtype)


def _next_history(x: Tensor, batch: RaggedBatch, old: Tensor) -> Tensor:
    """The rings `old` (R, W-1, C) with each request's new tokens."""
    rows = old.shape[1]
    row = torch.arange(rows, device=x.device)
    bounds = batch.query_start_loc
    last = batch.seq_lens[:, None] - 1
    position = last - (last - row) % rows  # the latest that belongs into each row; negative: there is none yet
    local = position - last - 1 + bounds.diff()[:, None]  # among the new tokens; negative: it is there already
    fresh = x[(bounds[:-1, None] + local).clamp(min=0)]
    state = torch.where((local >= 0)[:, :, None], fresh.to(old.dtype), old)
    return torch.where((position >= 0)[:, :, None], state, 0.0)
