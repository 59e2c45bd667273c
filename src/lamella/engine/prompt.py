"""What a caller may give as a prompt."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from lamella.engine.tokenizer import Tokenizer
from lamella.errors import ParameterError

Prompt: TypeAlias = "str | Mapping[str, Any] | list[int]"


_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt", "add_special_tokens")
# Of vLLM, and accepted only where they say nothing.
_EMPTY_KEYS = ("mm_processor_kwargs", "multi_modal_uuids", "token_type_ids", "prompt_embeds", "type")


class GivenPrompt(NamedTuple):
    """A prompt's text, if it has one, its tokens, as yet with a placeholder for each image, the salt of its prefixes,
    and its images."""

    text: str | None
    token_ids: list[int]
    salt: str | None
    images: list[Any]


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> GivenPrompt:
    """What a caller gives: a text, or a mapping.

    Its keys: `prompt`, a text; `prompt_token_ids`, which go before it, a list, array or tensor of ids;
    `add_special_tokens`, False to take the text as it is, without a BOS before it; `cache_salt`, a string that keeps
    its prefixes apart; `multi_modal_data`, which is `{"image": image}` or `{"image": [image, ...]}`, in the order of
    the prompt's placeholders. An image is Pillow's, an array (H, W, 3) or a tensor (3, H, W), these in uint8. Raises
    `ParameterError`.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if is_token_ids(prompt):
        prompt = {"prompt_token_ids": prompt}
    if not isinstance(prompt, Mapping):
        raise ParameterError(f"prompt: must be a string or a dict with prompt_token_ids, not {type(prompt).__name__}")
    unknown = sorted(str(key) for key in prompt if key not in _KEYS and (key not in _EMPTY_KEYS or prompt[key]))
    if unknown:
        raise ParameterError(f"prompt: unknown key {unknown[0]!r}; there are {', '.join(_KEYS)}")
    text, token_ids, data, salt, special = (prompt.get(key) for key in _KEYS)
    if special is not None and not isinstance(special, bool):
        raise ParameterError(f"add_special_tokens={special!r}: must be True or False")
    images = _read_images(data)
    if salt is not None and not isinstance(salt, str):
        raise ParameterError(f"cache_salt={salt!r}: must be a string")
    if token_ids is None:
        if not isinstance(text, str):
            raise ParameterError(f"prompt={text!r}: must be a string")
        if tokenizer is None:
            raise ParameterError(
                "prompt: the model has no tokenizer.json; give prompt_token_ids, or LLM(tokenizer=...)"
            )
        token_ids = tokenizer.encode(text, add_special_tokens=special is not False)
        if not token_ids:
            raise ParameterError(f"prompt={text!r}: has no tokens: give at least one, such as the BOS")
    token_ids = _plain(token_ids)
    if not token_ids:
        raise ParameterError("prompt_token_ids: must not be empty: give at least one token, such as the BOS")
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return GivenPrompt(text, token_ids, salt, images)
    for token in token_ids:  # which one is it?
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise ParameterError(f"prompt_token_ids: {token!r} is not a token id below vocab_size={vocab_size}")
    return GivenPrompt(text, token_ids, salt, images)


def is_token_ids(value: Any) -> bool:
    """Return whether a value is a prompt as bare token ids: a list, an array or a tensor of one dimension."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(_is_index(token) for token in value)
    return getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")


def _is_index(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0


def _plain(token_ids: Any) -> list[Any]:
    """Token ids as a list of ints, as far as they are whole numbers; the caller names what is not."""
    if hasattr(token_ids, "tolist"):
        token_ids = token_ids.tolist()
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, str | bytes):
        raise ParameterError(f"prompt_token_ids={token_ids!r}: must be a list of token ids")
    if all(type(token) is int for token in token_ids):
        return list(token_ids)
    return [operator.index(token) if _is_index(token) else token for token in token_ids]


def _read_images(data: Any) -> list[Any]:
    if data is None:
        return []
    if not isinstance(data, Mapping) or set(data) - {"image"}:
        shown = sorted(map(repr, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ParameterError(f'multi_modal_data: must be {{"image": image or images}}, not of {shown}')
    images = data.get("image", [])
    return list(images) if isinstance(images, list | tuple) else [images]
