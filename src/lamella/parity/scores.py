"""What an engine says of a sequence: the seam between the engines and the statistics."""

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
    """Settings of an engine that scores, given when it is opened.

    Attributes:
        dtype, device: of weights and activations.
        attention: "eager" or "sdpa", for engines with a choice: the full forwards of `hf` and `reference`.
        batch_size: sequences at a time, for engines that batch.
        options: passed on to the engine, under its own names.
        candidate: a loaded model to use in the place of the checkpoint's, for the engine lamella.
    """

    dtype: torch.dtype
    device: torch.device
    attention: str = "eager"
    batch_size: int = 8
    options: Mapping[str, Any] = field(default_factory=dict)
    candidate: LanguageModel | None = None


@dataclass(frozen=True)
class Scores:
    """Natural log-probabilities for one sequence; row t is the distribution that predicts token t + 1. On the CPU.

    Attributes:
        target: (N,) float64, of the tokens that come.
        logprobs: (N, V) float32 or float64 of the whole vocabulary; or (N, K) of the K likeliest tokens, likeliest
            first.
        ids: (N, K) int64, the tokens of the columns; None where the columns are the vocabulary.
    """

    target: Tensor
    logprobs: Tensor
    ids: Tensor | None = None

    @classmethod
    def of(cls, logits: Tensor, token_ids: Sequence[int], top: int | None) -> Scores:
        """From logits (N, V) whose row t predicts `token_ids[t]`; `top` keeps only so many columns."""
        logprobs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        targets = torch.tensor(token_ids, device=logits.device)
        target = logprobs.gather(1, targets[:, None])[:, 0].double().cpu()
        if top is None or top >= logprobs.shape[1]:
            return cls(target, logprobs.cpu())
        kept, ids = logprobs.topk(top)
        # Of equal ones, topk may take any: the first column is the one that argmax would choose.
        first = logprobs.argmax(-1, keepdim=True)
        ids = torch.where(ids == first, ids[:, :1], ids)
        ids[:, :1] = first
        return cls(target, kept.cpu(), ids.cpu())


@dataclass(frozen=True)
class Generation:
    """Tokens that an engine chose freely, each the likeliest, and its distribution at every step."""

    token_ids: tuple[int, ...]
    scores: Scores


class Scorer(Protocol):
    """One engine with one model. Another engine joins by a module with such a class, and a line in `scorers`."""

    name: str

    def score(self, sequences: Sequence[TokenSequence], top: int | None = None) -> list[Scores]:
        """The engine's own log-probabilities of every sequence, tokens forced.

        Engines that prefill and decode make the prediction of continuation token k >= 1 by a decode step. `top` asks
        for the K likeliest tokens of each position only; None for all.
        """
        ...

    def generate(self, prompts: Sequence[tuple[int, ...]], count: int, top: int | None = None) -> list[Generation]:
        """`count` greedy tokens after each prompt, none of which ends it."""
        ...

    def close(self) -> None:
        """Free the model."""
        ...
