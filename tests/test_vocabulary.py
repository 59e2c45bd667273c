"""The project's words are the field's: none of `vocabulary.toml` is in the code, the tests or the documents."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parents[1]
WORDS = tomllib.loads((ROOT / "tests" / "vocabulary.toml").read_text())["word"]
TEXTS = ("*.py", "*.md", "*.cpp", "*.h")


def texts() -> list[str]:
    """Return the paths of all texts of src, tests and docs, and the README."""
    paths = [path for top in ("src", "tests", "docs") for ending in TEXTS for path in (ROOT / top).rglob(ending)]
    return ["README.md", *sorted(str(path.relative_to(ROOT)) for path in paths)]


def found(word: dict[str, object], name: str, text: str) -> Iterator[str]:
    """Yield a line for each use of a word that is not in an allowed phrase."""
    pattern = re.compile(str(word["pattern"]), re.IGNORECASE)
    if not pattern.search(text):
        return
    for number, line in enumerate(text.split("\n"), 1):
        rest = line
        for phrase in word.get("allow", ()):
            rest = re.sub(re.escape(phrase), "", rest, flags=re.IGNORECASE)
        match = pattern.search(rest)
        if match:
            yield f"{name}:{number}: {match.group(0)!r}: say {word['say']}: {line.strip()[:100]}"


@pytest.mark.parametrize("word", WORDS, ids=[word["say"].replace(" ", "_") for word in WORDS])
def test_only_the_fields_words_are_used(word):
    uses = [
        use
        for name in texts()
        if name.startswith(tuple(word.get("files", ("",)))) and not name.startswith(tuple(word.get("not_in", ("\0",))))
        if name not in ("tests/test_vocabulary.py", "tests/vocabulary.toml")
        for use in found(word, name, (ROOT / name).read_text())
    ]
    assert not uses, "\n" + "\n".join(uses)


def test_a_word_is_found_and_an_allowed_phrase_is_not():
    word = {"pattern": r"\bflights?\b", "say": "in-flight step", "allow": ["in flight"]}
    assert len(list(found(word, "a.py", "steps in flight\nthe flight of a step"))) == 1
    assert not list(found(word, "a.py", "steps In Flight"))
