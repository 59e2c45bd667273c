#!/usr/bin/env python3
"""Write docs/options.md from the declarations in `lamella.engine.options`."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from lamella.engine.options import EngineOptions, Option

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
HEAD = """# Engine options

Options of `LLM(model, ...)` and `AsyncLLM(model, ...)`; on the command line `--name-with-dashes`, where the last column
says so. Names, meanings and defaults are vLLM's where vLLM has the option. Other arguments of vLLM are accepted if they
cannot change a result, and refused with the nearest option otherwise: see [reading_files.md](reading_files.md).

This page is written by `python scripts/options_page.py`.
"""


def page() -> str:
    """Return the page: a table for each group."""
    groups: dict[str, list[str]] = {}
    for each in fields(EngineOptions):
        option: Option = each.metadata["option"]
        default = "required" if each.default is MISSING else f"`{each.default!r}`"
        cells = (f"`{each.name}`", default, option.help, "yes" if option.is_argument else "")
        groups.setdefault(option.group, []).append(f"| {' | '.join(cells)} |")
    tables = [
        f"## {group}\n\n| option | default | meaning | command line |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
        for group, rows in groups.items()
    ]
    return "\n".join([HEAD, *tables])


if __name__ == "__main__":
    PAGE.write_text(page())
