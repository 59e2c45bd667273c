"""Keys and hits of the prefix cache. A key is a hash chained over the blocks of tokens of a prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def root_key(*parts: object) -> bytes:
    """Return the key of the empty prefix.

    Args:
        parts: everything besides tokens that determines the state: model, placement, cache salt.
    """
    return hashlib.sha256(repr(parts).encode()).digest()


def chain_keys(
    before: bytes, token_ids: Sequence[int], block_size: int, content: Callable[[int], bytes] | None = None
) -> list[bytes]:
    """Return the keys of consecutive full blocks.

    Args:
        before: key of the block before the first, or the root key.
        token_ids: tokens of the blocks; as many as they hold.
        block_size: tokens per block.
        content: for the n-th of these blocks, what its tokens stand for besides themselves, such as an image's digest.
    """
    data, width, keys = array("q", token_ids).tobytes(), 8 * block_size, []
    for index, start in enumerate(range(0, len(data), width)):
        block = before + data[start : start + width]
        before = hashlib.sha256(block if content is None else block + content(index)).digest()
        keys.append(before)
    return keys


@dataclass(frozen=True)
class Hit:
    """Result of a prefix cache lookup.

    Attributes:
        length: tokens of the longest prefix whose whole state is cached; a multiple of the block size.
        snapshot: slot with the slot state after that prefix; None for a model without slot state.
        seen_length: tokens of the longest prefix that was computed before, even if part of its state was evicted: some
            block group still has all of its blocks. The request branches off earlier ones here.
    """

    length: int = 0
    snapshot: int | None = None
    seen_length: int = 0


MISS = Hit()
