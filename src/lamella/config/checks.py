"""Validation of config fields."""

from __future__ import annotations

from lamella.errors import ConfigError


def check(holds: bool, field: str, value: object, allowed: str) -> None:
    """Check a field of a config.

    Args:
        holds: True if the value is allowed.
        field: name, for the error message.
        value: for the error message.
        allowed: description of allowed values, for the error message.

    Raises:
        ConfigError: `holds` is False.
    """
    if not holds:
        raise ConfigError(f"{field}={value!r}: must be {allowed}")
