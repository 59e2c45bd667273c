"""Prompts: the forms that a caller can give, and their validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from lamella.engine.requests.tokenizer import Tokenizer, why_not_text
from lamella.errors import ParameterError
from lamella.validation import is_text, shown, whole

Prompt: TypeAlias = "str | Mapping[str, Any] | list[int]"


_KEYS = ("prompt", "prompt_token_ids", "multi_modal_data", "cache_salt", "add_special_tokens")
# Keys that vLLM accepts; here their values must be empty.
_EMPTY_KEYS = ("mm_processor_kwargs", "multi_modal_uuids", "token_type_ids", "prompt_embeds", "type")


class GivenPrompt(NamedTuple):
    """A validated prompt.

    Attributes:
        text: None if it was given as token ids.
        token_ids: tokens, with one placeholder token per image.
        salt: see `Job`.
        images: one per placeholder, in order.
    """

    text: str | None
    token_ids: list[int]
    salt: str | None
    images: list[Any]


def read_prompt(prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int) -> GivenPrompt:
    """Validate and tokenize a prompt.

    Args:
        prompt: a text, a list, array or tensor of token ids, or a mapping with these keys:

            * `prompt`: text.
            * `prompt_token_ids`: token ids; used instead of the text if both are given.
            * `add_special_tokens`: False to encode the text without special tokens such as BOS.
            * `cache_salt`: string; only requests with the same salt share cached prefixes.
            * `multi_modal_data`: `{"image": image}` or `{"image": [image, ...]}`, in the order of the placeholders. An
              image is a Pillow image, an array (H, W, 3) or a tensor (3, H, W), uint8.
        tokenizer: of the model; None if it has none.
        vocab_size: of the model; token ids must be below it.

    Returns:
        The prompt.

    Raises:
        ParameterError: the prompt has another form, an unknown key, or an invalid value.
    """
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    if is_token_ids(prompt):
        prompt = {"prompt_token_ids": prompt}
    if not isinstance(prompt, Mapping):
        raise ParameterError(f"prompt: must be a string or a dict with prompt_token_ids, not {type(prompt).__name__}")
    unknown = [key for key in prompt if key not in _KEYS and (key not in _EMPTY_KEYS or prompt[key])]
    if unknown:
        raise ParameterError(f"prompt: unknown key {shown(unknown[0])}; there are {', '.join(_KEYS)}")
    text, token_ids, data, salt, special = (prompt.get(key) for key in _KEYS)
    if special is not None and not isinstance(special, bool):
        raise ParameterError(f"add_special_tokens={shown(special)}: must be True or False")
    images = _read_images(data)
    if salt is not None and not is_text(salt):
        raise ParameterError(f"cache_salt={shown(salt)}: must be a string")
    if token_ids is None:
        if not is_text(text):
            raise ParameterError(why_not_text(text))
        if tokenizer is None:
            raise ParameterError(
                "prompt: the model has no tokenizer.json; give prompt_token_ids, or LLM(tokenizer=...)"
            )
        token_ids = tokenizer.encode(str(text), add_special_tokens=special is not False)
        if not token_ids:
            raise ParameterError(f"prompt={shown(text)}: has no tokens: give at least one, such as the BOS")
    elif text is not None and not is_text(text):
        raise ParameterError(f"prompt={shown(text)}: must be a string that UTF-8 can encode")
    return GivenPrompt(text, _read_token_ids(token_ids, vocab_size), salt, images)


def _read_token_ids(given: Any, vocab_size: int) -> list[int]:
    """Return token ids as Python ints.

    Raises:
        ParameterError: not a list, tuple, array or tensor of whole numbers in [0, vocab_size).
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) != 1:
        raise ParameterError(f"prompt_token_ids={shown(given)}: must be a list of token ids")
    token_ids = list(given)
    if not token_ids:
        raise ParameterError("prompt_token_ids: must not be empty: give at least one token, such as the BOS")
    if set(map(type, token_ids)) == {int} and min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return token_ids
    numbers = []
    for token in token_ids:
        number = whole(token)
        if number is None or not 0 <= number < vocab_size:
            raise ParameterError(f"prompt_token_ids: {shown(token)} is not a token id below vocab_size={vocab_size}")
        numbers.append(number)
    return numbers


def is_token_ids(value: Any) -> bool:
    """Return True if a value is a prompt of token ids: a list, or a one-dimensional array or tensor."""
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(whole(token) is not None for token in value)
    return getattr(value, "ndim", None) == 1 and hasattr(value, "tolist")


def _read_images(data: Any) -> list[Any]:
    if data is None:
        return []
    if not isinstance(data, Mapping) or set(data) - {"image"}:
        what = shown(list(data)) if isinstance(data, Mapping) else type(data).__name__
        raise ParameterError(f'multi_modal_data: must be {{"image": image or images}}, not of {what}')
    images = data.get("image", [])
    return list(images) if isinstance(images, list | tuple) else [images]
