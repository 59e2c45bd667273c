"""Convolution windows in slots with spare rows, for speculation."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import ConvState
from lamella.vllm_plugin.state.metadata import StateMetadata


def advance_window(
    state: ConvState,
    size: int,
    x: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    metadata: StateMetadata,
) -> ConvState:
    """Return the window of each request before the step, and prepare the slots for the next step.

    The rows of a slot are in order, not a ring buffer, as vLLM expects when it copies them. Before the call a slot
    holds the inputs of the last step, starting with the window of that step's second token. Only the inputs of accepted
    tokens are valid. The host does not wait for the device.

    Args:
        state: rows (slots, size + spare, C), which are written, and the slots (R,).
        size: number of inputs in a window.
        x: (T, C) new inputs.
        query_start_loc: (R + 1,) first token of each request.
        positions: (T,) positions of the tokens.
        metadata: metadata of the step.

    Returns:
        The `size` inputs before each request's new ones as ring buffers (R, size, C), see `short_conv`, and their
        indices (R,).
    """
    rows, slots = state
    requests, device = slots.shape[0], rows.device
    index = torch.arange(rows.shape[1], device=device)
    skipped, first = metadata.skipped_and_first(query_start_loc)
    stored = rows[slots]  # (R, size + spare, C)

    def window(entry: Tensor) -> Tensor:
        """Return some of the inputs before each request's new ones, (R, entries, C)."""
        return stored.gather(1, (skipped[:, None] + entry)[:, :, None].expand(-1, -1, rows.shape[2]))

    position = positions[query_start_loc[:-1].clamp(max=x.shape[0] - 1)]
    history = window((index[:size] - position[:, None]) % size)
    # Row i becomes entry first + i of [window | new inputs].
    entry = first[:, None] + index
    new = (query_start_loc[:-1, None] + entry - size).clamp(0, x.shape[0] - 1)
    old = window(entry.clamp(max=size - 1))
    kept = torch.where((entry < size)[:, :, None], old, x[new])
    length = query_start_loc.diff()
    rows[slots] = torch.where((entry < size + length[:, None])[:, :, None], kept, stored)
    return ConvState(history, torch.arange(requests, device=device))
