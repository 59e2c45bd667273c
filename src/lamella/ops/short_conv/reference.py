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
    history: Tensor  # (slots, W-1, C), replaced in place in the rows `slots`
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

    x (T, C); weight (C, W); bias (C,) or None; history (slots, W-1, C), any strides, the inputs before this call,
    oldest first, replaced in place in the rows `slots` (R,) int64 (rows before a request's first token become zero).
    Without a history every request starts from nothing. Returns (T, C) in the dtype of x.
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
            row = (width - 1 - offset + local).clamp(max=width - 2)
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
    """The last W-1 rows of [old | new tokens] of each request; old (R, W-1, C)."""
    rows = old.shape[1]
    row = torch.arange(rows, device=x.device)
    bounds = batch.query_start_loc
    lengths = (bounds[1:] - bounds[:-1])[:, None]
    local = lengths - rows + row  # index among the new tokens; negative: still an old row
    fresh = x[(bounds[:-1, None] + local).clamp(min=0)]
    kept = old.gather(1, (row + lengths).clamp(max=rows - 1)[:, :, None].expand(-1, -1, old.shape[2]).long())
    state = torch.where((local >= 0)[:, :, None], fresh.to(old.dtype), kept)
    born = batch.seq_lens[:, None] - rows + row >= 0
    return torch.where(born[:, :, None], state, 0.0)
