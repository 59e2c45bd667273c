"""Random prompts."""

from __future__ import annotations

import random


def random_tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    """Return `count` random token ids."""
    return [rng.randrange(vocab_size) for _ in range(count)]


def random_prompts(seed: int, count: int, length: int, vocab_size: int) -> list[list[int]]:
    """Return `count` random prompts of `length` tokens each."""
    rng = random.Random(seed)
    return [random_tokens(rng, length, vocab_size) for _ in range(count)]
