"""Outputs of the engine for a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's place in the model's distribution at one position.

    Attributes:
        logprob: natural logarithm of its probability, before penalties, temperature and filters.
        rank: 1 for the likeliest token; tied tokens share a rank.
        decoded_token: the token as text, None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One completion of a request, as far as it has got.

    Attributes:
        index: which of the request's `n` completions, from 0.
        text: the generated text; "" without a tokenizer.
        token_ids: the generated tokens.
        cumulative_logprob: sum of the generated tokens' log-probabilities (natural log); None unless asked for.
        logprobs: for each generated token, its `Logprob` and those of the likeliest tokens, by token id; None
            unless asked for.
        finish_reason: why it ended: a stop string or token ("stop"), its length ("length"), its caller ("abort") or
            a failure ("error"); None while it goes on.
        stop_reason: the stop string or stop token id that ended it; None for an end-of-sequence token and otherwise.
        error: what failed, in one line, where finish_reason is "error"; else None.
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
    """The state of a request.

    Attributes:
        request_id: the caller's or the engine's name for it.
        prompt: the prompt's text; None when it was given as tokens.
        prompt_token_ids: the prompt's tokens.
        prompt_logprobs: for each prompt token, its `Logprob` given the tokens before it and those of the likeliest
            tokens there, by token id; the first entry is None, as nothing precedes it. None unless asked for.
        outputs: the completions, in the order of their indices.
        finished: whether all of them have ended.
        num_cached_tokens: tokens of the prompt that the prefix cache had (of the first completion).
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
