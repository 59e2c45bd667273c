"""What a caller may ask of the sampling of one request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lamella.errors import ParameterError
from lamella.ops.sampling import GREEDY_BELOW

MAX_LOGPROBS = 1000
"""Most alternatives that `logprobs` and `prompt_logprobs` may ask for."""


def _require(ok: bool, field: str, allowed: str, value: object) -> None:
    if not ok:
        raise ParameterError(f"{field} must be {allowed}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, with vLLM's names, meanings and defaults.

    Attributes:
        n: completions to return; 1 when greedy.
        temperature: divisor of the logits; 0 (in fact anything below 1e-5) is greedy.
        top_p: keep the smallest set of most likely tokens with at least this probability, in (0, 1].
        top_k: keep this many most likely tokens; 0 or -1 keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest one, in [0, 1].
        seed: 64-bit signed seed of the draws; None lets the engine choose one.
        stop: string(s) that end the text.
        stop_token_ids: tokens that end the text.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None is as many as the model's length allows.
        min_tokens: tokens that must be generated before anything but `max_tokens` may end the text.
        logprobs: report the sampled token's log-probability and those of this many likeliest tokens.
        prompt_logprobs: the same for each prompt token.
        repetition_penalty: > 1 discourages tokens of the prompt and the output.
        presence_penalty: subtracted from the logit of each token in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: token id -> bias in [-100, 100], added to its logit.
        detokenize: produce text; without it, `stop` cannot be used.
        skip_special_tokens: leave special tokens out of the text.
        placement: of a supernet, which mixer is active in each layer for this request, see
            `lamella.config.read_placement`; None is the engine's. Needs an engine with `mixed_placements`.
        include_stop_str_in_output: end the text after, not before, the stop string.

    Raises:
        ParameterError: a field has a wrong type or value, or two fields contradict each other.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    placement: Any = None

    def __post_init__(self) -> None:
        for field, low in (("n", 1), ("top_k", -1), ("min_tokens", 0)):
            value = getattr(self, field)
            _require(_is_int(value) and value >= low, field, f"an integer >= {low}", value)
        for field, low in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            value = getattr(self, field)
            _require(value is None or (_is_int(value) and value >= low), field, f"None or an integer >= {low}", value)
        seed = self.seed
        in_range = seed is None or (_is_int(seed) and -(2**63) <= seed < 2**63)
        _require(in_range, "seed", "None or an integer in [-2**63, 2**63)", seed)

        value = self.temperature
        _require(_is_finite(value) and value >= 0, "temperature", "a finite number >= 0", value)
        value = self.repetition_penalty
        _require(_is_finite(value) and value > 0, "repetition_penalty", "a finite number > 0", value)
        value = self.top_p
        _require(_is_finite(value) and 0 < value <= 1, "top_p", "a number in (0, 1]", value)
        for field, least, most in (("min_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
            value = getattr(self, field)
            _require(_is_finite(value) and least <= value <= most, field, f"a number in [{least}, {most}]", value)

        for field in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, field)
            _require(isinstance(value, bool), field, "True or False", value)

        stop = self.stop
        listed = isinstance(stop, (list, tuple)) and all(isinstance(s, str) and s for s in stop)
        text = isinstance(stop, str) and stop != ""
        _require(stop is None or text or listed, "stop", "None, a non-empty string or a list of them", stop)
        ids = self.stop_token_ids
        listed = isinstance(ids, (list, tuple)) and all(_is_int(i) and i >= 0 for i in ids)
        _require(ids is None or listed, "stop_token_ids", "None or a list of integers >= 0", ids)
        bias = self.logit_bias
        mapped = isinstance(bias, dict) and all(
            _is_int(i) and i >= 0 and _is_finite(b) and -100 <= b <= 100 for i, b in bias.items()
        )
        _require(bias is None or mapped, "logit_bias", "None or a dict of token ids to numbers in [-100, 100]", bias)

        _require(not (self.greedy and self.n > 1), "n", "1 when the temperature is 0", self.n)
        if self.max_tokens is not None:
            allowed = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)
        _require(self.detokenize or not stop, "stop", "None when detokenize is False", stop)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken rather than one drawn."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def validate_for(self, vocab_size: int) -> None:
        """Check what depends on the model: token ids and the number of log-probabilities.

        Raises:
            ParameterError: a token id is not below `vocab_size`, or more log-probabilities are asked for than
                `MAX_LOGPROBS` or than there are tokens.
        """
        for field, token_id in self._token_ids():
            _require(token_id < vocab_size, field, f"of token ids below the vocabulary size {vocab_size}", token_id)
        most = min(MAX_LOGPROBS, vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            _require(value is None or value <= most, field, f"at most {most}", value)

    def _token_ids(self) -> Iterator[tuple[str, int]]:
        yield from (("stop_token_ids", i) for i in self.stop_token_ids or ())
        yield from (("logit_bias", i) for i in self.logit_bias or ())


def has_penalty(params: SamplingParams) -> bool:
    """Whether the choice depends on the tokens before."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
