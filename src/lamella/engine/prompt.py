"""What a caller may give as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from lamella.engine.tokenizer import Tokenizer
from lamella.errors import ParameterError

Prompt: TypeAlias = "str | Mapping[str, Any]"


def read_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int
) -> tuple[str | None, list[int], str | None]:
    """A prompt's text, if it has one, its tokens, and the salt of its prefixes. Raises `ParameterError`."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise ParameterError(f"prompt: must be a string or a dict with prompt_token_ids, not {type(prompt).__name__}")
    unknown = sorted(set(prompt) - {"prompt", "prompt_token_ids", "cache_salt"})
    if unknown:
        raise ParameterError(f"prompt: unknown key {unknown[0]!r}; there are prompt, prompt_token_ids and cache_salt")
    text, token_ids, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
    if salt is not None and not isinstance(salt, str):
        raise ParameterError(f"cache_salt={salt!r}: must be a string")
    if token_ids is None:
        if not isinstance(text, str):
            raise ParameterError(f"prompt={text!r}: must be a string")
        if tokenizer is None:
            raise ParameterError("prompt: the model has no tokenizer.json; give prompt_token_ids")
        token_ids = tokenizer.encode(text)
    token_ids = list(token_ids)
    if not token_ids:
        raise ParameterError("prompt_token_ids: must not be empty")
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return text, token_ids, salt
    for token in token_ids:  # which one is it?
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ParameterError(f"prompt_token_ids: {token!r} is not a token id below vocab_size={vocab_size}")
    return text, token_ids, salt
