"""Scores of sequences: the interface between engines and statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lamella.layers.decoder import LanguageModel
from lamella.parity.sequences import TokenSequence


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings with which a scorer is opened.

    Attributes:
        dtype: dtype of weights and activations.
        device: device of weights and activations.
        attention: "eager" or "sdpa"; used by the full forwards of `hf` and `reference`.
        batch_size: sequences at a time, for engines that batch.
        options: further engine options, under the engine's own names.
        candidate: loaded model to use instead of the checkpoint's (engine lamella only).
    """

    dtype: torch.dtype
    device: torch.device
    attention: str = "eager"
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    candidate: LanguageModel | None = None


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities for one sequence, on the CPU; row t is the distribution that predicts token t + 1.

    Attributes:
        target: (N,) float64, log-probabilities of the actual next tokens.
        logprobs: (N, V) float32 or float64 over the whole vocabulary, or (N, K) of the K likeliest tokens in descending
            order.
        ids: (N, K) int64, token ids of the columns; None if the columns are the whole vocabulary.
    """

    target: Tensor
    logprobs: Tensor
    ids: Tensor | None = None

    @classmethod
    def from_logits(cls, logits: Tensor, token_ids: Sequence[int], top: int | None) -> Scores:
        """Compute scores from logits.

        Args:
            logits: (N, V); row t predicts `token_ids[t]`.
            token_ids: N token ids.
            top: number of likeliest tokens to keep; None for the whole vocabulary.
        """
        logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        targets = torch.tensor(token_ids, device=logits.device)
        target = logprobs.gather(1, targets[:, None])[:, 0].double().cpu()
        if top is None or top >= logprobs.shape[1]:
            return cls(target, logprobs.cpu())
        kept, ids = logprobs.topk(top)
        # topk returns tied values in any order. Put the token that argmax chooses first.
        first = logprobs.argmax(-1, keepdim=True)
        ids = torch.where(ids == first, ids[:, :1], ids)
        ids[:, :1] = first
        return cls(target, kept.cpu(), ids.cpu())


@dataclass(frozen=True)
class Generation:
    """Greedily generated tokens and the distribution at every step."""

    token_ids: tuple[int, ...]
    scores: Scores


class Scorer(Protocol):
    """Engine with one model. To add an engine, write a module with such a class and list it in `scorers.ENGINES`."""

    name: str

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        """Return the engine's log-probabilities for every sequence, with forced tokens.

        Args:
            sequences: an engine with a decode path predicts continuation token k >= 1 in a decode step.
            top: number of likeliest tokens of each position to return; None for the whole vocabulary.
        """
        ...

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        """Generate `count` greedy tokens after each prompt, ignoring end-of-text tokens."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...
