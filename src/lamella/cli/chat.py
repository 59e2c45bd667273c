"""`lamella chat`: chat with a model in the terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, TextIO

from lamella.cli.common import load_llm, print_json, terminal_text
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.errors import ParameterError
from lamella.serve.llm import LLM

HELP = """\
/reset          start a new conversation
/system TEXT    start a new conversation with this system prompt; without TEXT, with none
/help           show this help
/exit           leave (like Ctrl-D)
Ctrl-C          end an answer"""


def run(args: argparse.Namespace) -> int:
    """Answer messages until the end of input; return exit status 1 if the last one could not be answered."""
    llm = load_llm(args)
    chat = Chat(llm, sampling_params(args, llm), args.system, _template_variables(args))
    chat.check()
    interactive = sys.stdin.isatty()
    if interactive:
        _use_line_editing()
        print("Type a message; /help lists the commands.", file=sys.stderr)
    failed = False
    for line in _lines(interactive):
        command, _, argument = line.strip().partition(" ")
        if not line.strip():
            continue
        if command in ("/exit", "/quit"):
            break
        if command == "/help":
            print(HELP, file=sys.stderr)
        elif command == "/reset":
            chat.reset(chat.system)
        elif command == "/system":
            chat.reset(argument.strip() or None)
        elif command.startswith("/"):
            print(f"lamella: {command}: no such command; /help lists them", file=sys.stderr)
        else:
            failed = not _answer(chat, line, sys.stderr if args.json else sys.stdout)
    if args.json:
        print_json({"messages": chat.messages, "answers": chat.figures})
    return 1 if failed else 0


class Chat:
    """Conversation with a model.

    Attributes:
        messages: the conversation so far, including the system prompt.
        figures: tokens, seconds and finish reason of each answer.
        system: system prompt.
    """

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None, variables: dict[str, Any]) -> None:
        self._llm, self._params, self._variables = llm, params, variables
        self.figures: list[dict[str, Any]] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        """Start a new conversation, with this system prompt if one is given."""
        self.system = system
        self.messages: list[dict[str, str]] = [] if system is None else [{"role": "system", "content": system}]

    def check(self) -> None:
        """Check that the model supports chats.

        Raises:
            ParameterError: the model has no tokenizer or chat template.
        """
        self._prompt([*self.messages, {"role": "user", "content": "Hello"}])

    def ask(self, text: str) -> Generator[str, None, None]:
        """Send a message, and yield the pieces of the answer. Closing the iterator ends the answer and keeps its text.

        Raises:
            ParameterError: the conversation is too long, or the template rejects it. The message is not added.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        stream = self._llm.stream(self._prompt(messages), self._params)
        start, answer, output = time.perf_counter(), "", None
        self.messages = messages
        try:
            for output in stream:
                new = output.outputs[0].text
                yield new[len(answer) :]
                answer = new
        finally:
            stream.close()
            self.messages.append({"role": "assistant", "content": answer})
            first = None if output is None else output.outputs[0]
            tokens = 0 if first is None else len(first.token_ids)
            reason = first.finish_reason if first is not None else None
            seconds = time.perf_counter() - start
            self.figures.append(
                {
                    "tokens": tokens,
                    "seconds": round(seconds, 3),
                    "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
                    "cached_tokens": 0 if output is None else output.num_cached_tokens,
                    "finish_reason": reason or "interrupted",
                    "error": None if first is None else first.error,
                }
            )

    def _prompt(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        (prompt,) = self._llm.preprocess_chat(messages, chat_template_kwargs=self._variables)
        return prompt


def _answer(chat: Chat, text: str, out: TextIO) -> bool:
    """Print an answer while it is generated; return False if there is none."""
    try:
        pieces = chat.ask(text)
        try:
            for piece in pieces:
                print(terminal_text(piece), end="", flush=True, file=out)
        except KeyboardInterrupt:
            pieces.close()
            print(" [interrupted]", end="", file=out)
        print(file=out)
    except ParameterError as error:
        print(f"lamella: {error}; /reset starts a new conversation", file=sys.stderr)
        return False
    figures = chat.figures[-1]
    if figures["error"]:
        print(f"lamella: {figures['error']}", file=sys.stderr)
        return False
    ended = ", ended by its length" if figures["finish_reason"] == "length" else ""
    print(
        f"[{figures['tokens']} tokens, {figures['tokens_per_second']} tok/s, {figures['cached_tokens']} prompt tokens "
        f"cached{ended}]",
        file=sys.stderr,
    )
    return True


def sampling_params(args: argparse.Namespace, llm: LLM) -> SamplingParams:
    """Return the model's default sampling parameters, replaced by those of the command line."""
    default = llm.get_default_sampling_params()
    if default.max_tokens == next(each.default for each in fields(SamplingParams) if each.name == "max_tokens"):
        default = replace(default, max_tokens=None)
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "min_p", "max_tokens")}
    given["seed"] = args.sampling_seed
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def _template_variables(args: argparse.Namespace) -> dict[str, Any]:
    return dict(args.chat_template_kwargs or {})


def _lines(interactive: bool) -> Iterator[str]:
    while True:
        try:
            yield input("> " if interactive else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nCtrl-D or /exit leaves", file=sys.stderr)


def _use_line_editing() -> None:
    with suppress(ImportError):  # not available on every system
        import readline  # noqa: F401
