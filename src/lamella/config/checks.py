"""How a config refuses a value."""

from __future__ import annotations

from lamella.errors import ConfigError


def check(holds: bool, field: str, value: object, allowed: str) -> None:
    """Raises `ConfigError` with one line that names the field, unless it `holds`."""
    if not holds:
        raise ConfigError(f"{field}={value!r}: must be {allowed}")
