"""Tokenizer and chat templates of a GGUF file.

Pre-tokenizers are selected by the name that llama.cpp's converter writes (`tokenizer.ggml.pre`). Their patterns are
those of the models' own `tokenizer.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lamella.checkpoint.gguf.file import GgufFile
from lamella.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_PATTERNS = {
    "llama-bpe": rf"{_SHORT}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "qwen2": rf"{_SHORT}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_REST}",
    "llama4": rf"{_WORD % (_SHORT + '?', _SHORT + '?')}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
    "tekken": rf"{_WORD % ('', '')}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_REST}",
}
_PATTERNS |= {"llama-v3": _PATTERNS["llama-bpe"], "llama3": _PATTERNS["llama-bpe"], "smaug-bpe": _PATTERNS["llama-bpe"]}
_PATTERNS |= {"deepseek-r1-qwen": _PATTERNS["qwen2"], "gpt-4o": _PATTERNS["llama4"]}
_GPT2 = ("default", "gpt-2", "phi-2", "jina-es", "jina-de", "mpt", "olmo", "trillion", "granite-docling")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
_WITHOUT_MERGES = (
    "llama-bpe",
    "llama-v3",
    "llama3",
    "llama4",
    "gpt-4o",
    "tekken",
)  # words in the vocabulary are not split


def read_tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """Build the tokenizer of a file.

    Raises:
        CheckpointError: the kind of tokenizer is not supported, or its data is missing.
    """
    import tokenizers
    from tokenizers import processors

    kind = file.require("tokenizer.ggml.model", str)
    tokens = file.require("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list, [_NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.token_type has not one entry for each token")
    try:
        if kind == "gpt2":
            tokenizer = _byte_level(file, tokens)
        elif kind == "llama":
            tokenizer = _sentencepiece(file, tokens)
        else:
            raise CheckpointError(f"{file.path}: tokenizer.ggml.model={kind!r} is not read: {_ADVICE}")
        for token, token_type in zip(tokens, types, strict=True):
            if token_type in (_CONTROL, _UNKNOWN):
                tokenizer.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
            elif token_type == _USER_DEFINED:
                tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False)])
    except CheckpointError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{file.path}: its tokenizer cannot be rebuilt ({error}): {_ADVICE}") from error
    before: list[tuple[str, int]] = []
    after: list[tuple[str, int]] = []
    for added, flag, role, default in (
        (before, "add_bos_token", "bos", kind == "llama"),
        (after, "add_eos_token", "eos", False),
    ):
        index = file.get(f"tokenizer.ggml.{role}_token_id", int)
        if index is not None and file.get(f"tokenizer.ggml.{flag}", bool, default):
            added.append((tokens[index], index))
    if before or after:
        template = " ".join([*(token for token, _ in before), "$A", *(token for token, _ in after)])
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[*before, *after])
    return tokenizer


_ADVICE = "give the folder of the original tokenizer as tokenizer="


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    pre = file.get("tokenizer.ggml.pre", str, "default")
    merges = [tuple(merge.split(" ", 1)) for merge in file.require("tokenizer.ggml.merges", list)]
    if any(len(merge) != 2 for merge in merges):
        raise CheckpointError(f"{file.path}: tokenizer.ggml.merges is damaged: download the file again")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in _WITHOUT_MERGES))
    steps: list[Any]
    if pre in _PATTERNS:
        pattern = tokenizers.Regex(_PATTERNS[pre])
        steps = [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    elif pre in _DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    elif pre in _GPT2:
        steps = [pre_tokenizers.ByteLevel(add_prefix_space=file.get("tokenizer.ggml.add_space_prefix", bool, False))]
    else:
        raise CheckpointError(f"{file.path}: tokenizer.ggml.pre={pre!r} is not known: {_ADVICE}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    if pre in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Return a BPE over SentencePiece's pieces: neighbours are merged in order of the score of their joint piece."""
    import tokenizers
    from tokenizers import decoders, models, normalizers

    scores = file.require("tokenizer.ggml.scores", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = []
    for token, index in vocabulary.items():
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], left, right))
    ordered = [(left, right) for *_, left, right in sorted(merges)]
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", int, 0)]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, ordered, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefixed = file.get("tokenizer.ggml.add_space_prefix", bool, True)
    start = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", _SPACE)])
    end = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    )
    return tokenizer


def special_tokens(file: GgufFile) -> dict[str, str]:
    """Return the text of each special token by role (`bos_token`, `eos_token`, ...)."""
    tokens = file.get("tokenizer.ggml.tokens", list, [])
    roles = {
        "bos_token": "bos",
        "eos_token": "eos",
        "unk_token": "unknown",
        "pad_token": "padding",
        "sep_token": "seperator",
    }
    found = {role: file.get(f"tokenizer.ggml.{name}_token_id", int) for role, name in roles.items()}
    return {role: tokens[index] for role, index in found.items() if index is not None and index < len(tokens)}


def chat_templates(file: GgufFile) -> str | dict[str, str] | None:
    """Return the chat template of a file, several templates by name, or None if there is none."""
    template = file.get("tokenizer.chat_template", str)
    names = file.get("tokenizer.chat_templates", list, [])
    named = {name: file.get(f"tokenizer.chat_template.{name}", str) for name in names}
    found = {name: text for name, text in named.items() if text is not None}
    if not found:
        return template
    return {**found, **({} if template is None else {"default": template})}
