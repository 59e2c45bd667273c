"""cos and sin of RoPE, and temperatures, in one Triton launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamella.ops.launch import cdiv, dependent_launch, next_power_of_2, wait_for_predecessor


def angles(
    positions: Tensor, frequencies: Tensor, magnitude: float, period: int | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `reference.angles`."""
    tokens, pairs = positions.shape[0], frequencies.shape[0]
    assert frequencies.dtype == torch.float32 and frequencies.is_contiguous() and positions.is_contiguous()
    # Separate tensors: outputs of a torch operation must not share memory.
    cos, sin = (torch.empty(tokens, pairs, dtype=torch.float32, device=positions.device) for _ in range(2))
    padded = next_power_of_2(pairs)
    rows = max(1, 512 // padded)
    _angles[(cdiv(tokens, rows),)](
        positions, frequencies, cos, sin, tokens, magnitude, PERIOD=period or 0, PAIRS=pairs,
        PADDED=padded, ROWS=rows, **dependent_launch(positions),
    )  # fmt: skip
    return cos, sin


@triton.jit
def _angles(
    positions_ptr, frequencies_ptr, cos_ptr, sin_ptr, tokens, magnitude,
    PERIOD: tl.constexpr, PAIRS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows, pairs = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    mask = (rows < tokens)[:, None] & (pairs < PAIRS)[None, :]
    frequencies = tl.load(frequencies_ptr + pairs, mask=pairs < PAIRS, other=0.0)
    wait_for_predecessor(PDL)
    positions = tl.load(positions_ptr + rows, mask=rows < tokens, other=0)
    if PERIOD > 0:
        positions %= PERIOD
    turns = positions.to(tl.float32)[:, None] * frequencies[None, :]
    offsets = rows.to(tl.int64)[:, None] * PAIRS + pairs[None, :]
    tl.store(cos_ptr + offsets, tl.cos(turns) * magnitude, mask=mask)
    tl.store(sin_ptr + offsets, tl.sin(turns) * magnitude, mask=mask)


def temperature(positions: Tensor, scale: float, floor_scale: int) -> Tensor:
    """Compute `reference.temperature`."""
    assert positions.is_contiguous()
    out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
    block = 256
    _temperature[(cdiv(positions.shape[0], block),)](
        positions, out, positions.shape[0], scale, FLOOR_SCALE=floor_scale, BLOCK=block, **dependent_launch(positions)
    )
    return out


@triton.jit
def _temperature(
    positions_ptr, out_ptr, tokens, scale, FLOOR_SCALE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait_for_predecessor(PDL)
    positions = tl.load(positions_ptr + rows, mask=rows < tokens, other=0)
    steps = (positions + 1) // FLOOR_SCALE
    tl.store(out_ptr + rows, 1.0 + scale * tl.log(1.0 + steps.to(tl.float32)), mask=rows < tokens)
