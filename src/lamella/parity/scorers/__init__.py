"""Engines that can score sequences: one module each, with a function `open_scorer(tested, settings)`."""

from __future__ import annotations

from importlib import import_module

from lamella.errors import ConfigError
from lamella.parity.scores import Scorer, Settings
from lamella.parity.tested_model import ModelUnderTest

ENGINES = {name: f"lamella.parity.scorers.{name}" for name in ("lamella", "hf", "reference", "vllm")}


def open_scorer(engine: str, tested: ModelUnderTest, settings: Settings) -> Scorer:
    """Open an engine with the tested model.

    Raises:
        ConfigError: there is no such engine, or it does not support the model.
    """
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}")
    scorer: Scorer = import_module(ENGINES[engine]).open_scorer(tested, settings)
    return scorer


def resolve_reference(reference: str, tested: ModelUnderTest) -> str:
    """Return "hf" or "reference"; "auto" is "hf" if `transformers` supports the model, otherwise "reference".

    Raises:
        ConfigError: `reference` has another value.
    """
    check_reference("reference", reference)
    if reference == "auto":
        from lamella.parity.scorers.hf import why_unsupported

        return "reference" if why_unsupported(tested) else "hf"
    return reference


def check_reference(option: str, value: str) -> None:
    """Check the value of `option`, which names a reference.

    Raises:
        ConfigError: the value is none of "auto", "hf" and "reference".
    """
    if value not in ("auto", "hf", "reference"):
        raise ConfigError(f"{option}={value!r}: must be auto, hf or reference")
