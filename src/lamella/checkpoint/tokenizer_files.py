"""Loading of the tokenizer of a folder, with its special tokens and chat templates.

`tokenizer.json` defines the tokenizer. `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` add
tokens and define the special ones, by the rules of transformers 5: the post-processor of `tokenizer.json`, not
`add_bos_token`, decides which tokens are added around a text. Without `tokenizer.json`, transformers converts
SentencePiece and tiktoken files, if it is installed. Remote code is never executed.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.checkpoint.file_kinds import is_present, read_json, what_it_is
from lamella.checkpoint.gguf.file import GgufFile, find_gguf, open_gguf
from lamella.checkpoint.gguf.tokenizer import chat_templates, read_tokenizer, special_tokens
from lamella.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers

logger = logging.getLogger("lamella")

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Tokenizer files that only transformers can convert.
_CONVERTED = (
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
)


@dataclass(frozen=True)
class LoadedTokenizer:
    """Tokenizer with its special tokens.

    Attributes:
        tokenizer: of the tokenizers library.
        special: text of each special token by role (`bos_token`, `eos_token`, ...).
        extra_special: texts of special tokens without a role.
        folder: of the files; None if there is none.
    """

    tokenizer: tokenizers.Tokenizer
    special: Mapping[str, str] = field(default_factory=dict)
    extra_special: tuple[str, ...] = ()
    folder: Path | None = None

    def token_id(self, role: str) -> int | None:
        """Return the id of the token with a role; None if the role or the token does not exist."""
        text = self.special.get(role)
        return None if text is None else self.tokenizer.token_to_id(text)


def load_tokenizer(folder: Path) -> LoadedTokenizer | None:
    """Load the tokenizer of a folder or of a GGUF file; return None if there are no tokenizer files.

    Raises:
        CheckpointError: a file cannot be read, contradicts another, or needs a library that is not installed.
    """
    if (gguf := _gguf_of(folder)) is not None:
        if gguf.get("tokenizer.ggml.model", str) is None:
            return None
        return LoadedTokenizer(read_tokenizer(gguf), special_tokens(gguf), (), folder)
    if not is_present(folder / "tokenizer.json"):
        return _convert(folder)
    tokenizer = _read(folder / "tokenizer.json")
    config = _read_optional_json(folder / "tokenizer_config.json")
    special, extra, added = _read_special_tokens(folder, config)
    _add_tokens(folder, tokenizer, added, {*special.values(), *extra})
    return LoadedTokenizer(tokenizer, special, tuple(extra), folder)


def eos_of_tokenizer(folder: Path) -> tuple[int, ...]:
    """Return the end-of-text token of the tokenizer files; empty if they need a conversion by transformers."""
    if _gguf_of(folder) is None and not is_present(folder / "tokenizer.json"):
        return ()
    loaded = load_tokenizer(folder)
    token = loaded.token_id("eos_token") if loaded is not None else None
    return () if token is None else (token,)


def _gguf_of(folder: Path) -> GgufFile | None:
    """Return the GGUF file with the tokenizer, if `folder` is a GGUF file or has one and no Hugging Face files."""
    if folder.is_file():
        return open_gguf(folder)
    if is_present(folder / "tokenizer.json") or is_present(folder / "config.json"):
        return None
    file = find_gguf(folder)
    return None if file is None else open_gguf(file)


def _read_optional_json(file: Path) -> dict[str, Any]:
    return read_json(file) if is_present(file) else {}


def _read(file: Path) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(
            f"cannot read {file}: {what_it_is(file) or f'{error}: download it again, or pip install -U tokenizers'}"
        ) from error


def _text(token: Any) -> str | None:
    """Return the text of a token, which files write as a text or as a mapping."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) and token else None


