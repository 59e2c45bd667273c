"""One sequence of tokens as the scheduler sees it, with its progress and its prefix cache keys."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from lamella.engine.requests.sampling_params import SamplingParams, is_restricted, needs_previous_tokens
from lamella.engine.requests.variant import PLAIN, Variant
from lamella.state.prefix import chain_keys

_SEED_MASK = (1 << 64) - 1
_INT32_MAX = np.iinfo(np.int32).max

# Sampling parameters that are step inputs, one value per request, and their dtypes.
SAMPLING_FIELDS: Mapping[str, type[np.generic]] = {
    "seed": np.int64,
    "top_k": np.int32,
    "temperature": np.float32,
    "top_p": np.float32,
    "min_p": np.float32,
}


def sampling_values(params: SamplingParams, seed: int) -> dict[str, np.generic]:
    """Return a request's value of each sampling field."""
    values = {
        "seed": np.uint64(seed & _SEED_MASK).astype(np.int64),
        "top_k": min(params.top_k, _INT32_MAX),  # larger than any vocabulary: keeps all tokens
        "temperature": params.temperature,
        "top_p": params.top_p,
        "min_p": params.min_p,
    }
    return {name: kind(values[name]) for name, kind in SAMPLING_FIELDS.items()}


class Attachment(Protocol):
    """Content of a prompt that placeholder tokens stand for, such as an image."""

    @property
    def first(self) -> int:
        """Position of the first placeholder token."""
        ...

    @property
    def last(self) -> int:
        """Position of the last placeholder token."""
        ...

    @property
    def digest(self) -> bytes:
        """Hash of the content, which becomes part of the prefix keys."""
        ...


@dataclass(eq=False)
class Request:
    """One sequence that is generated. Compared by identity.

    Attributes:
        request_id: id of the job, or of the completion in it.
        prompt_token_ids: tokens of the prompt.
        params: sampling parameters.
        seed: seed of the random draws; its low 64 bits are used.
        max_tokens: `params.max_tokens`, limited by the model's length.
        eos_token_ids: tokens that end the output.
        output_token_ids: generated tokens that the host has read.
        num_in_flight: generated tokens that the device samples in steps that the host has not collected yet.
        num_computed: number of leading tokens whose state is in the pools.
        num_preemptions: how often the request lost its state.
        num_cached_tokens: prompt tokens found in the prefix cache at the first start.
        num_reused: leading tokens found in the prefix cache at the latest start.
        branch_position: number of leading tokens that were computed before for another request, see `Hit.seen_length`.
        prefix_root: key of the empty prefix, see `block_keys`; None excludes the request from the prefix cache.
        variant: variant of the model that computes the request.
        attachments: images of the prompt, in order.
        needs_previous_tokens: True if sampling depends on previous output tokens (penalties, forbidden words, ...).
        is_plain: True if logits are neither edited nor returned, only sampled from.
        sampling: value of each sampling field, see `sampling_values`.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int = 0
    max_tokens: int = 16
    eos_token_ids: tuple[int, ...] = ()
    output_token_ids: list[int] = field(default_factory=list)
    num_in_flight: int = 0
    num_computed: int = 0
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    num_reused: int = 0
    branch_position: int = 0
    prefix_root: bytes | None = None
    variant: Variant = PLAIN
    attachments: tuple[Attachment, ...] = ()
    _block_keys: list[bytes] = field(default_factory=list)
    needs_previous_tokens: bool = field(init=False)
    is_plain: bool = field(init=False)
    sampling: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        params = self.params
        self.sampling = sampling_values(params, self.seed)  # here, so that an error cannot occur in a step
        self.needs_previous_tokens = needs_previous_tokens(params)
        edited = self.needs_previous_tokens or is_restricted(params) or params.logit_bias or params.min_tokens
        self.is_plain = not (edited or params.logprobs is not None)

    def set_variant(self, variant: Variant, prefix_root: bytes | None) -> None:
        """Set the variant of the model that computes the request. The request must not have state yet."""
        assert not self.num_computed
        self.variant, self.prefix_root = variant, prefix_root
        self._block_keys.clear()

    def leave_prefix_cache(self) -> None:
        """Exclude the request from the prefix cache from now on. The request must not have state."""
        self.set_variant(self.variant, None)

    @property
    def num_tokens(self) -> int:
        """Number of prompt and output tokens, including output tokens in flight."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_in_flight

    @property
    def num_sampled(self) -> int:
        """Number of output tokens, including tokens in flight."""
        return len(self.output_token_ids) + self.num_in_flight

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Return tokens [start, stop) of prompt and output together. None of them may be in flight."""
        prompt = len(self.prompt_token_ids)
        return self.prompt_token_ids[start:stop] + self.output_token_ids[max(0, start - prompt) : max(0, stop - prompt)]

    def block_keys(self, block_size: int, tokens: int) -> list[bytes]:
        """Return the prefix keys of the full blocks of the first `tokens` tokens; none without a `prefix_root`."""
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
        """Return hashes of the attachments in tokens [start, stop): equal placeholder tokens may have other content."""
        return b"".join(
            array("q", [each.first - start]).tobytes() + each.digest
            for each in self.attachments
            if each.first < stop and each.last >= start
        )

    @property
    def needs_prompt_logprobs(self) -> bool:
        """True if log-probabilities of the prompt tokens are requested."""
        return self.params.prompt_logprobs is not None
