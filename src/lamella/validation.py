"""Validation of values from callers: types, bounds, and their form in error messages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any

from lamella.errors import ConfigError, UserError

INT64 = -(2**63), 2**63 - 1
"""Bounds of int64, the type of whole numbers in step inputs and in messages between ranks."""

_SHOWN = 80  # characters


def shown(value: object, limit: int = _SHOWN) -> str:
    """Return `repr(value)` for an error message: one line of at most `limit` characters. Never raises."""
    try:
        text = repr(value)
    except Exception:  # an error of the object's `__repr__`, or an int with more digits than Python converts
        return f"a value of type {type(value).__name__}"
    text = text.encode("utf-8", "backslashreplace").decode().replace("\n", " ")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def listed(names: Sequence[str], limit: int = 4) -> str:
    """Return the first `limit` names for an error message, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_one_of(value: Any, known: Iterable[Any]) -> bool:
    """Return True if `value` equals one of `known` and has its type. So 1 is not True, and arrays are not compared."""
    return any(value is each or (type(value) is type(each) and value == each) for each in known)


def whole(value: Any) -> int | None:
    """Return a whole number (int, numpy integer or one-element tensor) as an int; None for anything else, or a bool."""
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
    """Return a finite number, whole numbers included, as a float; None for anything else."""
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
    """Return True if `value` is a string that UTF-8 can encode, which excludes lone surrogates."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_placement(value: object) -> bool:
    """Return True if `value` has one of the types of `PlacementLike`; the names in it are not checked."""
    if isinstance(value, Mapping):
        return all((is_text(key) or whole(key) is not None) and is_text(name) for key, name in value.items())
    return is_text(value) or (isinstance(value, list | tuple) and all(name is None or is_text(name) for name in value))


def checked_int(
    name: str, value: Any, low: int = INT64[0], high: int = INT64[1], error: type[UserError] = ConfigError
) -> int:
    """Return `value` as an int.

    Args:
        name: name of the field, for the error message.
        value: given by the caller.
        low: smallest allowed value.
        high: largest allowed value.
        error: type of the error.

    Raises:
        UserError: of type `error`, if `value` is not a whole number from `low` to `high`.
    """
    number = whole(value)
    if number is None or number < low:
        raise error(f"{name}={shown(value)}: must be a whole number of at least {low}")
    if number > high:
        raise error(f"{name}={shown(value)}: must be at most {high}")
    return number
