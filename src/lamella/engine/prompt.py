"""What a caller may give as a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

from lamella.engine.tokenizer import Tokenizer
from lamella.errors import ParameterError

Prompt: TypeAlias = "str | Mapping[str, Any]"


_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt")


class GivenPrompt(NamedTuple):
    """A prompt's text, if it has one, its tokens, as yet with a placeholder for each image, the salt of its prefixes,
    and its images."""

    text: str | None
    token_ids: list[int]
    salt: str | None
    images: list[Any]


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> GivenPrompt:
    """What a caller gives: a text, or a mapping.

    Its keys: `prompt`, a text; `prompt_token_ids`, which go before it; `cache_salt`, a string that keeps its prefixes
    apart; `multi_modal_data`, which is `{"image": image}` or `{"image": [image, ...]}`, in the order of the prompt's
    placeholders. An image is Pillow's, an array (H, W, 3) or a tensor (3, H, W), these in uint8. Raises
    `ParameterError`.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if not isinstance(prompt, Mapping):
        raise ParameterError(f"prompt: must be a string or a dict with prompt_token_ids, not {type(prompt).__name__}")
    unknown = sorted(set(prompt) - set(_KEYS))
    if unknown:
        raise ParameterError(f"prompt: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    text, token_ids, data, salt = (prompt.get(key) for key in _KEYS)
    images = _read_images(data)
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
        return GivenPrompt(text, token_ids, salt, images)
    for token in token_ids:  # which one is it?
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ParameterError(f"prompt_token_ids: {token!r} is not a token id below vocab_size={vocab_size}")
    return GivenPrompt(text, token_ids, salt, images)


def _read_images(data: Any) -> list[Any]:
    if data is None:
        return []
    if not isinstance(data, Mapping) or set(data) - {"image"}:
        shown = sorted(map(repr, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ParameterError(f'multi_modal_data: must be {{"image": image or images}}, not of {shown}')
    images = data.get("image", [])
    return list(images) if isinstance(images, list | tuple) else [images]
