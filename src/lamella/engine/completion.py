"""What comes of a request: tokens, text, log-probabilities, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.engine.detokenizer import IncrementalDetokenizer
from lamella.engine.outputs import CompletionOutput, FinishReason, Logprob, RequestOutput
from lamella.engine.request import Request
from lamella.engine.sampler import TokenLogprobs
from lamella.engine.tokenizer import Tokenizer


class Completion:
    """One generated continuation."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        self.request, self.index = request, index
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.revision = 0  # grows with everything that changes the output
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

    def take(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """One more token; may end the completion."""
        request, params = self.request, self.request.params
        self.revision += 1
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
