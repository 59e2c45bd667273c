"""What identifies the state after a prefix: chained hashes of its blocks of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass


def root_key(*parts: object) -> bytes:
    """What a chain starts from: everything but the tokens that decides what a state is (model, adapter, salt)."""
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
    """The state of a prefix of `length` tokens is at hand; `snapshot` is the slot that holds its slot state.

    The blocks of the first `known` tokens are there in some group, though the rest of their state may not be: somebody
    had these tokens before. A model without paged state knows nothing of the kind.
    """

    length: int = 0
    snapshot: int | None = None
    known: int = 0


MISS = Hit()
