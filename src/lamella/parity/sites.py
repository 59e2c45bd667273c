"""Sites: the names of what every operation gives, the same for the engine, the reference and `transformers`.

A site is a dotted path such as `layers.3.mixer.o_proj`; its value is (n, channels) for the n tokens of one sequence.
A `Tap` is called at every site with the value and returns the value to go on with: to record it, compare it, or put
the truth's in its place, so that every later operation is fed what it should have been.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Tap: TypeAlias = Callable[[str, Tensor], Tensor]

_WORDS = {
    "embed_tokens": "embedding",
    "mixer_norm": "norm",
    "feed_forward_norm": "norm",
    "mixer.queries_keys": "rotary",
    "mixer.recurrence": "recurrence",
    "mixer_canon": "canon A",
    "mixer.canon": "canon B",
    "feed_forward_canon": "canon C",
    "feed_forward.canon": "canon D",
    "lm_head": "head",
}


def layer_of(site: str) -> int | None:
    """The decoder layer that a site lies in."""
    parts = site.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def operation(site: str) -> str:
    """What computes the value of a site, in the field's words."""
    path = ".".join(site.split(".")[2:]) if site.startswith("layers.") else site
    if path.endswith(".residual"):
        return "residual add"
    return _WORDS.get(path) or path.rpartition(".")[2]


def untouched(site: str, value: Tensor) -> Tensor:
    """The tap of an ordinary forward."""
    return value
