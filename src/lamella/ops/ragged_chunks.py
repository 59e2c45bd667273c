"""Recurrent states in slots, and iteration over a ragged batch in padded chunks, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch


def read_states(batch: RaggedBatch, state: RecurrentState | None, shape: tuple[int, ...]) -> Tensor:
    """Return a copy (R, *shape) fp32 of every request's state before its new tokens.

    It is zero for requests whose first token is among the new ones, and for all requests if `state` is None.
    """
    if state is None:
        return torch.zeros(batch.num_requests, *shape, device=batch.query_start_loc.device)
    old = batch.seq_lens > batch.query_start_loc.diff()
    return torch.where(old.view(-1, *(1 for _ in shape)), state.matrix[state.slots], 0.0)


def select_decodes(batch: RaggedBatch) -> RaggedBatch:
    """Return a batch of the decodes only, without lengths on the host."""
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


def select_prefills(batch: RaggedBatch) -> RaggedBatch:
    """Return a batch of the requests after the decodes, without lengths on the host."""
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


def split_by_kind(batch: RaggedBatch) -> Iterator[tuple[bool, slice, RaggedBatch]]:
    """Yield the decodes and then the other requests, if there are any.

    Yields:
        Whether they are decodes; the slice of their tokens, which is also the slice of the requests; and their batch.
    """
    if batch.num_decodes:
        yield True, slice(0, batch.num_decodes), select_decodes(batch)
    if batch.num_decodes < batch.num_requests:
        yield False, slice(batch.num_decodes, None), select_prefills(batch)


class Chunk(NamedTuple):
    """Some tokens of each of the first `requests` requests, padded to equal numbers.

    Attributes:
        requests: number of requests.
        token: (requests, width) int64, index in the flat batch; padding repeats the request's last token.
        valid: (requests, width) bool, False for padding.
        is_full: True if there is no padding.
    """

    requests: int
    token: Tensor
    valid: Tensor
    is_full: bool

    def gather(self, x: Tensor) -> Tensor:
        """Return the chunk's tokens (requests, heads, width, ...) fp32 of x (T, heads, ...)."""
        return x[self.token].float().transpose(1, 2)

    def zero_padding(self, x: Tensor) -> Tensor:
        """Return x (requests, heads, width, ...) with zeros for padding."""
        if self.is_full:
            return x
        return torch.where(self.valid.view(self.requests, 1, -1, *(1 for _ in x.shape[3:])), x, 0.0)

    def scatter(self, out: Tensor, values: Tensor) -> None:
        """Write values (requests, heads, width, ...) to their tokens' rows of out (T, heads, ...)."""
        values = values.transpose(1, 2)
        if self.is_full:
            out[self.token] = values.to(out.dtype)
        else:
            out[self.token[self.valid]] = values[self.valid].to(out.dtype)


def longest_first(batch: RaggedBatch) -> Tensor:
    """Return the requests (R,) int64 by descending length, so that requests with tokens left always come first."""
    return batch.query_start_loc.diff().argsort(descending=True, stable=True)


def iterate_chunks(batch: RaggedBatch, order: Tensor, size: int, multiple: int = 1) -> Iterator[Chunk]:
    """Yield the new tokens in chunks. Reads the lengths on the host.

    Args:
        batch: lengths of the requests.
        order: (R,) int64, requests by descending length.
        size: maximum tokens of a request per chunk.
        multiple: widths of chunks are padded to a multiple of this number.
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
