"""Outputs of a request: tokens, text, log-probabilities, and the reason why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from math import isnan

from lamella.engine.requests.detokenizer import IncrementalDetokenizer
from lamella.engine.requests.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from lamella.engine.requests.request import Request
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.engine.steps.sampler import TokenLogprobs
from lamella.ops.sampling import NO_TOKEN


class NotFiniteError(Exception):
    """The logits of one request contain NaN or +Inf. Other requests are not affected."""


class Completion:
    """One generated continuation of a prompt.

    Attributes:
        request: what the scheduler sees of it.
        index: among the completions of the job.
        finish_reason: why it ended; None while it runs.
        stop_reason: the stop string or stop token that ended it, if one did.
        error: message, if the finish reason is "error".
        revision: counter that increases with every change of the output.
        prompt_logprobs: log-probabilities of the prompt tokens, None for the first token; None if not requested.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        self.request, self.index = request, index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.revision = 0
        self._num_appended = 0  # output tokens for which `append_token` has returned
        self._tokenizer = tokenizer
        self._text = IncrementalDetokenizer(tokenizer, request.params, request.prompt_token_ids)
        self._logprobs: list[dict[int, Logprob]] | None = None if request.params.logprobs is None else []
        self._total = 0.0
        # As in vLLM, the first entry is None: no logits predict the first token.
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = [None] if request.needs_prompt_logprobs else None

    def append_prompt_logprobs(self, start: int, entries: Sequence[TokenLogprobs]) -> None:
        """Append log-probabilities of prompt tokens. Entries that a recomputed request delivers again are skipped.

        Args:
            start: position of the first token in `entries`.
            entries: of consecutive prompt tokens.
        """
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
        """Append the results of a step.

        Args:
            start: position of the first prompt token in `prompt_logprobs`.
            prompt_logprobs: log-probabilities of consecutive prompt tokens.
            token_id: the sampled token; `NO_TOKEN` if the logits allow none; None if the step sampled none.
            logprobs: log-probabilities at the sampled token; None if not requested.

        Raises:
            NotFiniteError: logits were NaN or infinite. Nothing is appended.
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
            self.append_prompt_logprobs(start, prompt_logprobs)
        if token_id is not None:
            self.append_token(token_id, logprobs)

    def append_token(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Append a sampled token. Ends the completion if the token meets a stop condition."""
        self._append(token_id, logprobs)
        self.revision += 1
        self._num_appended += 1  # last: see `roll_back`

    def roll_back(self) -> None:
        """Undo an `append_token` that an exception interrupted. The token will be sampled again."""
        tokens = self.request.output_token_ids
        if len(tokens) == self._num_appended:
            return
        self._drop_interrupted()
        self.finish_reason = self.stop_reason = None
        self._text = IncrementalDetokenizer(self._tokenizer, self.request.params, self.request.prompt_token_ids)
        try:
            for token_id in tokens:
                self._text.append(token_id)
        except Exception as error:
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, message: str) -> None:
        """End the completion with an error message, without the token that was being appended."""
        self._drop_interrupted()
        with suppress(Exception):  # detokenization itself may have failed; the text then stays as it is
            self._text.flush()
        self.error, self.finish_reason = message, "error"
        self.revision += 1

    def _drop_interrupted(self) -> None:
        """Remove the token of an interrupted `append_token`."""
        tokens = self.request.output_token_ids
        del tokens[self._num_appended :]
        if self._logprobs is not None:
            del self._logprobs[self._num_appended :]
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
        """End the completion, and append the text that was held back as the possible start of a stop string."""
        self._text.flush()
        if stop is None and self._text.stop_reason is not None:
            # The text held back contained a stop string.
            reason, stop = "stop", self._text.stop_reason
        self.finish_reason, self.stop_reason = reason, stop
        self.revision += 1

    def output(self) -> CompletionOutput:
        """Return a copy of the output so far."""
        return self.view()()

    def view(self) -> Callable[[], CompletionOutput]:
        """Return a function that copies the output as it is now, in constant time.

        The function may be called later and in another thread: the lists are only appended to, and it copies their
        beginnings.
        """
        tokens, num_tokens = self.request.output_token_ids, len(self.request.output_token_ids)
        pieces, num_pieces = self._text.pieces, len(self._text.pieces)
        logprobs, total = self._logprobs, self._total
        finish_reason, stop_reason, error = self.finish_reason, self.stop_reason, self.error
        return lambda: CompletionOutput(
            index=self.index,
            text="".join(pieces[:num_pieces]),
            token_ids=tokens[:num_tokens],
            cumulative_logprob=None if logprobs is None else total,
            logprobs=None if logprobs is None else logprobs[:num_tokens],
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=error,
        )

    def _token_text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token_id)


class Job:
    """A user's request: one prompt and its `n` completions."""

    def __init__(
        self, request_id: str, prompt: str | None, completions: list[Completion], salt: str | None = None
    ) -> None:
        """Make a job.

        Args:
            request_id: id of the job.
            prompt: text of the prompt, if it was given as text.
            completions: at least one.
            salt: only requests with the same salt share cached prefixes.
        """
        self.request_id, self.prompt, self.completions, self.salt = request_id, prompt, completions, salt

    @property
    def revision(self) -> int:
        """Counter that increases with every change of an output."""
        first, *others = self.completions
        return first.revision + sum(completion.revision for completion in others) if others else first.revision

    @property
    def finished(self) -> bool:
        """True if all completions have ended."""
        return all(completion.finish_reason is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """Return a copy of the outputs so far."""
        return self.view()()

    def view(self) -> Callable[[], RequestOutput]:
        """Return a function that copies the outputs as they are now, see `Completion.view`."""
        first, finished = self.completions[0], self.finished
        views, num_cached = [completion.view() for completion in self.completions], first.request.num_cached_tokens
        prompt_logprobs = first.prompt_logprobs
        num_logprobs = 0 if prompt_logprobs is None else len(prompt_logprobs)
        return lambda: RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=list(first.request.prompt_token_ids),
            prompt_logprobs=None if prompt_logprobs is None else prompt_logprobs[:num_logprobs],
            outputs=[view() for view in views],
            finished=finished,
            num_cached_tokens=num_cached,
        )
