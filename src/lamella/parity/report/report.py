"""Result of a parity run, from which the terminal tables, the JSON and the HTML page are made."""

from __future__ import annotations

import math
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lamella
from lamella.parity.bisection import Bisection
from lamella.parity.free_running import FreeRunning
from lamella.parity.path_matrix import PathMatrix
from lamella.parity.sequences import Inputs
from lamella.parity.stats import Comparison
from lamella.parity.tested_model import ModelUnderTest
from lamella.parity.verdict import Tolerances


@dataclass(frozen=True)
class Report:
    """Options, results and verdict of a parity run.

    Attributes:
        tested: model under test.
        engine: name of the engine under test.
        reference: "hf" or "reference".
        dtype: dtype of the engine.
        reference_dtype: dtype of the reference.
        device: device of engine and reference.
        seed: seed of random tokens and dummy weights.
        inputs: scored sequences.
        top: number of likeliest tokens compared; None for the whole vocabulary.
        tolerances: limits of `stats`.
        reasons: reasons why the run fails; empty if it passes.
        stats: result of `stats`, if it ran.
        paths: result of `paths`, if it ran.
        bisection: result of `bisect`, if it ran.
        free_running: result of the free-running comparison, if it ran.
        seconds: duration of the run.
    """

    tested: ModelUnderTest
    engine: str
    reference: str
    dtype: str
    reference_dtype: str
    device: str
    seed: int
    inputs: Inputs
    top: int | None
    tolerances: Tolerances
    reasons: Sequence[str]
    stats: Comparison | None
    paths: PathMatrix | None
    bisection: Bisection | None
    free_running: FreeRunning | None
    seconds: float

    @property
    def passed(self) -> bool:
        """True if all checks passed."""
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON; NaN and infinities become None.

        The keys `oracle`, `truth_dtype`, `truth_logprob` and `truth_top` are older names that are kept for readers of
        existing reports.
        """
        stats = None if self.stats is None else asdict(self.stats)
        worst = [] if stats is None else [self._with_text(token) for token in stats.pop("worst")]
        predictions = sum(sequence.num_predictions for sequence in self.inputs.sequences)
        value = {
            "verdict": "pass" if self.passed else "fail",
            "noise_floor_ratio": None if self.stats is None else self.stats.noise_floor_ratio,
            "reasons": list(self.reasons),
            "model": self.tested.name,
            "architecture": self.tested.config.architecture,
            "config_hash": self.tested.config_hash,
            "engine": self.engine,
            "oracle": self.reference,
            "dtype": self.dtype,
            "reference_dtype": self.reference_dtype,
            "truth_dtype": self.reference_dtype,
            "device": self.device,
            "seed": self.seed,
            "inputs": {
                "source": self.inputs.source,
                "sequences": len(self.inputs.sequences),
                "predictions": predictions,
                "prompt_len": self.inputs.prompt_len,
                "decode_len": self.inputs.decode_len,
                "vocabulary": "whole" if self.top is None else f"top {self.top}",
            },
            "versions": versions(),
            "tolerances": asdict(self.tolerances),
            "stats": stats,
            "worst_tokens": worst,
            "paths": self.paths,
            "bisect": None
            if self.bisection is None
            else {
                "first": self.bisection.first,
                "rows": self.bisection.rows,
                "plan": " + ".join(map(str, self.bisection.plan)) + " tokens",
                "oracle": self.bisection.reference,
            },
            "free_running": self.free_running,
            "seconds": self.seconds,
        }
        plain: dict[str, Any] = _plain(value)
        return plain

    def _with_text(self, token: dict[str, Any]) -> dict[str, Any]:
        """Add the text of a worst token and its context, and the older names of its keys."""
        token = {**token, "truth_logprob": token["reference_logprob"], "truth_top": token["reference_top"]}
        tokenizer = self.tested.tokenizer
        if tokenizer is None:
            return {**token, "text": None, "context": None}
        return {
            **token,
            "text": tokenizer.token_text(token["token"]),
            "context": tokenizer.decode(token["context_ids"], skip_special_tokens=True),
        }


def versions() -> dict[str, str | None]:
    """Return the versions of the libraries that computed, and the commit if lamella runs from a checkout."""
    found: dict[str, str | None] = {"lamella": lamella.__version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found | {"commit": _commit()}


def _commit() -> str | None:
    root = Path(lamella.__file__).parents[2]
    if not (root / "src" / "lamella").is_dir():
        return None
    try:
        shown = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.strip() or None


def _plain(value: Any) -> Any:
    """Convert dataclasses, tuples and non-finite numbers to values that JSON supports."""
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
