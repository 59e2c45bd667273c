"""Prefixes of tensors' names that wrappers add or remove."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

# Of the language model's inner part; the head stands outside of it.
_INNER = "model."
_ANCHOR = re.compile(r"(?P<prefix>(?:.*\.)?)(?:embed_tokens\.weight|(?:decoder\.blocks|layers)\.0\..+)$")
_LINGUA = re.compile(r"(?P<prefix>(?:.*\.)?)(?:tok_embeddings\.weight)$")


def canonical_names(
    names: Collection[str], own: Callable[[str], str | None], lingua: bool = False
) -> tuple[dict[str, str | None], str | None]:
    """Return what each tensor of a file is called in the architecture's own words, and the prefix that was replaced.

    Names may carry more than `model.` (of `torch.compile`, DDP, PEFT, a wrapper of several models) or less (of a bare
    inner model). Where the embedding or the first layer shows one such prefix, it is replaced in all names; the prefix
    is None where nothing was.

    Args:
        names: as they stand in the files.
        own: what the architecture calls a tensor, None where it belongs to another part of a larger model.
        lingua: whether the names are lingua's, whose inner part has no prefix.
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
        rest = name.removeprefix(prefix)
        return rest if rest.startswith("lm_head.") else inner + rest
    return own(next((name.removeprefix(part) for part in outer if name.startswith(part)), name))
