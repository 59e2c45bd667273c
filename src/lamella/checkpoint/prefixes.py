"""Normalization of name prefixes that wrappers of a model add or remove."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

# Prefix of the language model without its head.
_INNER = "model."
_ANCHOR = re.compile(r"(?P<prefix>(?:.*\.)?)(?:embed_tokens\.weight|(?:decoder\.blocks|layers)\.0\..+)$")
_LINGUA = re.compile(r"(?P<prefix>(?:.*\.)?)(?:tok_embeddings\.weight)$")


def canonical_names(
    names: Collection[str], own: Callable[[str], str | None], lingua: bool = False
) -> tuple[dict[str, str | None], str | None]:
    """Return the architecture's name of each tensor of a file.

    The prefix `model.` may be longer (`torch.compile`, DDP, PEFT, wrappers of several models) or missing (an inner
    model that was saved alone). If the embedding or the first layer has another prefix, it is replaced in all names.

    Args:
        names: in the files.
        own: returns the architecture's name of a tensor, or None for a tensor of another part of a larger model.
        lingua: True for names of lingua, whose inner model has no prefix.

    Returns:
        Architecture's names by names in the files, and the prefix that was replaced; None if no prefix was replaced.
    """
    named = {name: own(name) for name in names}
    inner, anchor = ("", _LINGUA) if lingua else (_INNER, _ANCHOR)
    matches = (anchor.match(name) for name in named.values() if name is not None)
    found = {match["prefix"] for match in matches if match}
    if inner in found or len(found) != 1:
        return named, None
    (prefix,) = found
    parts = prefix.split(".")[:-1]
    outer = [".".join([*parts[:count], ""]) for count in range(len(parts), 0, -1)]  # the longest first
    return {name: _canonical(known, prefix, inner, outer, own) for name, known in named.items()}, prefix


def _canonical(
    name: str | None, prefix: str, inner: str, outer: list[str], own: Callable[[str], str | None]
) -> str | None:
    if name is None:
        return None
    if not prefix:
        return name if name.startswith("lm_head.") else inner + name
    if name.startswith(prefix):
        suffix = name.removeprefix(prefix)
        return suffix if suffix.startswith("lm_head.") else inner + suffix
    return own(next((name.removeprefix(part) for part in outer if name.startswith(part)), name))
