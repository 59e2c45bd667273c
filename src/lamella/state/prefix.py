"""Keys and hits of the prefix cache. A key is a hash chained over the blocks of tokens of a prefix."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


def root_key(*parts: object) -> bytes:
    """Return the key of the empty prefix.

    Args:
        parts: everything besides tokens that determines the state: model, placement, cache salt.
    """
    return hashlib.sha256(repr(parts).encode()).digest()


def block_key(before: bytes, token_ids: Sequence[int], content: bytes = b"") -> bytes:
    """Return the key of a block of tokens, which identifies the whole prefix up to the end of the block.

    Args:
        before: key of the previous block, or the root key.
        token_ids: tokens of the block.
        content: hashes of the images in the block, whose placeholder tokens are all the same.
    """
    return hashlib.sha256(before + array("q", token_ids).tobytes() + content).digest()


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
