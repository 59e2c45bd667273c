"""Tokenizer of a model: text to tokens and back."""

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
    """Raise `ParameterError` if `error` is a failure of the tokenizers library on one input; else return.

    Panics of the library are `BaseException`s. Unconverted, they would end the whole process because of one text.
    """
    panic = type(error).__name__ == "PanicException"  # by name: pyo3 has no importable type for it
    if isinstance(error, MemoryError) or not (panic or isinstance(error, Exception)):
        return
    line = next(iter(str(error).splitlines()), type(error).__name__)
    raise ParameterError(
        f"{what}: the tokenizer fails ({line}); check tokenizer.json, or use prompt_token_ids and detokenize=False"
    ) from error


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`, with the method names of transformers. `LLM.get_tokenizer()` returns it.

    Attributes:
        vocab_size: largest token id + 1, added tokens included.
        special_ids: ids of the special tokens.
        bos_token, eos_token, unk_token, pad_token: texts of these tokens; None if the files do not define one.
        bos_token_id, eos_token_id, unk_token_id, pad_token_id: their ids; None if the files do not define one.
        chat_template: template of the files, several templates by name, or None. Can be replaced.
        name_or_path: folder of the files; "" if there is none.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | LoadedTokenizer) -> None:
        """Wrap a tokenizer of the library, or a loaded one with the special tokens of its files."""
        loaded = tokenizer if isinstance(tokenizer, LoadedTokenizer) else LoadedTokenizer(tokenizer)
        library = loaded.tokenizer
        # Files may enable truncation or padding for training; prompts must not be changed.
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
        self._has_logged_second_bos = False

    @classmethod
    def load(cls, directory: Path) -> Tokenizer | None:
        """Load the tokenizer of a folder; return None if it has no tokenizer files.

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
        """Text of each special token that the files define, by role such as `bos_token`."""
        return {role: self._special[role] for role in SPECIAL if role in self._special}

    def get_vocab(self) -> dict[str, int]:
        """Return the ids of all tokens by text, added tokens included."""
        return self._tokenizer.get_vocab()

    def token_id(self, token: str) -> int | None:
        """Return the id of a token by its text in the vocabulary; None if there is no such token."""
        return self._tokenizer.token_to_id(token)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        """Return the id of a token or of each token; the id of the unknown token if there is no such token."""
        if isinstance(tokens, str):
            return self._id_or_unknown(tokens)
        return [self._id_or_unknown(token) for token in tokens]

    def _id_or_unknown(self, token: str) -> int | None:
        found = self.token_id(token)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """Return the vocabulary's text of each id; None if there is no such id."""
        return [self._tokenizer.id_to_token(int(token)) for token in ids]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of a text.

        Args:
            text: valid Unicode.
            add_special_tokens: add the special tokens of the file's post-processor, such as BOS. If the text already
                begins with BOS, no second one is added.

        Raises:
            ParameterError: the text has a lone surrogate, which cannot be encoded, or the tokenizer fails.
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
        if not self._has_logged_second_bos:
            self._has_logged_second_bos = True
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
        """Render a chat with the chat template. Arguments as in transformers.

        Args:
            conversation: messages with `role` and `content`.
            tools: JSON schemas of functions.
            chat_template: text of a template, or the name of one of several; None: the model's.
            add_generation_prompt: append the tokens that start an assistant message.
            continue_final_message: end inside the final message, so that the model continues it.
            tokenize: return token ids instead of text.
            variables: additional template variables, such as `enable_thinking`.

        Returns:
            Token ids if `tokenize`, else text.

        Raises:
            ParameterError: there is no template, or it does not accept these messages.
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
        """Return the text of token ids.

        Bytes that are not valid UTF-8 become U+FFFD. Unknown ids are skipped.

        Args:
            ids: a list, array or tensor of ids, or one id.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            ParameterError: the tokenizer fails on these ids.
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
        """Return the text of a token inside a text, including a leading space that decoding it alone would drop."""
        once, twice = (self.decode([token_id] * n) for n in (1, 2))
        return twice[len(once) :]

    def _has_second_bos(self, text: str, ids: Sequence[int]) -> bool:
        """Return True if a special token was added before a text that begins with the same token."""
        if len(ids) < 2 or ids[0] != ids[1] or ids[0] not in self.special_ids:
            return False
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids) < len(ids)


def read_tokenization(values: Mapping[str, Any] | None) -> bool | None:
    """Return `add_special_tokens` of vLLM's `tokenization_kwargs`; None if it is not set.

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
    """Return the error message for a prompt that is not Unicode text."""
    if not isinstance(text, str):
        return f"prompt={shown(text)}: must be a string"
    index = next((index for index, c in enumerate(text) if 0xD800 <= ord(c) <= 0xDFFF), None)
    if index is None:
        return "prompt: cannot be tokenized; give prompt_token_ids"
    return (
        f"prompt: a lone surrogate (U+{ord(text[index]):04X}) at character {index} is not Unicode text: send both "
        "halves of the character, or replace it with U+FFFD"
    )


def load_tokenizer(options: EngineOptions, folder: Path | None) -> Tokenizer | None:
    """Load the tokenizer that the options name, or the one in the model's `folder`; return None if there is none.

    Raises:
        CheckpointError: the options name a folder without a tokenizer.
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
