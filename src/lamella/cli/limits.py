"""Bounds of whole numbers on the command line, checked before a model is loaded."""

from __future__ import annotations

import argparse

from lamella.errors import ParameterError
from lamella.validation import INT64, whole

_TOKENS, _MANY = 1 << 24, 1_000_000

# Bounds by argument. The upper bounds turn a typing error into an error message before it fills the memory.
# `EngineOptions` and `SamplingParams` check the arguments of the engine and of sampling.
_LIMITS = {
    "requests": (1, 1 << 16),
    "input_len": (1, _TOKENS),
    "output_len": (1, _TOKENS),
    "repeats": (1, 10_000),
    "count": (1, _MANY),
    "random": (1, _MANY),
    "questions": (1, _MANY),
    "prompt_len": (1, _TOKENS),
    "decode_len": (0, _TOKENS),
    "batch_size": (1, 1 << 16),
    "top": (1, INT64[1]),
    "context": (1, 1 << 40),
    "layers": (1, 4096),
    "seed": INT64,
}


def check_numbers(args: argparse.Namespace) -> None:
    """Check the bounds of a subcommand's arguments.

    Raises:
        ParameterError: an argument is out of bounds.
    """
    for name, (low, high) in _LIMITS.items():
        given = getattr(args, name, None)
        for value in given if isinstance(given, list) else [given]:
            number = whole(value)
            if number is not None and not low <= number <= high:
                bound = f"at least {low}" if number < low else f"at most {high}"
                shown = " ".join(map(str, given)) if isinstance(given, list) else value
                raise ParameterError(f"--{name.replace('_', '-')} {shown}: must be {bound}")
