"""Steps in which slot state is kept in the middle of a chunk: what reads or writes it is computed piece by piece.

A convolution alone needs no pieces: its state at a token is its latest inputs there, which are copied from its input.

Everything else of the step, projections and attention, is computed for whole chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lamella.layers.context import ForwardBatch
from lamella.ops.ragged import RaggedBatch


@dataclass(frozen=True)
class Segment:
    """The n-th piece of each request that has one.

    Attributes:
        batch: the pieces, as requests of a batch of their own.
        tokens: the pieces' tokens in the whole batch, a range or indices (n,) int64.
        copies: slots (k, 2) int64 to copy afterwards, from and to; None without any.
    """

    batch: ForwardBatch
    tokens: slice | Tensor
    copies: Tensor | None


def segments(batch: ForwardBatch) -> Sequence[Segment]:
    """Return the segments of a batch with `snapshots`, made once for all layers."""
    return batch.once("segments", lambda: _divide(batch))


def windows(batch: ForwardBatch, length: int) -> tuple[Tensor, Tensor] | None:
    """Return where a convolution's inputs before each of the batch's `snapshots` are, made once for all layers.

    Args:
        batch: with `snapshots`.
        length: inputs that a slot keeps; that of position p is in row `p % length`.

    Returns:
        Indices of the inputs in the whole batch (k, length) int64, and the slots (k,) int64 that they are copied to;
        None if a window begins before its chunk.
    """
    return batch.once(("windows", length), lambda: _find_windows(batch, length))


def _find_windows(batch: ForwardBatch, length: int) -> tuple[Tensor, Tensor] | None:
    whole, tokens, slots = batch.ragged, [], []
    start, device = 0, whole.positions.device
    for new, context, snapshots in zip(whole.query_lens, whole.context_lens, batch.snapshots, strict=True):
        computed = context - new
        for offset, slot in snapshots:
            if offset < length:
                return None
            last = computed + offset - 1
            tokens.append([start + offset - 1 - (last - row) % length for row in range(length)])
            slots.append(slot)
        start += new
    return torch.tensor(tokens).to(device, non_blocking=True), torch.tensor(slots).to(device, non_blocking=True)


def _divide(batch: ForwardBatch) -> list[Segment]:
    assert batch.slots is not None
    whole, device = batch.ragged, batch.ragged.positions.device
    starts = [0, *accumulate(whole.query_lens)]
    bounds = [
        [0, *(offset for offset, _ in snapshots), length]
        for snapshots, length in zip(batch.snapshots, whole.query_lens, strict=True)
    ]
    found = []
    for number in range(max(map(len, bounds)) - 1):
        pieces = [
            (request, each[number], each[number + 1]) for request, each in enumerate(bounds) if number + 1 < len(each)
        ]
        pieces.sort(key=lambda piece: piece[2] - piece[1] != 1)  # decodes first, see RaggedBatch
        before = [whole.context_lens[r] - whole.query_lens[r] for r, _, _ in pieces]
        ragged = RaggedBatch.from_lengths(
            [stop - start for _, start, stop in pieces],
            [computed + stop for computed, (_, _, stop) in zip(before, pieces, strict=True)],
            device,
        )
        spans = [range(starts[r] + start, starts[r] + stop) for r, start, stop in pieces]
        requests = torch.tensor([r for r, _, _ in pieces]).to(device, non_blocking=True)
        saved = [
            (row, batch.snapshots[r][number][1])
            for row, (r, _, _) in enumerate(pieces)
            if number < len(batch.snapshots[r])
        ]
        slots = batch.slots[requests]
        copies = None
        if saved:
            rows, targets = torch.tensor(saved).to(device, non_blocking=True).unbind(1)
            copies = torch.stack((slots[rows], targets))
        found.append(Segment(ForwardBatch(ragged, slots=slots), _tokens(spans, device), copies))
    return found


def _tokens(spans: Sequence[range], device: torch.device) -> slice | Tensor:
    if all(one.stop == other.start for one, other in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return torch.tensor([token for span in spans for token in span]).to(device, non_blocking=True)
