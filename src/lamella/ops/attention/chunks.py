"""Chunked attention as plain causal attention: each chunk is treated as a separate request. Host arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """New tokens of one request within one chunk.

    Attributes:
        request: index of the request.
        new: number of new tokens.
        first: position at which the chunk starts.
        length: number of tokens from `first` to the last new token.
    """

    request: int
    new: int
    first: int
    length: int


def pieces(query_lens: Sequence[int], context_lens: Sequence[int], chunk: int) -> list[Piece]:
    """Split the new tokens of each request at multiples of `chunk`.

    Args:
        query_lens: new tokens of each request.
        context_lens: tokens of each request, including the new ones.
        chunk: tokens per chunk.
    """
    found = []
    for request, (new, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        position = context - new
        while position < context:
            first = position // chunk * chunk
            stop = min(context, first + chunk)
            found.append(Piece(request, stop - position, first, stop - first))
            position = stop
    return found


def seen_blocks(query_lens: Sequence[int], context_lens: Sequence[int], chunk: int, block_size: int) -> list[int]:
    """Return the indices of the blocks of all pieces in the concatenated block lists of the requests.

    Args:
        query_lens: new tokens of each request.
        context_lens: tokens of each request, including the new ones.
        chunk: tokens per chunk; a multiple of `block_size`, so that no block belongs to two pieces.
        block_size: tokens per block.
    """
    found: list[int] = []
    start = 0
    for new, context in zip(query_lens, context_lens, strict=True):
        count = -(-context // block_size)
        found += range(start + (context - new) // chunk * chunk // block_size, start + count)
        start += count
    return found
