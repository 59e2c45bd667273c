"""What comes of a request: tokens, text, log-probabilities, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from math import isnan

from lamella.engine.requests.detokenizer import IncrementalDetokenizer
from lamella.engine.requests.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from lamella.engine.requests.request import Request
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.engine.steps.sampler import TokenLogprobs
from lamella.ops.sampling import NO_TOKEN


class NotFiniteError(Exception):
    """The model's logits for one request are no numbers: an error of that request alone."""


class Completion:
    """One generated continuation.

    Attributes:
        error: why it ended, where the finish reason is "error".
        revision: grows with everything that changes the output.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        self.request, self.index = request, index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.revision = 0
        self._taken = 0  # output tokens that have been taken to the end of `take`
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, request.params, request.prompt_token_ids)
        self._logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
        self._total = 0.0
        # vLLM's form: nothing precedes the first token, so nothing predicts it.
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if request.needs_prompt_logprobs else None

    def take_prompt(self, start: int, entries: Sequence[TokenLogprobs]) -> None:
        """Log-probabilities of the prompt tokens from `start` on; a request computed again brings known ones again."""
        if self.prompt_logprobs is None:
            return
        known = len(self.prompt_logprobs) - start
        self.prompt_logprobs += [entry.as_dict(self._token_text) for entry in entries[known:]]

    def receive(
        self,
        start: int,
        prompt_logprobs: Sequence[TokenLogprobs],
        token_id: int | None,
        logprobs: TokenLogprobs | None,
    ) -> None:
        """Take what a step gave this request.

        Args:
            start: position of the first prompt token that `prompt_logprobs` are of.
            prompt_logprobs: log-probabilities of prompt tokens, in order.
            token_id: the sampled token, `NO_TOKEN` if none could be chosen, None if the step sampled none.
            logprobs: those of the sampled token, if wanted.

        Raises:
            NotFiniteError: logits were NaN or infinite. Neither the token nor the log-probabilities are taken.
        """
        for position, entry in enumerate(prompt_logprobs, start):
            if isnan(entry.logprob):
                raise NotFiniteError(f"prompt token {position}: the logits before it hold NaN or +Inf")
        if token_id == NO_TOKEN:
            index = len(self.request.output_token_ids)
            raise NotFiniteError(
                f"output token {index}: the logits hold NaN or +Inf, or the sampling parameters allow no token; "
                "`lamella parity MODEL bisect` names the first operation that gives NaN"
            )
        if prompt_logprobs:
            self.take_prompt(start, prompt_logprobs)
        if token_id is not None:
            self.take(token_id, logprobs)

    def take(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """One more token; may end the completion."""
        self._append(token_id, logprobs)
        self.revision += 1
        self._taken += 1  # last: see `roll_back`

    def roll_back(self) -> None:
        """Undo a `take` that an exception interrupted; the token will be sampled again."""
        tokens = self.request.output_token_ids
        if len(tokens) == self._taken:
            return
        self._cut()
        self.finish_reason = self.stop_reason = None
        self._text = IncrementalDetokenizer(self._tokenizer, self.request.params, self.request.prompt_token_ids)
        try:
            for token_id in tokens:
                self._text.append(token_id)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, message: str) -> None:
        """End with an error; the token in hand is left out."""
        self._cut()
        with suppress(Exception):  # the text may be what has failed; it then stays as it is
            self._text.flush()
        self.error, self.finish_reason = message, "error"
        self.revision += 1

    def _cut(self) -> None:
        """Drop the tokens that were not taken to the end."""
        tokens = self.request.output_token_ids
        del tokens[self._taken :]
        if self._logprobs is not None:
            del self._logprobs[self._taken :]
            self._total = sum((row[token].logprob for row, token in zip(self._logprobs, tokens, strict=True)), 0.0)

    def _append(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        request, params = self.request, self.request.params
        request.output_token_ids.append(token_id)
        if self._logprobs is not None:
            assert logprobs is not None
            self._logprobs.append(logprobs.as_dict(self._token_text))
            self._total += logprobs.logprob
        count = len(request.output_token_ids)
        if count >= params.min_tokens:
            is_end = token_id in request.eos_token_ids and not params.ignore_eos
            if is_end or token_id in (params.stop_token_ids or ()):
                if params.include_stop_str_in_output:
                    self._text.append(token_id)
                return self.end("stop", None if is_end else token_id)
        self._text.append(token_id)
        if self._text.stop_reason is not None:
            return self.end("stop", self._text.stop_reason)
        if count >= request.max_tokens:
            return self.end("length")
        return None

    def end(self, reason: FinishReason, stop: int | str | None = None) -> None:
        """Nothing follows; text that was held back comes out."""
        self._text.flush()
        if stop is None and self._text.stop_reason is not None:
            # What was held back held a stop string.
            reason, stop = "stop", self._text.stop_reason
        self.finish_reason, self.stop_reason = reason, stop
        self.revision += 1

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            index=self.index,
            text=self._text.text,
            token_ids=list(self.request.output_token_ids),
            cumulative_logprob=None if self._logprobs is None else self._total,
            logprobs=None if self._logprobs is None else list(self._logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            error=self.error,
        )

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


class Job:
    """A user's request: one prompt, `n` completions."""

    def __init__(
        self, request_id: str, prompt: str | None, completions: list[Completion], salt: str | None = None
    ) -> None:
        """`salt` keeps its prefixes apart from others'."""
        self.request_id, self.prompt, self.completions, self.salt = request_id, prompt, completions, salt

    @property
    def revision(self) -> int:
        first, *others = self.completions
        return first.revision + sum(completion.revision for completion in others) if others else first.revision

    @property
    def finished(self) -> bool:
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        first = self.completions[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(first.request.prompt_token_ids),
            prompt_logprobs=None if first.prompt_logprobs is None else list(first.prompt_logprobs),
            outputs=[completion.output() for completion in self.completions],
            finished=self.finished,
            num_cached_tokens=first.request.num_cached_tokens,
        )
