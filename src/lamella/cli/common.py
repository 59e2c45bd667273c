"""Helpers of the subcommands."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console

from lamella.serve.llm import LLM


class _Output(Console):
    """Standard output; if its reader has gone, `main` ends the command."""

    def on_broken_pipe(self) -> None:
        """Raise the error again, in place of rich's own exit."""
        raise


console = _Output(highlight=False)


def load_llm(args: argparse.Namespace) -> LLM:
    """Load the model of the command line, with the engine options that are given there."""
    options = {name: getattr(args, name) for name in args.engine_options if hasattr(args, name)}
    with console.status(f"loading {args.model}"):
        return LLM(args.model, **options)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, the last line on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def size(count: float) -> str:
    """Return a number of bytes as a text with a unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def terminal_text(text: str) -> str:
    """Return a text without control characters, which could change the terminal, except line feeds and tabs."""
    return "".join(
        c if c in "\n\t" or c.isprintable() else "" if c == "\r" else "\N{REPLACEMENT CHARACTER}" for c in text
    )
