"""docs/reading_files.md lists the rules of the data files, no more and no less.

Run this file as a script to write the lists anew.
"""

from __future__ import annotations

import re
from pathlib import Path

from lamella.config.config_keys import KeyRules
from lamella.serve.vllm_arguments import ARGUMENTS

PAGE = Path(__file__).parents[2] / "docs" / "reading_files.md"


def lists() -> dict[str, str]:
    """The generated parts of the page."""
    rules = KeyRules.read()
    reasons: dict[str, list[str]] = {}
    for key, why in rules.ignored.items():
        reasons.setdefault(why, []).append(key)
    refused = sorted(name for name, argument in ARGUMENTS.items() if argument.otherwise)
    accepted = sorted(name for name, argument in ARGUMENTS.items() if not argument.otherwise and not argument.option)
    renamed = [f"`{name}` is `{argument.option}`" for name, argument in ARGUMENTS.items() if argument.option]
    return {
        "ignored": _table(("why", "keys"), [(why, _code(keys)) for why, keys in reasons.items()]),
        "inactive": _table(
            ("key", "inactive at", "otherwise"),
            [(f"`{k}`", _code(values), why) for k, (values, why) in rules.inactive.items()],
        ),
        "refused": _table(("key", "what it would change"), [(f"`{k}`", why) for k, why in rules.refused.items()]),
        "null_is_a_value": _code(sorted(rules.null_is_a_value)),
        "arguments": "\n\n".join(
            (
                _table(
                    ("refused at other values", "accepted", "nearest thing"),
                    [(f"`{n}`", _code(ARGUMENTS[n].values), ARGUMENTS[n].otherwise) for n in refused],
                ),
                f"{'; '.join(renamed)}.",
                f"Accepted with any value: {_code(accepted)}.",
            )
        ),
    }


def _code(values) -> str:
    return ", ".join(f"`{value}`" for value in values)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The page with its generated parts written anew."""
    text = PAGE.read_text(encoding="utf-8")
    for name, content in lists().items():
        inline = "\n" not in content
        new = content if inline else f"\n\n{content}\n\n"
        pattern = rf"(<!-- generated: {name} -->).*?(<!-- end -->)"
        text, count = re.subn(pattern, lambda match, new=new: match[1] + new + match[2], text, flags=re.DOTALL)
        assert count == 1, name
    return text


def test_the_page_lists_the_rules_of_the_data_files():
    assert PAGE.read_text(encoding="utf-8") == page(), f"run: python {Path(__file__).relative_to(PAGE.parents[1])}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
