"""Rules for config keys that no reader has read. The rules are in `config_keys.json`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files
from typing import Any

from lamella.validation import shown

logger = logging.getLogger("lamella")


@dataclass(frozen=True)
class KeyRules:
    """Rules for the keys of a config file that the architecture's reader has not read.

    Attributes:
        silent: keys of many files that are ignored without a log message.
        ignored: pattern -> origin of keys that change nothing; one warning lists those of a file.
        inactive: pattern -> values at which the key changes nothing, and the meaning of other values.
        refused: pattern -> what the key changes, at any value except False.
        null_is_a_value: keys for which null differs from a missing key.
    """

    silent: frozenset[str]
    ignored: Mapping[str, str]
    inactive: Mapping[str, tuple[tuple[Any, ...], str]]
    refused: Mapping[str, str]
    null_is_a_value: frozenset[str]

    @classmethod
    @cache
    def read(cls) -> KeyRules:
        """Return the rules of the bundled data file."""
        data = json.loads((files("lamella.config") / "config_keys.json").read_text(encoding="utf-8"))
        return cls(
            silent=frozenset(key for keys in data["silent"].values() for key in keys),
            ignored={key: why for why, keys in data["ignored"].items() for key in keys},
            inactive={key: (tuple(rule["values"]), rule["otherwise"]) for key, rule in data["inactive"].items()},
            refused=data["refused"],
            null_is_a_value=frozenset(data["null_is_a_value"]),
        )

    def why_ignored(self, key: str, value: Any) -> str | None:
        """Return the reason why `key` at `value` changes nothing; None if there is no such rule."""
        for pattern, (values, _) in self.inactive.items():
            if fnmatchcase(key, pattern):
                return "switched off" if _is_one_of(value, values) else None
        if value is False and any(fnmatchcase(key, pattern) for pattern in self.refused):
            return "switched off"
        return next((why for pattern, why in self.ignored.items() if fnmatchcase(key, pattern)), None)

    def why_refused(self, key: str) -> str | None:
        """Return what `key` changes; None if there is no rule for it."""
        for pattern, (_, otherwise) in self.inactive.items():
            if fnmatchcase(key, pattern):
                return otherwise
        return next((why for pattern, why in self.refused.items() if fnmatchcase(key, pattern)), None)


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """Return True if `value` equals one of `values`, where True differs from 1, and False from 0."""
    return any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in values)


class IgnoredKeys:
    """Collects the ignored keys of one file, and logs each message about the file once per load."""

    def __init__(self) -> None:
        self._found: dict[str, Any] = {}
        self._logged: set[str] = set()

    def add(self, name: str, value: Any) -> None:
        """Add a key by its path in the file."""
        self._found.setdefault(name, value)

    def say(self, text: str) -> None:
        """Log a message, unless it has been logged before."""
        if text not in self._logged:
            self._logged.add(text)
            logger.info("%s", text)

    def log(self, source: str) -> None:
        """Log one warning that lists the keys that no earlier warning has listed."""
        new = sorted(set(self._found) - self._logged)
        if new:
            self._logged.update(new)
            listed = ", ".join(f"{name}={shown(self._found[name], 63)}" for name in new)
            logger.warning("%s: ignored keys, which change nothing that the model computes: %s", source, listed)


def way_out(paths: list[tuple[str, ...]]) -> str:
    """Return the command-line option that removes keys of a config file, given by their paths."""
    removed: dict[str, Any] = {}
    for path in paths:
        inner = removed
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = None
    return f"--hf-overrides '{json.dumps(removed)}'"
