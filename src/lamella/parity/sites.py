"""Sites: names of operation outputs that are the same for the engine, the reference and `transformers`.

A site is a dotted path such as `layers.3.mixer.o_proj`. Its value is (n, channels) for the n tokens of one sequence.
A `Tap` is called with the site and the value of every operation, and returns the value to continue with. It can record
or compare the value, or replace it by the reference's value, so that later operations get correct input.
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
    """Return the index of the decoder layer that contains a site; None outside the layers."""
    parts = site.split(".")
    return int(parts[1]) if parts[0] == "layers" else None


def operation(site: str) -> str:
    """Return a readable name of the operation at a site, such as "norm" or "rotary"."""
    path = ".".join(site.split(".")[2:]) if site.startswith("layers.") else site
    if path.endswith(".residual"):
        return "residual add"
    return _WORDS.get(path) or path.rpartition(".")[2]


def untouched(site: str, value: Tensor) -> Tensor:
    """Return the value unchanged: the tap of an ordinary forward."""
    return value
