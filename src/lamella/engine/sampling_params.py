"""What a caller may ask of the sampling of one request."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lamella.errors import ParameterError
from lamella.ops.sampling import GREEDY_BELOW

MAX_LOGPROBS = 1000
"""Most alternatives that `logprobs` and `prompt_logprobs` may ask for, unless the engine's `max_logprobs` says more."""


def _require(ok: bool, field: str, allowed: str, value: object) -> None:
    if not ok:
        raise ParameterError(f"{field} must be {allowed}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_int(i) and i >= 0 for i in value)


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
        bad_words: words that must not be generated: the last token of each is forbidden where the others came before.
        bad_words_token_ids: the same as token ids, for models without a tokenizer.
        allowed_token_ids: the only tokens that may be generated; None allows all.
        ignore_eos: do not end at the model's end-of-sequence tokens.
        max_tokens: most tokens to generate; None is as many as the model's length allows.
        min_tokens: tokens that must be generated before anything but `max_tokens` may end the text.
        logprobs: report the sampled token's log-probability and those of this many likeliest tokens; -1 is all.
        prompt_logprobs: the same for each prompt token.
        repetition_penalty: > 1 discourages tokens of the prompt and the output.
        presence_penalty: subtracted from the logit of each token in the output, in [-2, 2].
        frequency_penalty: subtracted once per occurrence in the output, in [-2, 2].
        logit_bias: token id -> bias in [-100, 100], added to its logit.
        detokenize: produce text; without it, `stop` cannot be used.
        skip_special_tokens: leave special tokens out of the text.
        placement: of a supernet, which mixer is active in each layer for this request, see
            `lamella.config.read_placement`; None is the engine's. Needs an engine with `mixed_placements`.
        include_stop_str_in_output: end the text after, not before, the stop string or the text of the stop token.
        truncate_prompt_tokens: keep only this many last tokens of the prompt; -1 is what the model's length allows.
        spaces_between_special_tokens: only the default, True, is possible.
        structured_outputs, logits_processors, extra_args, output_kind, flat_logprobs, logprob_token_ids,
            skip_reading_prefix_cache, thinking_token_budget, repetition_detection: of vLLM; only the defaults are
            possible.

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
        for field, low in (("n", 1), ("top_k", -1), ("min_tokens", 0)):
            value = getattr(self, field)
            _require(_is_int(value) and value >= low, field, f"an integer >= {low}", value)
        for field, low in (("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1)):
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

        self._check_words()
        self._check_unsupported()
        _require(not (self.greedy and self.n > 1), "n", "1 when the temperature is 0", self.n)
        if self.max_tokens is not None:
            allowed = f"at most max_tokens ({self.max_tokens})"
            _require(self.min_tokens <= self.max_tokens, "min_tokens", allowed, self.min_tokens)
        _require(self.detokenize or not stop, "stop", "None when detokenize is False", stop)

    def _check_words(self) -> None:
        """Check what restricts the tokens of prompt and output."""
        words, ids, allowed = self.bad_words, self.bad_words_token_ids, self.allowed_token_ids
        ok = words is None or (isinstance(words, (list, tuple)) and all(isinstance(w, str) and w for w in words))
        _require(ok, "bad_words", "None or a list of non-empty strings", words)
        ok = ids is None or (isinstance(ids, (list, tuple)) and all(_are_ids(sequence) for sequence in ids))
        _require(ok, "bad_words_token_ids", "None or a list of non-empty lists of integers >= 0", ids)
        _require(
            allowed is None or _are_ids(allowed),
            "allowed_token_ids",
            "None or a list of integers >= 0, not empty",
            allowed,
        )
        limit = self.truncate_prompt_tokens
        ok = limit is None or (_is_int(limit) and (limit == -1 or limit >= 1))
        _require(ok, "truncate_prompt_tokens", "None, -1 or an integer >= 1", limit)

    def _check_unsupported(self) -> None:
        """Refuse other values than the defaults of what vLLM has and this engine has not."""
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
            _require(value in values, field, allowed, value)
        kind = getattr(self.output_kind, "value", self.output_kind)
        allowed = "CUMULATIVE (0): what is new is the end of each text"
        _require(kind == 0 and kind is not False, "output_kind", allowed, self.output_kind)

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
            ParameterError: a token id is not below `vocab_size`, or more log-probabilities are asked for than there are
                tokens.
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


def looks_back(params: SamplingParams) -> bool:
    """Return whether the choice of a token depends on the tokens before."""
    return has_penalty(params) or any(len(ids) > 1 for ids in params.bad_words_token_ids or ())


def is_restricted(params: SamplingParams) -> bool:
    """Return whether some tokens may never be chosen, or not after others."""
    return params.allowed_token_ids is not None or bool(params.bad_words_token_ids)


def has_penalty(params: SamplingParams) -> bool:
    """Return whether logits are lowered for the tokens before."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
