"""Sampling parameters of one request."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any

from lamella.errors import ParameterError
from lamella.ops.sampling import GREEDY_BELOW
from lamella.validation import INT64, finite, is_one_of, is_placement, is_text, shown, whole

MAX_LOGPROBS = 1000
"""Default limit of `logprobs` and `prompt_logprobs`; the engine option `max_logprobs` replaces it."""


MAX_COMPLETIONS = 16384
"""Largest `n`."""

MAX_STOPS, MAX_STOP_LENGTH = 256, 1024
"""Most stop strings of a request, and most characters of each: every new token is compared with all of them."""

# Limits of temperature and repetition penalty for which float32 logits stay finite.
_MAX_TEMPERATURE = 1e30
_REPETITION = 1e-3, 1e3


def _require(ok: bool, field: str, allowed: str, value: object) -> None:
    if not ok:
        raise ParameterError(f"{field} must be {allowed}, got {shown(value)}")


def _ids(values: object) -> list[int] | None:
    """Return token ids as Python ints; None if `values` is not a list of token ids."""
    if not isinstance(values, (list, tuple)):
        return None
    found = [i for i in map(whole, values) if i is not None and 0 <= i <= INT64[1]]
    return found if len(found) == len(values) else None


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
        bad_words: words that must not be generated: the last token of a word is forbidden after its other tokens.
        bad_words_token_ids: `bad_words` as token ids, for models without a tokenizer.
        allowed_token_ids: the only tokens that can be generated; None allows all.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None: as many as the model's length allows.
        min_tokens: number of tokens before which only `max_tokens` can end the text.
        logprobs: report the log-probabilities of the sampled token and of this many likeliest tokens; -1: all tokens.
        prompt_logprobs: like `logprobs`, for each prompt token.
        repetition_penalty: > 1 discourages tokens of the prompt and the output; in [0.001, 1000].
        presence_penalty: subtracted from the logit of each token in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: token id -> bias in [-100, 100], added to its logit.
        detokenize: produce text; False excludes `stop`.
        skip_special_tokens: leave special tokens out of the text.
        placement: for a supernet, the active mixer of each layer for this request, see
            `lamella.config.read_placement`; None: the engine's placement. Needs an engine with `mixed_placements`.
        include_stop_str_in_output: end the text after, not before, the stop string or the text of the stop token.
        truncate_prompt_tokens: keep only this many last tokens of the prompt; -1: as many as the model's length allows.
        spaces_between_special_tokens: only the default, True, is supported.
        structured_outputs, logits_processors, extra_args, output_kind, flat_logprobs, logprob_token_ids,
            skip_reading_prefix_cache, thinking_token_budget, repetition_detection: fields of vLLM; only the defaults
            are supported.

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
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    spaces_between_special_tokens: bool = True
    structured_outputs: Any = None
    logits_processors: Any = None
    extra_args: Any = None
    output_kind: Any = 0
    flat_logprobs: Any = False
    logprob_token_ids: Any = None
    skip_reading_prefix_cache: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None

    def __post_init__(self) -> None:
        self._set_int("n", 1, MAX_COMPLETIONS)
        self._set_int("top_k", -1)
        self._set_int("min_tokens", 0)
        for field, low in (("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1)):
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

        # Lists are copied, so that later changes by the caller do not affect a validated request.
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
        numbers = _ids(ids)
        _require(ids is None or numbers is not None, "stop_token_ids", "None or a list of integers >= 0", ids)
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

        self._check_words()
        self._check_unsupported()
        _require(not (self.greedy and self.n > 1), "n", "1 when the temperature is 0", self.n)
        if self.max_tokens is not None:
            allowed = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)
        _require(self.detokenize or not stop, "stop", "None when detokenize is False", stop)

    def _check_words(self) -> None:
        """Check the fields that restrict the tokens of prompt and output."""
        words, ids, allowed = self.bad_words, self.bad_words_token_ids, self.allowed_token_ids
        ok = words is None or (isinstance(words, (list, tuple)) and all(is_text(w) and w for w in words))
        _require(ok, "bad_words", "None or a list of non-empty strings", words)
        sequences = [_ids(sequence) for sequence in ids] if isinstance(ids, (list, tuple)) else [None]
        ok = ids is None or all(sequences)
        _require(ok, "bad_words_token_ids", "None or a list of non-empty lists of integers >= 0", ids)
        _require(
            allowed is None or bool(_ids(allowed)),
            "allowed_token_ids",
            "None or a list of integers >= 0, not empty",
            allowed,
        )
        copies = {
            "bad_words": None if words is None else [str(w) for w in words],
            "bad_words_token_ids": None if ids is None else sequences,
            "allowed_token_ids": _ids(allowed),
        }
        for field, value in copies.items():
            object.__setattr__(self, field, value)
        self._set_int("truncate_prompt_tokens", -1, optional=True)
        limit = self.truncate_prompt_tokens
        _require(limit != 0, "truncate_prompt_tokens", "None, -1 or an integer >= 1", limit)

    def _check_unsupported(self) -> None:
        """Reject non-default values of vLLM's fields that this engine does not support."""
        supported: dict[str, tuple[tuple[Any, ...], str]] = {
            "spaces_between_special_tokens": ((True,), "True: special tokens are decoded as the tokenizer says"),
            "structured_outputs": ((None,), "None: allowed_token_ids is near, or vLLM with the lamella plugin"),
            "logits_processors": ((None, []), "None: logit_bias, bad_words and allowed_token_ids are near"),
            "extra_args": ((None, {}), "None: nothing reads them"),
            "flat_logprobs": ((False,), "False: log-probabilities are dicts"),
            "logprob_token_ids": ((None,), "None: logprobs=-1 has all tokens"),
            "skip_reading_prefix_cache": ((None, False), "None: a cache_salt of its own keeps a prompt apart"),
            "thinking_token_budget": ((None,), "None: max_tokens is near"),
            "repetition_detection": ((None,), "None: repetition_penalty is near"),
        }
        for field, (values, allowed) in supported.items():
            value = getattr(self, field)
            _require(is_one_of(value, values), field, allowed, value)
        kind = getattr(self.output_kind, "value", self.output_kind)
        allowed = "CUMULATIVE (0): what is new is the end of each text"
        _require(type(kind) is int and kind == 0, "output_kind", allowed, self.output_kind)

    def _set_int(self, field: str, low: int, high: int = INT64[1], optional: bool = False) -> None:
        """Check a field, and convert it to a Python int from any kind of whole number."""
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
        """True if the likeliest token is selected instead of a random draw."""
        return self.temperature < GREEDY_BELOW

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def validate_for(self, vocab_size: int) -> None:
        """Check the fields that depend on the model: token ids and numbers of log-probabilities.

        Args:
            vocab_size: of the model.

        Raises:
            ParameterError: a token id is not below `vocab_size`, or more log-probabilities are requested than the
                vocabulary has tokens.
        """
        for field, token_id in self._token_ids():
            _require(token_id < vocab_size, field, f"of token ids below the vocabulary size {vocab_size}", token_id)
        for field in ("logprobs", "prompt_logprobs"):
            value = getattr(self, field)
            _require(value is None or value <= vocab_size, field, f"at most {vocab_size}", value)

    def _token_ids(self) -> Iterator[tuple[str, int]]:
        yield from (("stop_token_ids", i) for i in self.stop_token_ids or ())
        yield from (("logit_bias", i) for i in self.logit_bias or ())
        yield from (("allowed_token_ids", i) for i in self.allowed_token_ids or ())
        yield from (("bad_words_token_ids", i) for sequence in self.bad_words_token_ids or () for i in sequence)


def needs_previous_tokens(params: SamplingParams) -> bool:
    """Return True if sampling a token depends on previous tokens."""
    return has_penalty(params) or any(len(ids) > 1 for ids in params.bad_words_token_ids or ())


def is_restricted(params: SamplingParams) -> bool:
    """Return True if some tokens are forbidden, always or after certain tokens."""
    return params.allowed_token_ids is not None or bool(params.bad_words_token_ids)


def has_penalty(params: SamplingParams) -> bool:
    """Return True if logits of previous tokens are penalised."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
