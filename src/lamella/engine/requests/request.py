"""A request as the scheduler sees it: tokens, and how many of them the model has computed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lamella.engine.requests.sampling_params import SamplingParams, is_restricted, looks_back
from lamella.engine.requests.variant import PLAIN, Variant
from lamella.state.prefix import chain_keys

_SEED_MASK = (1 << 64) - 1
_MOST = np.iinfo(np.int32).max

# The fields of a step that say how a request samples, and their types.
SAMPLING_FIELDS: Mapping[str, type[np.generic]] = {
    "seed": np.int64,
    "top_k": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
}


def sampling_values(params: SamplingParams, seed: int) -> dict[str, np.generic]:
    """Return a request's row of each sampling field. No vocabulary has 2**31 tokens: such a `top_k` keeps all."""
    values = {
        "seed": np.uint64(seed & _SEED_MASK).astype(np.int64),
        "top_k": min(params.top_k, _MOST),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    return {name: kind(values[name]) for name, kind in SAMPLING_FIELDS.items()}


class Attachment(Protocol):
    """Content of a prompt that its token ids do not tell, such as an image.

    Attributes:
        first, last: positions of the first and last token that stand for it.
        digest: hash of the content.
    """

    @property
    def first(self) -> int: ...

    @property
    def last(self) -> int: ...

    @property
    def digest(self) -> bytes: ...


@dataclass(eq=False)
class Request:
    """One sequence being generated. Compared by identity."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    max_tokens: int = 16  # params.max_tokens, and never beyond the model's length
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    num_in_flight: int = 0  # tokens that the device has chosen or is about to, and that the host does not know yet
    num_computed: int = 0  # leading tokens whose state is in the pools
    num_preemptions: int = 0
    num_cached_tokens: int = 0  # of them, those that it started with
    num_reused: int = 0  # leading tokens whose state it took from the prefix cache when it last started
    branch: int = 0  # where it leaves the tokens that others had before it
    prefix_root: bytes | None = None  # see `block_keys`; None keeps the request out of the prefix cache
    variant: Variant = PLAIN  # of the model
    attachments: tuple[Attachment, ...] = ()  # of the prompt, in order
    _block_keys: list[bytes] = field(default_factory=list)
    looks_back: bool = field(init=False)  # whether the choice of a token depends on the ones before
    plain: bool = field(init=False)  # whether nothing is done to its logits, nor wanted of them, but the choice
    sampling: Mapping[str, Any] = field(init=False)  # its row of a step's sampling fields, see `sampling_values`

    def __post_init__(self) -> None:
        params = self.params
        self.sampling = sampling_values(params, self.seed)  # made now, so that a step cannot fail to make it
        self.looks_back = looks_back(params)
        edited = self.looks_back or is_restricted(params) or params.logit_bias or params.min_tokens
        self.plain = not (edited or params.logprobs is not None)

    def set_variant(self, variant: Variant, prefix_root: bytes | None) -> None:
        """Compute the request as this variant of the model, from its first token; it must hold no state."""
        assert not self.num_computed
        self.variant, self.prefix_root = variant, prefix_root
        self._block_keys.clear()

    def leave_prefix_cache(self) -> None:
        """Find and keep nothing in the prefix cache from now on; the request must hold no state."""
        self.set_variant(self.variant, None)

    @property
    def num_tokens(self) -> int:
        """Of prompt and output, those that are pending included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def num_sampled(self) -> int:
        """Of the output, those that are pending included."""
        return len(self.output_token_ids) + self.num_in_flight

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and output together; none of them may be pending."""
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]

    def block_keys(self, block_size: int, tokens: int) -> list[bytes]:
        """Keys of the full blocks of its first `tokens` tokens; empty where the request keeps out of the cache."""
        if self.prefix_root is None:
            return []
        keys, count = self._block_keys, tokens // block_size
        if len(keys) < count:
            first = len(keys)

            def content(index: int) -> bytes:
                return self._content((first + index) * block_size, (first + index + 1) * block_size)

            new = self.token_ids(first * block_size, count * block_size)
            keys += chain_keys(
                keys[-1] if keys else self.prefix_root, new, block_size, content if self.attachments else None
            )
        return keys[:count]

    def _content(self, start: int, stop: int) -> bytes:
        """Return what tokens [start, stop) stand for besides themselves: equal tokens may stand for other contents."""
        return b"".join(
            array("q", [each.first - start]).tobytes() + each.digest
            for each in self.attachments
            if each.first < stop and each.last >= start
        )

    @property
    def needs_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None
