"""Errors of lamella. Each message is one line that names the field, tensor or file, and the way out.

::

    LamellaError
    |-- UserError (also a ValueError)         the caller can correct it
    |   |-- ConfigError                       a model's configuration, or an option of the engine
    |   |-- CheckpointError                   a checkpoint's files or tensors
    |   `-- ParameterError                    a request's prompt or sampling parameters
    `-- EngineError (also a RuntimeError)     the engine cannot continue
        |-- WorkerError                       a tensor-parallel process has ended
        |-- KernelError                       a kernel is wrong on this machine
        `-- ClosedError                       the engine has been shut down, or has failed before

The command line catches `LamellaError` in one place, prints its message on stderr and exits with status 2.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text on one line and without characters that could control a terminal.

    Line ends, escape sequences, direction marks and lone surrogates become backslash escapes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


_LONGEST = 1200  # characters of an error


class LamellaError(Exception):
    """Base of every error that lamella raises on purpose.

    Its text may quote file content. So `str` gives it without control characters (see `printable`), and without the
    middle of a very long one: the beginning names the place, and the end the way out.
    """

    def __str__(self) -> str:
        text = printable(super().__str__())
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} [...] {text[-290:]}"


class UserError(LamellaError, ValueError):
    """Base class of errors in the caller's input, which the caller can correct."""


class ConfigError(UserError):
    """A model's configuration or an option of the engine is not supported."""


class CheckpointError(UserError):
    """A checkpoint's files or tensors do not fit the model."""


class ParameterError(UserError):
    """A request's prompt or sampling parameters are invalid."""


class EngineError(LamellaError, RuntimeError):
    """Base class of errors after which an engine cannot continue."""


class WorkerError(EngineError):
    """A tensor-parallel process has ended, so the engine cannot run further steps."""


class KernelError(EngineError):
    """A kernel disagrees with its reference implementation on this machine."""


class ClosedError(EngineError):
    """The engine has been shut down, or an earlier error has stopped it."""
