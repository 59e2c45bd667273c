"""Snapshots of slot state in the middle of a chunk.

Computations over slot state run segment by segment, and the state is copied between segments. A convolution alone needs
no segments: its state after a token is the latest inputs up to that token, which are copied from its input tensor.
Everything else in the step (projections, attention) is computed for whole chunks.
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
    """The n-th piece of every request that has at least n pieces.

    Attributes:
        batch: batch whose requests are the pieces.
        tokens: tokens of the pieces in the whole batch, as a range or as indices (n,) int64.
        copies: (2, k) int64, source and target slots to copy after the segment; None if there are none.
    """

    batch: ForwardBatch
    tokens: slice | Tensor
    copies: Tensor | None


def segments(batch: ForwardBatch) -> Sequence[Segment]:
    """Return the segments of a batch with `snapshots`; computed once for all layers."""
    return batch.compute_once("segments", lambda: _split_at_snapshots(batch))


def snapshot_windows(batch: ForwardBatch, length: int) -> tuple[Tensor, Tensor] | None:
    """Return the convolution inputs that each snapshot must hold; computed once for all layers.

    Args:
        batch: batch with k `snapshots`.
        length: number of inputs that a slot holds. The input at position p is in row `p % length`.

    Returns:
        Token indices of the inputs in the whole batch, (k, length) int64, and the target slots, (k,) int64. None if a
        window starts before the chunk, so that its inputs are not in the batch.
    """
    return batch.compute_once(("windows", length), lambda: _find_windows(batch, length))


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


def _split_at_snapshots(batch: ForwardBatch) -> list[Segment]:
    """Divide each request's chunk at its snapshots, and group the n-th pieces of all requests into segment n."""
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
    """Return the tokens of the spans: a slice if the spans are contiguous, otherwise indices (n,) int64."""
    if all(one.stop == other.start for one, other in pairwise(spans)):
        return slice(spans[0].start, spans[-1].stop)
    return torch.tensor([token for span in spans for token in span]).to(device, non_blocking=True)
