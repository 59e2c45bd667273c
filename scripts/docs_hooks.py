"""Hooks of `mkdocs build`: pages from outside `docs/`, and links that lead there.

In the repository, pages link to files beside `docs/` (`../benchmarks/RESULTS.md`). The site has some of these files as
pages of its own. Links to other files of the repository become plain text, since the site does not have them.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("benchmarks/RESULTS.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks/history").glob("*.md")))
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside."""
    for name in OUTSIDE:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links lead to pages of the site."""
    here = page.file.src_uri
    place = posixpath.dirname(here if here in OUTSIDE else f"docs/{here}")  # where the text is in the repository

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match.group(1), match.group(2), match.group(3) or ""
        if "://" in target:
            return match.group(0)
        path = posixpath.normpath(posixpath.join(place, target))
        if not (ROOT / path).exists():
            return match.group(0)  # mkdocs says so
        if path.startswith("docs/") and path.endswith(".md"):
            path = path.removeprefix("docs/")
        elif path not in OUTSIDE:
            return text
        return f"[{text}]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{anchor})"

    return _LINK.sub(link, markdown)
