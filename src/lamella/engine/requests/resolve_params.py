"""Resolution of sampling parameters that depend on the model and its tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lamella.engine.requests.prompt import GivenPrompt
from lamella.engine.requests.sampling_params import MAX_LOGPROBS, SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ParameterError

MAX_BAD_WORDS = 1000
"""Most token sequences that a request can forbid."""


def resolve_params(
    params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int, max_logprobs: int | None
) -> SamplingParams:
    """Replace -1 ("all") in `logprobs` and `prompt_logprobs` by numbers, and `bad_words` by token ids.

    Args:
        params: of the request.
        tokenizer: of the model; None if it has none.
        vocab_size: of the model.
        max_logprobs: most log-probabilities that a request can ask for; None is `MAX_LOGPROBS`, -1 no limit.

    Returns:
        The resolved parameters.

    Raises:
        ParameterError: a token id is outside the vocabulary, too many log-probabilities are requested, or a word has no
            tokens.
    """
    limit = min(
        vocab_size, MAX_LOGPROBS if max_logprobs is None else vocab_size if max_logprobs == -1 else max_logprobs
    )
    changes: dict[str, Any] = {}
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        wanted = vocab_size if value == -1 else value
        if wanted is not None and wanted > limit:
            asked = f"all {vocab_size}" if value == -1 else str(value)
            raise ParameterError(f"{name} must be at most {limit}, got {asked}: LLM(max_logprobs=-1) allows all")
        if value == -1:
            changes[name] = wanted
    if params.bad_words:
        words = _token_ids(params.bad_words, tokenizer)
        changes["bad_words_token_ids"] = [*(params.bad_words_token_ids or []), *words]
    resolved = replace(params, **changes) if changes else params
    resolved.validate_for(vocab_size)
    return resolved


def _token_ids(words: list[str], tokenizer: Tokenizer | None) -> list[list[int]]:
    """Return the token sequences of each word as in vLLM: at the start of a text, and after a space."""
    if tokenizer is None:
        raise ParameterError("bad_words: the model has no tokenizer; give bad_words_token_ids")
    found: list[list[int]] = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        if not plain:
            raise ParameterError(f"bad_words: {word!r} has no tokens; give words that the tokenizer knows")
        found.append(plain)
        spaced = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    if len(found) > MAX_BAD_WORDS:
        raise ParameterError(f"bad_words: {len(found)} token sequences; at most {MAX_BAD_WORDS} can be forbidden")
    return found


def truncated(
    given: GivenPrompt, params: SamplingParams, tokenizer: Tokenizer | None, max_model_len: int
) -> GivenPrompt:
    """Truncate a prompt to its last `truncate_prompt_tokens` tokens; -1 leaves space for `max_tokens`.

    A special token that the tokenizer added before a text, such as BOS, stays in front.
    """
    limit = params.truncate_prompt_tokens
    if limit is None:
        return given
    if limit == -1:
        limit = max(1, max_model_len - (params.max_tokens or 1))
    ids = given.token_ids
    if len(ids) <= limit:
        return given
    first = given.text is not None and tokenizer is not None and limit > 1 and ids[0] in tokenizer.special_ids
    kept = [ids[0], *ids[len(ids) - limit + 1 :]] if first else ids[len(ids) - limit :]
    return given._replace(token_ids=kept)
