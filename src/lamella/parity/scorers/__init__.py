"""The engines that can score: a module each, with a function `open_scorer(tested, settings)`."""

from __future__ import annotations

from importlib import import_module

from lamella.errors import ConfigError
from lamella.parity.scores import Scorer, Settings
from lamella.parity.tested_model import TestedModel

ENGINES = {name: f"lamella.parity.scorers.{name}" for name in ("lamella", "hf", "reference", "vllm")}


def open_scorer(engine: str, tested: TestedModel, settings: Settings) -> Scorer:
    """An engine with the tested's model. Raises `ConfigError` where it cannot take it, saying what to do."""
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r}: must be one of {', '.join(ENGINES)}")
    scorer: Scorer = import_module(ENGINES[engine]).open_scorer(tested, settings)
    return scorer


def resolve_reference(oracle: str, tested: TestedModel) -> str:
    """ "auto" is `hf` where `transformers` has the model, else `reference`."""
    if oracle == "auto":
        from lamella.parity.scorers.hf import why_not

        return "reference" if why_not(tested) else "hf"
    if oracle not in ("hf", "reference"):
        raise ConfigError(f"oracle={oracle!r}: must be auto, hf or reference")
    return oracle
