"""Incremental detokenization with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5  # prompt tokens before the output in the first window
_CHARACTER = 4  # most bytes of a UTF-8 character, and so most tokens that it can span


class IncrementalDetokenizer:
    """Decodes the tokens of one completion as they are generated.

    The concatenated results of `append` and `flush` are always equal to `text`. Two things are held back until later
    tokens decide them: an incomplete UTF-8 character, and an end of the text that may become a stop string.

    The caller must not append a token that ends the completion (end of sequence, stop token) unless its text is wanted.
    Without a tokenizer, or with `params.detokenize=False`, the text is "".

    Attributes:
        stop_reason: the stop string that ended the text; None before. Afterwards the text does not change.
        pieces: the text in pieces; only appended to.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer if params.detokenize else None
        self._skip_special = params.skip_special_tokens
        self._stops = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._unstoppable = params.min_tokens  # number of next tokens that cannot complete a stop string
        self.pieces: list[str] = []
        self._held = ""  # decoded, but possibly the start of a stop string
        # Window of the latest tokens. Tokens before index `_read` are decoded and serve as context. The text of a token
        # is what it adds to the text of the window; decoded alone, it could lose a leading space.
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self.pieces)

    def append(self, token_id: int) -> str:
        """Append a token, and return the text that is complete now; often but not always the text of this token."""
        tokenizer = self._tokenizer
        if tokenizer is None or self.stop_reason is not None:
            return ""
        stoppable = self._unstoppable == 0
        self._unstoppable -= not stoppable
        if not self._is_visible(token_id, tokenizer):
            return ""
        self._ids.append(token_id)
        return self._emit(self._decode(), stoppable)

    def flush(self) -> str:
        """End the text, and return the text that was held back; an incomplete character becomes U+FFFD."""
        if self._tokenizer is None or self.stop_reason is not None:
            return ""
        remaining = self._text_until(len(self._ids))
        self._advance(len(self._ids))
        return self._emit(remaining, self._unstoppable == 0, last=True)

    def _is_visible(self, token_id: int, tokenizer: Tokenizer) -> bool:
        # Decoding skips other tokens, so they would be useless as context.
        return token_id < tokenizer.vocab_size and not (self._skip_special and token_id in tokenizer.special_ids)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        tail = [int(i) for i in prompt[-4 * _CONTEXT :] if self._is_visible(i, tokenizer)]
        # If the context starts inside a character, byte fallback decodes all following bytes as broken. So choose the
        # start with the fewest broken characters.
        sizes = range(_CONTEXT, _CONTEXT + _CHARACTER)
        return min((tail[-size:] for size in sizes), key=lambda ids: self._decode_ids(ids).count(_BROKEN))

    def _decode_ids(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, self._skip_special)

    def _text_until(self, end: int) -> str:
        """Return the text that the tokens [_read, end) add to the text of the window."""
        before, after = self._decode_ids(self._ids[: self._read]), self._decode_ids(self._ids[:end])
        if after.startswith(before):
            return after[len(before) :]
        if before.endswith(_BROKEN):  # these tokens complete the last character of the prompt
            return after[next(n for n in range(len(before), -1, -1) if after.startswith(before[:n])) :]
        # One wrong byte token makes byte fallback break the whole run, so decode without the context.
        return self._decode_ids(self._ids[self._read : end])

    def _advance(self, end: int) -> None:
        """Mark the tokens before `end` as decoded, and keep only the newly decoded ones as context."""
        del self._ids[: self._read]
        self._read = end - self._read

    def _decode(self) -> str:
        """Return the text that the latest token completes."""
        end = len(self._ids)
        text = self._text_until(end)
        if not text:  # keep the window: tokens without text are no context
            return ""
        if not text.endswith(_BROKEN):
            self._advance(end)
            return text
        # U+FFFD may be permanent: it is part of the text, or the bytes are wrong. An incomplete character spans fewer
        # than _CHARACTER tokens, so with more tokens the first ones are final. Split at a character boundary, which is
        # where both halves together are shortest: a split inside a character adds U+FFFD.
        if end - self._read >= _CHARACTER:
            halves = [
                (head, tail, split)
                for split in range(self._read + 1, end)
                for head, tail in [(self._text_until(split), self._decode_ids(self._ids[split:]))]
                if tail.endswith(_BROKEN) and len(head) + len(tail) <= len(text)
            ]
            if halves:
                head, _, split = min(halves, key=lambda half: len(half[0]) + len(half[1]))
                del self._ids[:split]  # no context: the tail decodes without it, and broken bytes could break the tail
                self._read = 0
                return head
        return ""

    def _emit(self, text: str, stoppable: bool, last: bool = False) -> str:
        """Add decoded text to the output, except an end that may become a stop string; return the added text."""
        old, text = len(self._held), self._held + text
        size = len(text)
        if self._stops:
            hit = self._find_stop(text, old) if stoppable else None
            if hit is not None:
                start, self.stop_reason = hit
                size = start + len(self.stop_reason) if self._include_stop else start
                text, last = text[:size], True
            if not last:
                size -= max(_overlap(text, stop) for stop in self._stops)
        self._held = text[size:]
        self.pieces.append(text[:size])
        return text[:size]

    def _find_stop(self, text: str, old: int) -> tuple[int, str] | None:
        """Return start and text of the first stop string that is complete after `old` characters, the longest of them.

        So the result does not depend on the division into tokens. Text that was held back contains all possible starts.
        """
        found = ((text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stops)
        return min(
            ((start, stop) for start, stop in found if start >= 0),
            key=lambda hit: (hit[0] + len(hit[1]), hit[0]),
            default=None,
        )


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
