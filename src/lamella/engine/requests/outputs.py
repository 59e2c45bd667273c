"""Outputs of requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability of one token at one position.

    Attributes:
        logprob: natural logarithm of its probability, before penalties, temperature and filters.
        rank: 1 for the likeliest token; tied tokens share a rank.
        decoded_token: text of the token; None if the model has no tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a request, finished or in progress.

    Attributes:
        index: number of the completion among the request's `n`, from 0.
        text: the generated text; "" without a tokenizer.
        token_ids: the generated tokens.
        cumulative_logprob: sum of the generated tokens' log-probabilities (natural log); None if not requested.
        logprobs: for each generated token, the `Logprob` of it and of the likeliest tokens, by token id; None if not
            requested.
        finish_reason: "stop" (stop string or token), "length" (maximum length), "abort" (cancelled) or "error"; None
            while the completion is in progress.
        stop_reason: the stop string or stop token id that ended it; None for an end-of-sequence token, and if no stop
            condition ended it.
        error: error message in one line if `finish_reason` is "error"; else None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """Output of a request, finished or in progress.

    Attributes:
        request_id: id that the caller or the engine chose.
        prompt: text of the prompt; None if it was given as tokens.
        prompt_token_ids: tokens of the prompt.
        prompt_logprobs: for each prompt token, the `Logprob` of it and of the likeliest tokens at its position, by
            token id; None for the first token, which no logits predict. None if not requested.
        outputs: the completions, in the order of their indices.
        finished: True if all completions have ended.
        num_cached_tokens: prompt tokens that were found in the prefix cache (by the first completion).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
