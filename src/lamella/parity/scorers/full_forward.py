"""Scorer that runs one full forward per sequence, without cache, batch or state."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lamella.parity.scores import Generation, Scores
from lamella.parity.sequences import TokenSequence


class FullForward:
    """`Scorer` around a function from n token ids to logits (n, vocab_size)."""

    def __init__(self, name: str, logits: Callable[[Sequence[int]], Tensor]) -> None:
        self.name, self._logits = name, logits

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        """Score each sequence by one full forward; see `Scorer.score`."""
        return [Scores.from_logits(self._logits(s.token_ids[:-1]), s.token_ids[1:], top) for s in sequences]

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        """Generate greedily, with a full forward per token; see `Scorer.generate`."""
        return [self._generate(prompt, count, top) for prompt in prompts]

    def _generate(self, prompt: tuple[int, ...], count: int, top: int | None) -> Generation:
        tokens, rows = list(prompt), []
        for _ in range(count):
            rows.append(self._logits(tokens)[-1])
            tokens.append(int(rows[-1].argmax()))
        chosen = tuple(tokens[len(prompt) :])
        return Generation(chosen, Scores.from_logits(torch.stack(rows), chosen, top))

    def close(self) -> None:
        """Release the model."""
        self._logits = _closed


def _closed(token_ids: Sequence[int]) -> Tensor:
    raise AssertionError("the scorer is closed")
