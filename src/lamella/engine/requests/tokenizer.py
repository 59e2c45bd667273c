"""Text to tokens and back, by the tokenizer files of a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamella.checkpoint import tokenizer_files
from lamella.checkpoint.files import find_folder
from lamella.checkpoint.tokenizer_files import SPECIAL, LoadedTokenizer, chat_templates_of
from lamella.engine.requests.chat import Message, Templates, read_messages, render_chat, select_template
from lamella.errors import CheckpointError, ParameterError
from lamella.validation import is_text, shown

if TYPE_CHECKING:
    import tokenizers

    from lamella.engine.options import EngineOptions

logger = logging.getLogger("lamella")


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
    """A thin layer over a `tokenizers.Tokenizer`, with transformers' names; `LLM.get_tokenizer()` returns it.

    Attributes:
        vocab_size: one more than the largest token id, added tokens included.
        special_ids: ids of the special tokens.
        bos_token, eos_token, unk_token, pad_token: texts of these tokens, None where the files name none.
        bos_token_id, eos_token_id, unk_token_id, pad_token_id: their ids, likewise.
        chat_template: the template of the files, several by name, or None; may be replaced.
        name_or_path: the folder of the files; "" where there is none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | LoadedTokenizer) -> None:
        """Wrap a tokenizer of the library, or one with its files' special tokens."""
        loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer(tokenizer)
        library = loaded.tokenizer
        # A file may ask for the truncation or padding that its training used; a prompt must stay what it is.
        library.no_truncation()
        library.no_padding()
        self._tokenizer, self._special = library, loaded.special
        self.vocab_size: int = max(library.get_vocab().values(), default=-1) + 1
        added = library.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.name_or_path = "" if loaded.folder is None else str(loaded.folder)
        self.chat_template: Templates = None if loaded.folder is None else chat_templates_of(loaded.folder)
        self.bos_token, self.eos_token = self._special.get("bos_token"), self._special.get("eos_token")
        self.unk_token, self.pad_token = self._special.get("unk_token"), self._special.get("pad_token")
        self.bos_token_id, self.eos_token_id = loaded.token_id("bos_token"), loaded.token_id("eos_token")
        self.unk_token_id, self.pad_token_id = loaded.token_id("unk_token"), loaded.token_id("pad_token")
        self._said_double = False

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """Return the tokenizer of a folder, None where no file is one.

        Raises:
            CheckpointError: the files cannot be read as a tokenizer, or need transformers, which is not installed.
        """
        loaded = tokenizer_files.load_tokenizer(directory)
        return None if loaded is None else cls(loaded)

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return `{"input_ids": ..., "attention_mask": ...}` of a text, as transformers does."""
        ids = self.encode(text, add_special_tokens)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)}

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of all special tokens, in ascending order."""
        return sorted(self.special_ids)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Role -> text of the special tokens that the files name."""
        return {role: self._special[role] for role in SPECIAL if role in self._special}

    def get_vocab(self) -> dict[str, int]:
        """Return text -> id of all tokens, added ones included."""
        return self._tokenizer.get_vocab()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token, by its text in the vocabulary; None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Return the id of a token, or of each; the unknown token's where there is no such token."""
        if isinstance(tokens, str):
            return self._known_id(tokens)
        return [self._known_id(token) for token in tokens]

    def _known_id(self, token: str) -> int | None:
        found = self.token_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Return the vocabulary's text of each id, None where there is no such id."""
        return [self._tokenizer.id_to_token(int(token)) for token in ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: valid Unicode.
            add_special_tokens: add the special tokens of the file's post-processor, such as a BOS; not a second BOS
                where the text begins with one.

        Raises:
            ParameterError: the text has a lone surrogate, which no tokenizer can encode.
        """
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except BaseException as error:
            if not is_text(text):
                raise ParameterError(why_not_text(text)) from error
            _raise_for_input(error, "prompt")
            raise
        if not add_special_tokens or not self._has_second_bos(text, ids):
            return ids
        if not self._said_double:
            self._said_double = True
            logger.info("a prompt begins with %r: no second one is added to such prompts", self.decode(ids[:1]))
        return ids[1:]

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        tools: Sequence[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """Return the text of a chat, or its token ids with `tokenize`; arguments as in transformers.

        Args:
            conversation: messages with `role` and `content`.
            tools: JSON schemas of functions.
            chat_template: a template's text, or the name of one of several; by default the model's.
            add_generation_prompt: end with what stands before an answer.
            continue_final_message: end within the final message.
            tokenize: return token ids.
            variables: more names for the template, such as `enable_thinking`.

        Raises:
            ParameterError: there is no template, or it does not take these messages.
        """
        template = select_template(self.chat_template, chat_template, tools is not None)
        messages, _ = read_messages(conversation, "openai", wraps_text=False, placeholder="")
        text = render_chat(
            template,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self.special_tokens_map, **variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def decode(self, ids: Sequence[int] | int | Any, skip_special_tokens: bool = False) -> str:
        """Return the text of token ids (a list, array, tensor or one id).

        Bytes that are not UTF-8 become U+FFFD, and unknown ids nothing.
        """
        listed = ids.tolist() if hasattr(ids, "tolist") else ids
        listed = [listed] if isinstance(listed, int) else listed
        try:
            return self._tokenizer.decode(listed, skip_special_tokens=skip_special_tokens)
        except BaseException as error:
            _raise_for_input(error, "detokenization")
            raise

    def batch_decode(self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False) -> list[str]:
        """Return the text of each sequence of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def token_text(self, token_id: int) -> str:
        """Return the text of one token as it reads after another, with the leading space that a first token loses."""
        once, twice = (self.decode([token_id] * n) for n in (1, 2))
        return twice[len(once) :]

    def _has_second_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Return True where a special token was added to a text that begins with the same."""
        if len(ids) < 2 or ids[0] != ids[1] or ids[0] not in self.special_ids:
            return False
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids) < len(ids)


def read_tokenization(values: Mapping[str, Any] | None) -> bool | None:
    """Return `add_special_tokens` of vLLM's `tokenization_kwargs`, None where they do not say.

    Raises:
        ParameterError: another key has a value.
    """
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise ParameterError(f"tokenization_kwargs={values!r}: must be a dict, such as {{'add_special_tokens': False}}")
    others = [key for key, value in values.items() if key != "add_special_tokens" and value is not None]
    if others:
        raise ParameterError(
            f"tokenization_kwargs: {others[0]!r} is not supported; there is add_special_tokens, and to shorten prompts "
            "SamplingParams(truncate_prompt_tokens=...)"
        )
    wanted = values.get("add_special_tokens")
    if wanted is not None and not isinstance(wanted, bool):
        raise ParameterError(f"add_special_tokens={wanted!r}: must be True or False")
    return wanted


def why_not_text(text: object) -> str:
    """Return what is wrong with a prompt that is no Unicode text."""
    if not isinstance(text, str):
        return f"prompt={shown(text)}: must be a string"
    place = next((index for index, c in enumerate(text) if 0xD800 <= ord(c) <= 0xDFFF), None)
    if place is None:
        return "prompt: cannot be tokenized; give prompt_token_ids"
    return (
        f"prompt: a lone surrogate (U+{ord(text[place]):04X}) at character {place} is not Unicode text: send both "
        "halves of the character, or replace it with U+FFFD"
    )


def load_tokenizer(options: EngineOptions, folder: Path | None) -> Tokenizer | None:
    """Return the tokenizer that the options name, else that of the model's `folder`; None where there is none.

    Raises:
        CheckpointError: a tokenizer is named, and there is none.
    """
    if options.skip_tokenizer_init:
        return None
    if options.tokenizer is None:
        return None if folder is None else Tokenizer.load(folder)
    revision = options.tokenizer_revision
    if revision is None and options.tokenizer == options.model:
        revision = options.revision
    named = find_folder(options.tokenizer, revision)
    found = Tokenizer.load(named)
    if found is None and named != folder:
        raise CheckpointError(f"tokenizer={str(options.tokenizer)!r}: {named} has no tokenizer.json or tokenizer.model")
    return found
