"""Token sequences to score: a prompt, and a continuation that every engine is forced to generate."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ParameterError
from lamella.validation import checked_int

# A tokenizer that produces fewer distinct tokens from the bundled text cannot represent English.
_FEWEST_TOKENS = 64


@dataclass(frozen=True)
class TokenSequence:
    """Prompt and continuation, at least one token each.

    The n tokens have n - 1 predictions, for tokens 1..n-1. The prefill predicts the prompt and `continuation[0]`;
    decode step k predicts `continuation[k]`.

    Attributes:
        prompt: tokens that are prefilled.
        continuation: tokens that are forced one by one.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt or not self.continuation:
            raise ParameterError("a sequence needs at least one prompt token and one token after it")

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All tokens in order."""
        return self.prompt + self.continuation

    @property
    def num_predictions(self) -> int:
        """Number of predictions: one less than the number of tokens."""
        return len(self.prompt) + len(self.continuation) - 1

    def decode_step(self, prediction: int) -> int:
        """Return the decode step that predicts token `prediction + 1`; 0 for the prefill."""
        return max(0, prediction + 1 - len(self.prompt))


@dataclass(frozen=True)
class Inputs:
    """Sequences with their origin.

    Attributes:
        sequences: the sequences to score.
        source: description of the origin, for the report.
        prompt_len: requested tokens per prompt.
        decode_len: requested tokens per continuation.
    """

    sequences: tuple[TokenSequence, ...]
    source: str
    prompt_len: int
    decode_len: int


def split(token_ids: Sequence[int], decode_len: int) -> TokenSequence:
    """Split off the last `decode_len` tokens as the continuation, and leave at least one token for the prompt."""
    cut = max(1, len(token_ids) - decode_len)
    return TokenSequence(tuple(token_ids[:cut]), tuple(token_ids[cut:]))


def make_inputs(
    vocab_size: int,
    tokenizer: Tokenizer | None,
    prompts: str | Path | Sequence[Any] | None = None,
    count: int | None = None,
    prompt_len: int = 64,
    decode_len: int = 16,
    seed: int = 0,
) -> Inputs:
    """Build the sequences to score.

    Args:
        vocab_size: token ids must be below this number.
        tokenizer: encodes texts; None if the model has none.
        prompts: a file with one prompt per line (text, a JSON list of token ids, or an object with `prompt` or
            `prompt_token_ids`; text that starts with a bracket needs the object); a list of such prompts; "random" for
            random tokens; or None for the bundled text. Without a tokenizer that can encode the bundled text, None
            gives random tokens.
        count: maximum number of sequences; for random tokens the exact number, 16 if None.
        prompt_len: maximum tokens per prompt.
        decode_len: maximum tokens per continuation.
        seed: seed of random tokens.

    Raises:
        ParameterError: a prompt cannot be used; the message names its line or index.
    """
    counts = {"prompt_len": prompt_len, "decode_len": decode_len, "count": 1 if count is None else count}
    for name, value in counts.items():
        checked_int(name, value, 1, error=ParameterError)
    length = prompt_len + decode_len
    if prompts is None:
        texts = files("lamella.parity").joinpath("text.txt").read_text("utf-8").strip().split("\n\n")
        encoded = [] if tokenizer is None else [tokenizer.encode(text) for text in texts]
        known = {token for ids in encoded for token in ids}
        readable = len(known) >= _FEWEST_TOKENS and max(known) < vocab_size
        source = "bundled text" if readable else "random tokens (no tokenizer that reads the bundled text)"
    elif prompts == "random":
        encoded, readable, source = [], False, "random tokens"
    else:
        encoded, source = _given(prompts, vocab_size, tokenizer)
        readable = True
    if not readable:
        generator = random.Random(seed)
        encoded = [[generator.randrange(vocab_size) for _ in range(length)] for _ in range(count or 16)]
    chosen = encoded[: count or len(encoded)]
    sequences = tuple(split(ids[:length], decode_len) for ids in chosen if len(ids) > 1)
    if not sequences:
        raise ParameterError(f"prompts: none of {source} has two tokens")
    return Inputs(sequences, source, prompt_len, decode_len)


def _given(
    prompts: str | Path | Sequence[Any], vocab_size: int, tokenizer: Tokenizer | None
) -> tuple[list[list[int]], str]:
    if isinstance(prompts, str | Path):
        path = Path(prompts)
        try:
            lines = path.read_text("utf-8-sig").split("\n")
        except (OSError, ValueError) as error:
            raise ParameterError(f"prompts: {path} cannot be read ({error})") from error
        entries: list[tuple[str, Any]] = [
            (f"{path}:{number}", _parse(line, f"{path}:{number}"))
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]
        source = path.name
    else:
        entries, source = [(f"prompts[{index}]", prompt) for index, prompt in enumerate(prompts)], "given prompts"
    if not entries:
        raise ParameterError(f"prompts: {source} is empty")
    return [_tokens(entry, location, vocab_size, tokenizer) for location, entry in entries], source


def _parse(line: str, location: str) -> Any:
    if not line.lstrip().startswith(("[", "{")):
        return line
    try:
        return json.loads(line)
    except ValueError as error:
        raise ParameterError(f"{location}: not JSON ({error})") from error


def _tokens(entry: Any, location: str, vocab_size: int, tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(entry, dict):
        if len(entry) != 1 or not set(entry) <= {"prompt", "prompt_token_ids"}:
            raise ParameterError(f"{location}: an object needs one key, prompt or prompt_token_ids")
        (entry,) = entry.values()
    if isinstance(entry, str):
        if tokenizer is None:
            raise ParameterError(f"{location}: the model has no tokenizer.json; give token ids")
        entry = tokenizer.encode(entry)
    ids = list(entry) if isinstance(entry, list | tuple) else None
    if ids is None or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size for i in ids):
        raise ParameterError(f"{location}: must be text or token ids below {vocab_size}")
    if len(ids) < 2:
        raise ParameterError(f"{location}: {len(ids)} tokens, at least 2 are needed")
    return ids
