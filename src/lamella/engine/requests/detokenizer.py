"""Text of a growing list of tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CONTEXT = 5  # prompt tokens that precede the output in its first window
_CHARACTER = 4  # most bytes of a UTF-8 character, hence most tokens that it can span


class IncrementalDetokenizer:
    """Turns one completion's tokens into text as they come.

    What `append` and `flush` return, concatenated, is always `text`. A character whose bytes are not complete, and an
    end of the text that may yet become a stop string, are held back until they are decided.

    A token that ends the completion (end of sequence, stop token) is not part of its text: do not append it unless its
    text is wanted. Without a tokenizer, or with `params.detokenize` off, the text is "".

    Attributes:
        stop_reason: the stop string that ended the text, None before. From then on nothing changes it any more.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        self.stop_reason: str | None = None
        self._tokenizer = tokenizer if params.detokenize else None
        self._skip_special = params.skip_special_tokens
        self._stops = params.stop_strings
        self._include_stop = params.include_stop_str_in_output
        self._unstoppable = params.min_tokens  # tokens whose text cannot end the completion
        self._pieces: list[str] = []
        self._held = ""  # decoded, but possibly the start of a stop string
        # The window: tokens up to `_read` have been turned into text and serve as context, the others have not. What a
        # token adds is the difference that it makes to the window's text; alone, it could lose a leading space.
        self._ids = self._context(prompt_token_ids)
        self._read = len(self._ids)

    @property
    def text(self) -> str:
        """All text returned so far."""
        return "".join(self._pieces)

    def append(self, token_id: int) -> str:
        """Take one more token; returns the text that it settles, often but not always the token's own."""
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
        """End the text; returns all that was held back, an incomplete character as U+FFFD."""
        if self._tokenizer is None or self.stop_reason is not None:
            return ""
        rest = self._text_until(len(self._ids))
        self._advance(len(self._ids))
        return self._emit(rest, self._unstoppable == 0, last=True)

    def _is_visible(self, token_id: int, tokenizer: Tokenizer) -> bool:
        # Decoding drops the others beforehand: as context they would be none.
        return token_id < tokenizer.vocab_size and not (self._skip_special and token_id in tokenizer.special_ids)

    def _context(self, prompt: Sequence[int]) -> list[int]:
        tokenizer = self._tokenizer
        if tokenizer is None:
            return []
        tail = [int(i) for i in prompt[-4 * _CONTEXT :] if self._is_visible(i, tokenizer)]
        # Begun within a character, byte fallback would take all bytes that follow for broken, too.
        sizes = range(_CONTEXT, _CONTEXT + _CHARACTER)
        return min((tail[-size:] for size in sizes), key=lambda ids: self._decode_ids(ids).count(_BROKEN))

    def _decode_ids(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(ids, self._skip_special)

    def _text_until(self, end: int) -> str:
        """What the window's tokens from `_read` to `end` add to its text."""
        before, after = self._decode_ids(self._ids[: self._read]), self._decode_ids(self._ids[:end])
        if after.startswith(before):
            return after[len(before) :]
        if before.endswith(_BROKEN):  # a prompt's incomplete last character, completed now
            return after[next(n for n in range(len(before), -1, -1) if after.startswith(before[:n])) :]
        # Byte fallback breaks a whole run of byte tokens where one is wrong: spare those already read.
        return self._decode_ids(self._ids[self._read : end])

    def _advance(self, end: int) -> None:
        """Have the tokens up to `end` read, the latest of them as context."""
        del self._ids[: self._read]
        self._read = end - self._read

    def _decode(self) -> str:
        """The text that is complete with the latest token."""
        end = len(self._ids)
        text = self._text_until(end)
        if not text:  # nothing yet, so no context either
            return ""
        if not text.endswith(_BROKEN):
            self._advance(end)
            return text
        # Some U+FFFD stay: they are in the text, or their bytes are wrong. Of more tokens than an incomplete character
        # can have, the first are settled. A boundary is where both sides together read shortest, as a cut within a
        # character adds U+FFFD.
        if end - self._read >= _CHARACTER:
            sides = [
                (head, rest, cut)
                for cut in range(self._read + 1, end)
                for head, rest in [(self._text_until(cut), self._decode_ids(self._ids[cut:]))]
                if rest.endswith(_BROKEN) and len(head) + len(rest) <= len(text)
            ]
            if sides:
                head, _, cut = min(sides, key=lambda side: len(side[0]) + len(side[1]))
                del self._ids[:cut]  # no context: the rest reads right without, and broken bytes may break it
                self._read = 0
                return head
        return ""

    def _emit(self, text: str, stoppable: bool, last: bool = False) -> str:
        """Pass decoded text on, as far as it cannot become a stop string."""
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
        self._pieces.append(text[:size])
        return text[:size]

    def _find_stop(self, text: str, old: int) -> tuple[int, str] | None:
        """Start and string of the stop string that is complete first beyond `old` characters, the longest if several.

        So the result does not depend on how the text came in tokens. Held-back text contains every possible start.
        """
        found = ((text.find(stop, max(0, old - len(stop) + 1)), stop) for stop in self._stops)
        return min(
            ((start, stop) for start, stop in found if start >= 0),
            key=lambda hit: (hit[0] + len(hit[1]), hit[0]),
            default=None,
        )


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
