"""Chunked attention as plain causal attention: a chunk of a request is a request of its own. Host arithmetic only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """New tokens of one request that lie in one chunk, and what they see."""

    request: int
    new: int  # tokens
    first: int  # the position where the chunk starts
    length: int  # tokens of the chunk up to the last new one


def pieces(query_lens: Sequence[int], context_lens: Sequence[int], chunk: int) -> list[Piece]:
    """The last `query_lens[r]` of `context_lens[r]` tokens of each request r, cut at multiples of `chunk`, in order."""
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
    """Where the blocks of all pieces, one after the other, stand among the requests' whole lists of blocks.

    `chunk` is a multiple of `block_size`, so that no block belongs to two pieces.
    """
    found: list[int] = []
    start = 0
    for new, context in zip(query_lens, context_lens, strict=True):
        count = -(-context // block_size)
        found += range(start + (context - new) // chunk * chunk // block_size, start + count)
        start += count
    return found
