"""Checks of the numbers that callers give: types, bounds, and how a value is shown in an error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from lamella.errors import ConfigError, UserError

INT64 = -(2**63), 2**63 - 1
"""Bounds of the whole numbers that a row of a step, or a message between ranks, can hold."""

_SHOWN = 80  # characters


def shown(value: object, limit: int = _SHOWN) -> str:
    """Return `value` as an error shows it: on one line, cut at `limit` characters, and never raising itself."""
    try:
        text = repr(value)
    except Exception:  # an object's own, or a whole number with more digits than Python converts
        return f"a value of type {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode().replace("\n", " ")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first `limit` names as an error lists them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """Return whether `value` is one of `known`, by type too: 1 is not True, and no array is asked for a truth."""
    return any(value is each or (type(value) is type(each) and value == each) for each in known)


def whole(value: Any) -> int | None:
    """Return a whole number as an int: Python's, numpy's or of a one-element tensor; None for all else, bools too."""
    if type(value) is int:
        return value
    if isinstance(value, bool | float | str) or type(value).__name__ in ("bool", "bool_"):
        return None
    if getattr(value, "dtype", None) is not None and "bool" in str(value.dtype):
        return None
    try:
        return int(index(value))
    except Exception:
        return None


def finite(value: Any) -> float | None:
    """Return a finite number as a float, whole numbers included; None for all else."""
    if type(value) is not float:
        number = whole(value)
        kind = str(getattr(value, "dtype", ""))
        if number is None and not isinstance(value, float) and not ("float" in kind and getattr(value, "ndim", 1) == 0):
            return None
        try:
            value = float(value if number is None else number)
        except (OverflowError, TypeError, ValueError):
            return None
    return value if math.isfinite(value) else None


def is_text(value: object) -> bool:
    """Return whether `value` is a string that UTF-8 can encode: one without lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_placement(value: object) -> bool:
    """Return whether `value` has one of the types of `PlacementLike`; its names are not looked at."""
    if isinstance(value, Mapping):
        return all((is_text(key) or whole(key) is not None) and is_text(name) for key, name in value.items())
    return is_text(value) or (isinstance(value, list | tuple) and all(name is None or is_text(name) for name in value))


def checked_int(
    name: str, value: Any, low: int = INT64[0], high: int = INT64[1], error: type[UserError] = ConfigError
) -> int:
    """Return `value` as an int.

    Args:
        name: the field, for the error.
        value: what the caller gave.
        low: the least allowed value.
        high: the largest allowed value.
        error: the type of the error.

    Raises:
        UserError: of type `error`, if it is no whole number from `low` to `high`.
    """
    number = whole(value)
    if number is None or number < low:
        raise error(f"{name}={shown(value)}: must be a whole number of at least {low}")
    if number > high:
        raise error(f"{name}={shown(value)}: must be at most {high}")
    return number
