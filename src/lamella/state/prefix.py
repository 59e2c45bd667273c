"""What identifies the state after a prefix: chained hashes of its blocks of tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass


def root_key(*parts: object) -> bytes:
    """What a chain starts from: everything but the tokens that decides what a state is (model, adapter, salt)."""
    return hashlib.sha256(repr(parts).encode()).digest()


def block_key(before: bytes, token_ids: Sequence[int], content: bytes = b"") -> bytes:
    """The key of a block of tokens after the blocks whose key is `before`.

    `content` is what else decides its state: what those of the tokens stand for that do not stand for themselves.
    """
    return hashlib.sha256(before + array("q", token_ids).tobytes() + content).digest()


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
