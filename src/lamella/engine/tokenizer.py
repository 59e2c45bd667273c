"""Text to tokens and back, by a model's `tokenizer.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.errors import CheckpointError, ParameterError

if TYPE_CHECKING:
    import tokenizers


def _raise_for_input(error: BaseException, what: str) -> None:
    """Raise `ParameterError` for a failure of the tokenizers library; return if the error is no failure of its.

    Its panics are `BaseException`s, which callers take for an order to stop; they come of one text or token list.
    """
    panic = type(error).__name__ == "PanicException"  # of pyo3, which offers no type to import
    if isinstance(error, MemoryError) or not (panic or isinstance(error, Exception)):
        return
    line = next(iter(str(error).splitlines()), type(error).__name__)
    raise ParameterError(
        f"{what}: the tokenizer fails ({line}); check tokenizer.json, or use prompt_token_ids and detokenize=False"
    ) from error


class Tokenizer:
    """A thin layer over a `tokenizers.Tokenizer`.

    Attributes:
        vocab_size: one more than the largest token id, added tokens included.
        special_ids: ids of the special tokens.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        # A file may ask for the truncation or padding that its training used; a prompt must stay what it is.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self.vocab_size: int = max(tokenizer.get_vocab().values(), default=-1) + 1
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a model directory, None where there is no `tokenizer.json`.

        Raises:
            CheckpointError: the file cannot be read as a tokenizer.
        """
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        import tokenizers

        try:
            return cls(tokenizers.Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def token_id(self, token: str) -> int | None:
        """The id of a token, by its text in the vocabulary; None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the file's post-processor adds."""
        try:
            return self._tokenizer.encode(text).ids
        except BaseException as error:
            _raise_for_input(error, "prompt")
            raise

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, and unknown ids nothing."""
        try:
            return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            _raise_for_input(error, "detokenization")
            raise

    def token_text(self, token_id: int) -> str:
        """Text of one token as it reads after another, with the leading space that a text's first token loses."""
        once, twice = (self.decode([token_id] * n, skip_special_tokens=False) for n in (1, 2))
        return twice[len(once) :]
