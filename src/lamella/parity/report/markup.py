"""HTML markup that is escaped by construction, and formats of numbers in the report."""

from __future__ import annotations

import html
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

STATUS_MARKS = {"pass": "✓", "fail": "✗", "unavailable": "○"}
TIMES = "\N{MULTIPLICATION SIGN}"
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}

# Markup: `tag` escapes every value that is not Markup.


class Markup(str):
    """HTML that is complete and escaped."""

    __slots__ = ()


def escape(value: object) -> str:
    """Escape a value for HTML; whitespace other than blanks and unprintable characters become visible symbols."""
    if isinstance(value, Markup):
        return value
    shown = (VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in str(value))
    return html.escape("".join(shown))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """Return an element. Attributes that are None are left out; `class_` is class, `aria_label` is aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{given}>{''.join(map(escape, children))}</{name}>")


def join_markup(parts: Iterable[object]) -> Markup:
    """Join parts, escaping what is not Markup."""
    return Markup("".join(map(escape, parts)))


def page_section(title: str, *children: object) -> Markup:
    """Return a section with a heading."""
    return tag("section", tag("h2", title), *children)


def page_details(summary: str, *children: object) -> Markup:
    """Return a block that opens on click."""
    return tag("details", tag("summary", summary), *children)


def html_table(
    label: str, headers: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[str] = ()
) -> Markup:
    """Return a table whose first column names the rows; columns in `text` are left-aligned, the others are numbers."""
    kinds = ["text" if header in text else None for header in headers]

    def line(cells: Sequence[object], cell_tag: str) -> Markup:
        rest = (tag(cell_tag, cell, class_=kind) for cell, kind in zip(cells[1:], kinds[1:], strict=True))
        return tag("tr", tag("th", cells[0]), *rest)

    table = tag("table", tag("thead", line(headers, "th")), tag("tbody", *(line(row, "td") for row in rows)))
    return tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def definition_list(pairs: Mapping[str, object]) -> Markup:
    """Return a definition list."""
    return tag("dl", *(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs.items()))


def badge(status: str, label: str | None = None) -> Markup:
    """Return a coloured status with a symbol; `label` replaces the name of the status."""
    return tag("span", f"{STATUS_MARKS[status]} {label or status}", class_=f"badge {status}")


# Numbers.


def finite_or_none(value: Any) -> float | None:
    """Return the number, or None if the value is NaN, infinite or not a number."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def finite_values(values: Iterable[Any]) -> list[float]:
    """Return the finite numbers among the values."""
    return [number for number in map(finite_or_none, values) if number is not None]


def number_text(value: Any) -> str:
    """Format a number with three significant digits; integers in full."""
    number = finite_or_none(value)
    if number is None:
        return "n/a"
    if isinstance(value, int) or 999.5 <= abs(number) < 1e6:
        return f"{number:,.0f}"
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        return f"{number:.3g}"
    digits, power = f"{number:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def percent_text(share: Any) -> str:
    """Return a share as a percentage."""
    number = finite_or_none(share)
    return "n/a" if number is None else f"{100 * number:.2f} %"


def with_error(value: Any, error: Any) -> str:
    """Return a value and its standard error."""
    return f"{number_text(value)} ± {number_text(error)}"


def times_text(ratio: Any) -> str:
    """Return a ratio as "2.0x" is written."""
    return "n/a" if finite_or_none(ratio) is None else f"{number_text(ratio)}{TIMES}"


def listing_text(values: Mapping[str, Any]) -> str:
    """Return named numbers on one line."""
    return ", ".join(f"{name} {number_text(value)}" for name, value in values.items())
