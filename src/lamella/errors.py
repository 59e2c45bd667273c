"""What can go wrong by a user's doing. Each is a `ValueError` with one line that names the field, tensor or file."""

from __future__ import annotations


class LamellaError(ValueError):
    """Base of every error that a user's input can cause."""


class ConfigError(LamellaError):
    """A model's configuration, or a setting of the engine, is not usable."""


class CheckpointError(LamellaError):
    """A checkpoint's files or tensors do not fit the model."""


class ParameterError(LamellaError):
    """A request's prompt or sampling parameters are not usable."""


class WorkerError(RuntimeError):
    """A process that holds a part of the model has ended, so that the engine computes no more. One line, too."""