def _read_special_tokens(
    folder: Path, config: Mapping[str, Any]
) -> tuple[dict[str, str], list[str], dict[str, tuple[int | None, dict[str, Any]]]]:
    """Return special tokens by role, other special tokens, and added tokens (text -> id or None, and flags).

    As in transformers, the older files are ignored if tokenizer_config.json has `added_tokens_decoder`.
    """
    values, added = dict(config), dict[str, tuple[int | None, dict[str, Any]]]()
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        for index, token in decoder.items():
            if not str(index).isdigit() or not isinstance(token, Mapping) or (text := _text(token)) is None:
                raise CheckpointError(
                    f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: {index!r} is no token; correct the file"
                )
            added[text] = int(index), {key: token[key] for key in _FLAGS if isinstance(token.get(key), bool)}
    else:
        values |= _read_optional_json(folder / "special_tokens_map.json")
    special = {role: text for role in SPECIAL if (text := _text(values.get(role))) is not None}
    extra: list[str] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        tokens = values.get(key) or []
        extra += [t for token in (tokens.values() if isinstance(tokens, Mapping) else tokens) if (t := _text(token))]
    if not isinstance(decoder, Mapping):
        file = folder / "added_tokens.json"
        for text, index in sorted(_read_optional_json(file).items(), key=lambda item: str(item[1]).zfill(12)):
            if isinstance(index, bool) or not isinstance(index, int):
                raise CheckpointError(f"{file}: {text!r}={index!r}: must be a token id; correct the file")
            is_special = text in special.values() or text in extra
            added[text] = index, {"special": is_special, "normalized": not is_special}
    for text in (*special.values(), *extra):
        added.setdefault(text, (None, {"special": True}))
    return special, extra, added


_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


def _add_tokens(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    added: Mapping[str, tuple[int | None, dict[str, Any]]],
    special: set[str],
) -> None:
    """Add the tokens that tokenizer.json lacks, in the order of their ids. Tokens with a role are special."""
    import tokenizers

    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    for text, (index, flags) in sorted(added.items(), key=lambda item: (item[1][0] is None, item[1][0])):
        present = known.get(text)
        if present is not None and (present.special or text not in special):
            found = tokenizer.token_to_id(text)
        else:
            token = tokenizers.AddedToken(text, **{**flags, "special": flags.get("special", False) or text in special})
            (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
            found = tokenizer.token_to_id(text)
        if index is not None and found != index:
            raise CheckpointError(
                f"{folder}: tokenizer_config.json or added_tokens.json gives {text!r} the id {index}, and "
                f"tokenizer.json makes it {found}: the files are not of one tokenizer; take all of them from one place"
            )


def _convert(folder: Path) -> LoadedTokenizer | None:
    """Convert other tokenizer files with transformers; return None if there are none."""
    found = sorted(path.name for pattern in _CONVERTED for path in folder.glob(pattern))
    if not found or (found == ["vocab.json"] and not (folder / "merges.txt").is_file()):
        return None
    for name in found:
        if what := what_it_is(folder / name):
            raise CheckpointError(f"{folder / name}: {what}")
    advice = "give prompt_token_ids with skip_tokenizer_init=True, or a folder with tokenizer.json as tokenizer="
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise CheckpointError(
            f"{folder}: {found[0]} is read by transformers only: pip install 'lamella[hf]' sentencepiece tiktoken; or "
            f"{advice}"
        ) from error
    try:
        converted = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except Exception as error:  # conversions raise many types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{folder}: transformers cannot convert {found[0]} ({reason}): pip install sentencepiece protobuf "
            f"tiktoken; or {advice}"
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{folder}: transformers makes no fast tokenizer of {found[0]}; {advice}")
    import tokenizers

    special = {role: str(text) for role in SPECIAL if (text := getattr(converted, role, None)) is not None}
    extra = tuple(str(token) for token in getattr(converted, "extra_special_tokens", None) or ())
    own = tokenizers.Tokenizer.from_str(backend.to_str())
    logger.info("%s: no tokenizer.json; transformers converted %s", folder, found[0])
    return LoadedTokenizer(own, special, extra, folder)


def chat_templates_of(folder: Path) -> str | dict[str, str] | None:
    """Return the chat template of a folder, several templates by name, or None if there is none.

    As in transformers, `chat_template.jinja` with `additional_chat_templates/NAME.jinja` has precedence over
    `chat_template.json`, and that over `tokenizer_config.json`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (gguf := _gguf_of(folder)) is not None:
        return chat_templates(gguf)
    file, more = folder / "chat_template.jinja", sorted((folder / "additional_chat_templates").glob("*.jinja"))
    if is_present(file) or more:
        named = {each.stem: _read_text(each) for each in more}
        if is_present(file):
            named["default"] = _read_text(file)
        return named["default"] if set(named) == {"default"} else named
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = _read_optional_json(folder / name).get("chat_template")
        if isinstance(template, list):
            entries = [(entry.get("name"), entry.get("template")) for entry in template if isinstance(entry, Mapping)]
            named = {key: text for key, text in entries if isinstance(key, str) and isinstance(text, str)}
            if named:
                return named
        if isinstance(template, str):
            return template
    return None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error}): download it again") from error
