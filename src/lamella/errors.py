"""Every error that lamella raises on purpose: one line that names the field, tensor or file, and the way out.

::

    LamellaError
    |-- UserError (also a ValueError)         the caller can correct it
    |   |-- ConfigError                       a model's configuration, or a setting of the engine
    |   |-- CheckpointError                   a checkpoint's files or tensors
    |   `-- ParameterError                    a request's prompt or sampling parameters
    `-- EngineError (also a RuntimeError)     the engine cannot go on
        |-- WorkerError                       a tensor-parallel process has ended
        |-- KernelError                       a kernel is wrong on this machine
        `-- ClosedError                       the engine has been shut down, or has failed before

The command line catches `LamellaError` in one place, prints its line on stderr and exits with status 2.
"""

from __future__ import annotations


def printable(text: str) -> str:
    """Return text on one line and without characters that could control a terminal.

    Line ends, escape sequences, direction marks and lone surrogates become backslash escapes.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


class LamellaError(Exception):
    """Base of every error that lamella raises on purpose.

    Its text may quote file content, so that `str` gives it without control characters, see `printable`.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class UserError(LamellaError, ValueError):
    """Base of the errors that a caller's input causes and a caller can correct."""


class ConfigError(UserError):
    """A model's configuration, or a setting of the engine, is not usable."""


class CheckpointError(UserError):
    """A checkpoint's files or tensors do not fit the model."""


class ParameterError(UserError):
    """A request's prompt or sampling parameters are not usable."""


class EngineError(LamellaError, RuntimeError):
    """Base of the errors after which an engine cannot go on."""


class WorkerError(EngineError):
    """A tensor-parallel process has ended, so the engine computes no more."""


class KernelError(EngineError):
    """A kernel does not compute what its reference implementation computes on this machine."""


class ClosedError(EngineError):
    """The engine has been shut down, or an earlier error has stopped it."""
