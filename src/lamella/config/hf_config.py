"""Strict reader of Hugging Face `config.json` files, with typed getters.

A key that no reader has read is either ignored with a warning or an error, by the rules of `config_keys.json`. Numbers
can be int or float, if the conversion is exact.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast, overload

from lamella.config.config_keys import IgnoredKeys, KeyRules, way_out
from lamella.errors import ConfigError
from lamella.validation import finite


class _Missing(Enum):
    """Type of the default of required keys."""

    MISSING = 0


_MISSING: Final = _Missing.MISSING
_Required: TypeAlias = Literal[_Missing.MISSING]
_Item = TypeVar("_Item")

# Larger numbers mean that the file is damaged. Without a limit, a list with one entry per layer would exhaust the
# memory before another check fails.
_LAYER_COUNTS = frozenset({"num_hidden_layers", "num_blocks", "n_layers"})
_MAX_LAYERS, _MAX_INT = 4096, 2**53


class HFConfig:
    """Values of a config file. Getters mark keys as read.

    A getter returns its default if the key is missing or null, and raises `ConfigError` if there is no default. Its
    result can be None only if the default is None.

    Attributes:
        values: content of the file, or of a section of it.
        source: name of the file in error messages.
        max_length: context length that an engine will use, in tokens; None if unknown.
        list_tensors: returns the names of the checkpoint's tensors, or None if there are no files.
        path: keys of the enclosing sections.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        source: str = "config.json",
        max_length: builtins.int | None = None,
        list_tensors: Callable[[], Collection[str] | None] = lambda: None,
        ignored: IgnoredKeys | None = None,
        path: tuple[str, ...] = (),
        origins: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Wrap `values` for one reader.

        Args:
            values: see the class.
            source: see the class.
            max_length: see the class.
            list_tensors: see the class.
            ignored: collects the ignored keys, for one warning per load.
            path: see the class.
            origins: paths in the file of keys that are not at `path`.
        """
        self.values: dict[str, object] = dict(values)
        self.source, self.max_length = source, max_length
        self.list_tensors = list_tensors
        self.path, self._origins = path, dict(origins or {})
        self._ignored = ignored if ignored is not None else IgnoredKeys()
        self._read: set[str] = set()

    def get(self, key: str, default: object = _MISSING) -> object:
        """Return the raw value of `key`.

        Raises:
            ConfigError: the key is missing or null, and there is no default.
        """
        self._read.add(key)
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self.source}: {key} is missing")
            return default
        return value

    @overload
    def int(
        self, key: str, default: builtins.int | _Required = _MISSING, minimum: builtins.int = 1
    ) -> builtins.int: ...

    @overload
    def int(self, key: str, default: None, minimum: builtins.int = 1) -> builtins.int | None: ...

    def int(
        self, key: str, default: builtins.int | _Required | None = _MISSING, minimum: builtins.int = 1
    ) -> builtins.int | None:
        """Return a whole number of at least `minimum`."""
        value = self.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
            raise self.error(key, value, "a whole number")
        if value < minimum:
            raise self.error(key, value, f"at least {minimum}")
        limit = _MAX_LAYERS if key in _LAYER_COUNTS else _MAX_INT
        if value > limit:
            raise self.error(key, value, f"at most {limit}")
        return int(value)

    @overload
    def float(self, key: str, default: builtins.float | _Required = _MISSING) -> builtins.float: ...

    @overload
    def float(self, key: str, default: None) -> builtins.float | None: ...

    def float(self, key: str, default: builtins.float | _Required | None = _MISSING) -> builtins.float | None:
        """Return a finite number."""
        value = self.get(key, default)
        if value is None:
            return None
        number = finite(value) if isinstance(value, int | float) and not isinstance(value, builtins.bool) else None
        if number is None:
            raise self.error(key, value, "a number")
        return number

    @overload
    def bool(self, key: str, default: builtins.bool | _Required = _MISSING) -> builtins.bool: ...

    @overload
    def bool(self, key: str, default: None) -> builtins.bool | None: ...

    def bool(self, key: str, default: builtins.bool | _Required | None = _MISSING) -> builtins.bool | None:
        """Return true or false; 0 and 1 are accepted."""
        value = self.get(key, default)
        if value is not None and value not in (0, 1):
            raise self.error(key, value, "true or false")
        return None if value is None else bool(value)

    def text(self, key: str, default: str, allowed: str) -> str:
        """Return a string; `allowed` describes allowed values in the error message."""
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, allowed)
        return value

    @overload
    def choice(self, key: str, allowed: Iterable[_Item], default: _Required = _MISSING) -> _Item: ...

    @overload
    def choice(self, key: str, allowed: Iterable[_Item], default: _Item) -> _Item: ...

    def choice(self, key: str, allowed: Iterable[_Item], default: _Item | _Required = _MISSING) -> _Item:
        """Return one of the `allowed` values."""
        allowed = tuple(allowed)
        value = self.get(key, default)
        if value not in allowed:
            raise self.error(key, value, f"one of {', '.join(map(repr, allowed))}")
        return cast(_Item, value)

    def list(self, key: str, allowed: str = "a list") -> builtins.list[object] | None:
        """Return a list; None if there is none. `allowed` describes allowed values in the error message."""
        value = self.get(key, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple):
            raise self.error(key, value, allowed)
        return list(value)

    def mapping(self, key: str) -> dict[str, object]:
        """Return a nested mapping without null values; empty if there is none."""
        return {name: item for name, item in self.raw_mapping(key).items() if item is not None}

    def raw_mapping(self, key: str) -> Mapping[str, object]:
        """Return a nested mapping with null values; empty if there is none."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, value, "a mapping")
        return value

    def token_ids(self, key: str, default: builtins.int | tuple[builtins.int, ...] = ()) -> tuple[builtins.int, ...]:
        """Return one token id, or a list of them, as a tuple; empty if there is none."""
        value = self.get(key, default)
        ids = value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.error(key, value, "a token id or a list of them")
        return tuple(ids)

    def section(
        self, key: str, values: Mapping[str, object], origins: Mapping[str, tuple[str, ...]] | None = None
    ) -> HFConfig:
        """Return a reader of a nested mapping, which checks its keys, too; `origins`: see the constructor."""
        self._read.add(key)
        source, path = f"{self.source}: {key}", self.path_of(key)
        return HFConfig(values, source, self.max_length, self.list_tensors, self._ignored, path, origins)

    def path_of(self, key: str) -> tuple[str, ...]:
        """Return the path of `key` in the file."""
        return self._origins.get(key, (*self.path, key))

    def ignore(self, *keys: str) -> None:
        """Mark keys as read, and add those that the file has to the ignored keys."""
        for key in keys:
            self._read.add(key)
            if self.values.get(key) is not None:
                self._ignored.add(".".join(self.path_of(key)), self.values[key])

    def say(self, message: str) -> None:
        """Log how the file is interpreted, once per load."""
        self._ignored.say(f"{self.source}: {message}")

    def error(self, key: str, value: object, allowed: str) -> ConfigError:
        """Return the error for a value that is not supported."""
        return ConfigError(f"{self.source}: {key}={value!r} is not supported: must be {allowed}")

    def finish(self, harmless: Iterable[str] = ()) -> None:
        """Ignore or reject the keys that no getter has read, see `KeyRules`.

        Keys that are null or start with an underscore are skipped.

        Args:
            harmless: keys of this architecture that do not change what is computed.

        Raises:
            ConfigError: a key changes what the model computes, or may do so.
        """
        rules = KeyRules.read()
        known = self._read | rules.silent | set(harmless)
        unread = [k for k, v in self.values.items() if k not in known and v is not None and not k.startswith("_")]
        unsupported: dict[str, str] = {}
        unknown: list[str] = []
        for key in sorted(unread):
            if rules.why_ignored(key, self.values[key]) is not None:
                self.ignore(key)
            elif (why := rules.why_refused(key)) is not None:
                unsupported[key] = why
            else:
                unknown.append(key)
        problems = [
            f"{key}={self.values[key]!r} is not supported for this architecture ({why})"
            for key, why in unsupported.items()
        ]
        if unknown:
            listed = ", ".join(f"{key}={self.values[key]!r}" for key in unknown)
            problems.append(f"unknown keys may change what the model computes: {listed}")
        if problems:
            out = way_out([self.path_of(key) for key in (*unsupported, *unknown)])
            raise ConfigError(f"{self.source}: {'; '.join(problems)}; to compute without: {out}")
        if not self.path:
            self._ignored.log(self.source)
