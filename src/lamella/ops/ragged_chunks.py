"""States of recurrent mixers in slots, and walking a ragged batch chunk by chunk, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch


def read_states(batch: RaggedBatch, state: RecurrentState | None, shape: tuple[int, ...]) -> Tensor:
    """Return a copy of every request's state before its new tokens: (R, *shape) fp32.

    The state is zero without `state`, and for a request whose first token is among the new ones.
    """
    if state is None:
        return torch.zeros(batch.num_requests, *shape, device=batch.query_start_loc.device)
    old = batch.seq_lens > batch.query_start_loc.diff()
    return torch.where(old.view(-1, *(1 for _ in shape)), state.matrix[state.slots], 0.0)


def decodes_of(batch: RaggedBatch) -> RaggedBatch:
    """The first `num_decodes` requests of a batch, as one of their own; without its lengths on the host."""
    count = batch.num_decodes
    return replace(
        batch,
        positions=batch.positions[:count],
        query_start_loc=batch.query_start_loc[: count + 1],
        seq_lens=batch.seq_lens[:count],
        token_request=batch.token_request[:count],
        query_lens=(),
        context_lens=(),
    )


def prefills_of(batch: RaggedBatch) -> RaggedBatch:
    """All other requests of a batch, as one of their own; without its lengths on the host."""
    count = batch.num_decodes
    if not count:
        return batch
    return replace(
        batch,
        positions=batch.positions[count:],
        query_start_loc=batch.query_start_loc[count:] - count,
        seq_lens=batch.seq_lens[count:],
        token_request=batch.token_request[count:] - count,
        query_lens=(),
        context_lens=(),
        num_decodes=0,
    )


def by_kind(batch: RaggedBatch) -> Iterator[tuple[bool, slice, RaggedBatch]]:
    """Yield the decodes, then the other requests, each where there are any.

    Yields:
        Whether they are decodes; the rows of their tokens, which from the first are those of the requests too; and a
        batch of their own.
    """
    if batch.num_decodes:
        yield True, slice(0, batch.num_decodes), decodes_of(batch)
    if batch.num_decodes < batch.num_requests:
        yield False, slice(batch.num_decodes, None), prefills_of(batch)


class Chunk(NamedTuple):
    """Some tokens of each of the first `requests` of a walk, padded to equal numbers."""

    requests: int
    token: Tensor  # (requests, width) int64, index into the flat batch; a pad repeats the request's last token
    valid: Tensor  # (requests, width) bool, False for a pad
    full: bool  # no pads

    def take(self, x: Tensor) -> Tensor:
        """Return x (T, heads, ...) of the chunk's tokens: (requests, heads, width, ...) fp32."""
        return x[self.token].float().transpose(1, 2)

    def blank(self, x: Tensor) -> Tensor:
        """Return x (requests, heads, width, ...) with zeros for the pads."""
        if self.full:
            return x
        return torch.where(self.valid.view(self.requests, 1, -1, *(1 for _ in x.shape[3:])), x, 0.0)

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write values (requests, heads, width, ...) to their tokens' rows of out (T, heads, ...)."""
        values = values.transpose(1, 2)
        if self.full:
            out[self.token] = values.to(out.dtype)
        else:
            out[self.token[self.valid]] = values[self.valid].to(out.dtype)


def longest_first(batch: RaggedBatch) -> Tensor:
    """The requests, ordered so that those that still have tokens are always the first: (R,) int64."""
    return batch.query_start_loc.diff().argsort(descending=True, stable=True)


def walk(batch: RaggedBatch, order: Tensor, size: int, multiple: int = 1) -> Iterator[Chunk]:
    """The new tokens of the requests `order`, `size` of each at a time; widths are padded to a multiple.

    Reads the lengths on the host.
    """
    starts, lengths = batch.query_start_loc[:-1][order].long(), batch.query_start_loc.diff()[order].long()
    on_host = lengths.tolist()
    for done in range(0, on_host[0] if on_host else 0, size):
        count = sum(length > done for length in on_host)
        width = -(-min(size, on_host[0] - done) // multiple) * multiple
        local = done + torch.arange(width, device=starts.device)
        ends = lengths[:count, None]
        token = starts[:count, None] + torch.minimum(local, ends - 1)
        yield Chunk(count, token, local < ends, on_host[count - 1] >= done + width)
