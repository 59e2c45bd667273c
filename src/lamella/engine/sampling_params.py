"""What a caller may ask of the sampling of one request."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

from lamella.errors import ParameterError
from lamella.ops.sampling import GREEDY_BELOW
from lamella.validation import INT64, finite, is_placement, is_text, shown, whole

MAX_LOGPROBS = 1000
"""Most alternatives that `logprobs` and `prompt_logprobs` may ask for."""


MAX_COMPLETIONS = 16384
"""Most completions that `n` may ask for."""

MAX_STOPS, MAX_STOP_LENGTH = 256, 1024
"""Most stop strings of a request, and most characters of one: each new token's text is compared with all of them."""

# The widest choice of temperature and penalty for which float32 logits stay finite.
_MAX_TEMPERATURE = 1e30
_REPETITION = 1e-3, 1e3


def _require(ok: bool, field: str, allowed: str, value: object) -> None:
    if not ok:
        raise ParameterError(f"{field} must be {allowed}, got {shown(value)}")


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request, with vLLM's names, meanings and defaults.

    Attributes:
        n: completions to return, at most 16384; 1 when greedy.
        temperature: divisor of the logits, at most 1e30; 0 (in fact anything below 1e-5) is greedy.
        top_p: keep the smallest set of most likely tokens with at least this probability, in (0, 1].
        top_k: keep this many most likely tokens; 0, -1 or more than there are keeps all.
        min_p: drop tokens less likely than this fraction of the likeliest one, in [0, 1].
        seed: 64-bit signed seed of the draws; None lets the engine choose one.
        stop: string(s) that end the text, at most 256 of at most 1024 characters each.
        stop_token_ids: tokens that end the text.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None is as many as the model's length allows.
        min_tokens: tokens that must be generated before anything but `max_tokens` may end the text.
        logprobs: report the sampled token's log-probability and those of this many likeliest tokens.
        prompt_logprobs: the same for each prompt token.
        repetition_penalty: > 1 discourages tokens of the prompt and the output; in [0.001, 1000].
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
        self._set_int("n", 1, MAX_COMPLETIONS)
        self._set_int("top_k", -1)
        self._set_int("min_tokens", 0)
        for field, low in (("max_tokens", 1), ("logprobs", 0), ("prompt_logprobs", 0)):
            self._set_int(field, low, optional=True)
        self._set_int("seed", INT64[0], optional=True)

        self._set_float("temperature", 0, _MAX_TEMPERATURE)
        self._set_float("repetition_penalty", *_REPETITION)
        value = finite(self.top_p)
        _require(value is not None and 0 < value <= 1, "top_p", "a number in (0, 1]", self.top_p)
        object.__setattr__(self, "top_p", value)
        for field, least, most in (("min_p", 0, 1), ("presence_penalty", -2, 2), ("frequency_penalty", -2, 2)):
            self._set_float(field, least, most)

        for field in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            value = getattr(self, field)
            _require(isinstance(value, bool), field, "True or False", value)

        # Lists are copied: what the caller does with his own must not reach a request that has been checked.
        stop = self.stop
        text = is_text(stop) and stop != ""
        listed = isinstance(stop, (list, tuple)) and all(is_text(s) and s for s in stop)
        _require(stop is None or text or listed, "stop", "None, a non-empty string or a list of them", stop)
        _require(len(self.stop_strings) <= MAX_STOPS, "stop", f"at most {MAX_STOPS} strings", len(self.stop_strings))
        longest = max(map(len, self.stop_strings), default=0)
        _require(longest <= MAX_STOP_LENGTH, "stop", f"of strings of at most {MAX_STOP_LENGTH} characters", longest)
        if listed:
            object.__setattr__(self, "stop", [str(s) for s in self.stop_strings])
        ids = self.stop_token_ids
        numbers = [whole(i) for i in ids] if isinstance(ids, (list, tuple)) else [None]
        listed = all(i is not None and 0 <= i <= INT64[1] for i in numbers)
        _require(ids is None or listed, "stop_token_ids", "None or a list of integers >= 0", ids)
        if ids is not None:
            object.__setattr__(self, "stop_token_ids", numbers)
        bias = self.logit_bias
        pairs = [(whole(i), finite(b)) for i, b in bias.items()] if isinstance(bias, dict) else [(None, None)]
        mapped = all(i is not None and 0 <= i <= INT64[1] and b is not None and -100 <= b <= 100 for i, b in pairs)
        _require(bias is None or mapped, "logit_bias", "None or a dict of token ids to numbers in [-100, 100]", bias)
        if bias is not None:
            object.__setattr__(self, "logit_bias", dict(pairs))
        names = "None, a string, a list of names or a dict of layers to names"
        _require(self.placement is None or is_placement(self.placement), "placement", names, self.placement)
        if isinstance(self.placement, (list, dict)):
            object.__setattr__(self, "placement", copy(self.placement))

        _require(not (self.greedy and self.n > 1), "n", "1 when the temperature is 0", self.n)
        if self.max_tokens is not None:
            allowed = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)
        _require(self.detokenize or not stop, "stop", "None when detokenize is False", stop)

    def _set_int(self, field: str, low: int, high: int = INT64[1], optional: bool = False) -> None:
        """Check a field, and keep it as Python's int, whatever kind of whole number it was."""
        value = getattr(self, field)
        if value is None and optional:
            return
        number, none = whole(value), "None or " if optional else ""
        _require(number is not None and number >= low, field, f"{none}an integer >= {low}", value)
        _require(number is not None and number <= high, field, f"{none}an integer <= {high}", value)
        object.__setattr__(self, field, number)

    def _set_float(self, field: str, low: float, high: float) -> None:
        value = getattr(self, field)
        number = finite(value)
        _require(number is not None and low <= number <= high, field, f"a number in [{low}, {high}]", value)
        object.__setattr__(self, field, number)

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
