"""The kit's functions. All take a model (a folder, `demo`, or a Hub id) and the keywords of `ParityOptions`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lamella.config import PlacementLike
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError
from lamella.layers.decoder import LanguageModel
from lamella.parity.bisection import Bisection, run_bisect
from lamella.parity.free_running import TOP, FreeRunning, compare_generations
from lamella.parity.path_matrix import PathMatrix, run_paths
from lamella.parity.reference_model import ATTENTION
from lamella.parity.report.report import Report
from lamella.parity.scorers import open_scorer, resolve_reference
from lamella.parity.scores import Generation, Scores, Settings
from lamella.parity.sequences import Inputs, TokenSequence, make_inputs
from lamella.parity.stats import Comparison, compare_scores
from lamella.parity.tested_model import TestedModel
from lamella.parity.verdict import Tolerances, judge_bisection, judge_paths, judge_stats
from lamella.validation import checked_int

CHECKS = ("stats", "paths", "bisect")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
# Log-probabilities of all runs that are kept whole; beyond that, the likeliest of each position.
_WHOLE_BYTES = 2 << 30
_TOP = 256
# Options of an engine that the kit has itself.
_OWN = frozenset({"dtype", "device", "load_format", "hf_overrides"})
_PATH_TOKENS = 64
_BISECT_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """What to compare, on what.

    Attributes:
        engine: whose numbers are in question: lamella, vllm, hf, reference. Paths and bisect look inside `lamella`.
        oracle: who tells the truth: hf (`transformers`), reference (the kit's own plain torch, which needs nothing
            else), or auto: hf where it has the model.
        dtype: of the engine; "auto" is the checkpoint's, except that bisect takes float32, where rounding hides least.
            The truth is computed in float32 for the 16-bit dtypes, and in float64 for float32.
        device: "auto" (CUDA where there is one), "cpu", "cuda".
        prompts: a file, a list of prompts, "random", or None for the bundled text; see `make_inputs`.
        count: sequences at most (random: exactly; 16 if None).
        prompt_len, decode_len: tokens of a sequence that are prefilled, and that follow one by one.
        batch_size: sequences that the engine runs at a time.
        seed: of random tokens and dummy weights.
        top: likeliest tokens of each position that are compared; None is all where 2 GiB hold them, else 256.
        free_running: also generate freely and compare as published comparisons do.
        load_format: "auto", or "dummy" for random weights.
        max_model_len: the length that a `dynamic` rotation is scaled for.
        placement: of a supernet, see `lamella.config.read_placement`.
        hf_overrides: values in the place of the config file's, for every engine and for the truth; see
            `EngineOptions.hf_overrides`.
        engine_options: of lamella or vllm, under the engine's own names, for stats; paths and bisect choose theirs.
        candidate: a loaded model to test in the place of the checkpoint's own, for lamella, with its dtype and device;
            the checkpoint stays the truth.
    """

    engine: str = "lamella"
    oracle: str = "auto"
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    prompts: str | Path | Sequence[Any] | None = None
    count: int | None = None
    prompt_len: int = 64
    decode_len: int = 16
    batch_size: int = 8
    seed: int = 0
    top: int | None = None
    free_running: bool = False
    load_format: str = "auto"
    max_model_len: int | None = None
    placement: PlacementLike | None = None
    hf_overrides: Mapping[str, Any] | None = None
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    candidate: LanguageModel | None = None

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("top", 2)):
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name), least)
        if self.engine_options and self.engine in ("hf", "reference"):
            raise ConfigError(f"engine_options: {self.engine} has none")
        if self.engine == "lamella" and (own := sorted(_OWN & self.engine_options.keys())):
            raise ConfigError(
                f"engine_options: {', '.join(own)} must be given as an option of parity, beside engine_options: the "
                "reference follows it too"
            )
        if self.candidate is not None and self.engine != "lamella":
            raise ConfigError(f"candidate: only the engine lamella takes a loaded one, not {self.engine}")


def score(model: str | Path, **options: Any) -> tuple[list[TokenSequence], list[Scores]]:
    """The sequences, and `engine`'s log-probabilities of each, tokens forced."""
    run = _Run(model, ParityOptions(**options))
    return list(run.inputs.sequences), run.score(run.options.engine, run.dtype)


def compare(model: str | Path, **options: Any) -> Comparison:
    """`engine` against the truth and the noise floor, teacher-forced."""
    return _Run(model, ParityOptions(**options)).compare()


def paths(model: str | Path, **options: Any) -> PathMatrix:
    """Every way to compute a sequence of up to 64 tokens, against the engine's full forward, state included."""
    return _Run(model, ParityOptions(**options)).paths()


def bisect(model: str | Path, **options: Any) -> Bisection:
    """Every operation fed the truth's input; `.first` is the first that rounding cannot explain, or None."""
    return _Run(model, ParityOptions(**options)).bisect()


def check(
    model: str | Path,
    checks: Sequence[str] = (),
    tolerances: Tolerances | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Report:
    """The checks, judged, as one report; without names, all that the engine can be asked for.

    `progress` is told what is being done.
    """
    settings = ParityOptions(**options)
    possible = CHECKS if settings.engine == "lamella" else CHECKS[:1]
    for name in checks:
        if name not in possible:
            raise ConfigError(f"check {name!r}: the engine {settings.engine} can be asked for {', '.join(possible)}")
    return _Run(model, settings, progress).report(checks or possible, tolerances or Tolerances())


def assert_parity(model: str | Path, checks: Sequence[str] = (), **options: Any) -> Report:
    """For tests: raises `AssertionError` with the reasons where `check` fails."""
    report = check(model, checks, **options)
    assert report.passed, f"{model}: " + "; ".join(report.reasons)
    return report


class _Run:
    """One model, one set of options."""

    def __init__(
        self, model: str | Path, options: ParityOptions, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.options, self._progress = options, progress
        o = options
        checked = EngineOptions(model=model, device=o.device, hf_overrides=o.hf_overrides)
        self.tested = TestedModel.open(model, o.load_format, o.seed, o.max_model_len, o.placement, o.hf_overrides)
        self.device = checked.resolve_device()
        self.dtype = self.tested.dtype(options.dtype)
        if options.candidate is not None:
            self._follow(options.candidate)
        self.oracle = resolve_reference(options.oracle, self.tested)

    def _follow(self, candidate: LanguageModel) -> None:
        """A loaded model has its dtype and device already."""
        weight = candidate.get_parameter("model.embed_tokens.weight")
        for name, asked, own in (("dtype", self.dtype, weight.dtype), ("device", self.device, weight.device)):
            if getattr(self.options, name) != "auto" and asked != own:
                raise ConfigError(f"{name}={getattr(self.options, name)!r}: the candidate's is {own}")
        self.dtype, self.device = weight.dtype, weight.device

    @cached_property
    def inputs(self) -> Inputs:
        o, tested = self.options, self.tested
        vocab = tested.config.vocab_size
        return make_inputs(vocab, tested.tokenizer, o.prompts, o.count, o.prompt_len, o.decode_len, o.seed)

    @cached_property
    def top(self) -> int | None:
        if self.options.top is not None:
            return self.options.top
        rows = sum(sequence.num_predictions for sequence in self.inputs.sequences)
        whole = rows * self.tested.config.vocab_size * (3 * 4 + _WIDER[self.dtype].itemsize)
        return None if whole <= _WHOLE_BYTES else _TOP

    def settings(self, dtype: torch.dtype, attention: str = "eager") -> Settings:
        o = self.options
        return Settings(
            dtype=dtype,
            device=self.device,
            attention=attention,
            batch_size=o.batch_size,
            options=o.engine_options,
            candidate=o.candidate,
        )

    def score(self, engine: str, dtype: torch.dtype, attention: str = "eager") -> list[Scores]:
        self._progress(f"{engine}, {_name(dtype)}" + ("" if engine == "lamella" else f", {attention}"))
        scorer = open_scorer(engine, self.tested, self.settings(dtype, attention))
        try:
            return scorer.score(self.inputs.sequences, self.top)
        finally:
            scorer.close()

    def compare(self) -> Comparison:
        truth = self.score(self.oracle, _WIDER[self.dtype])
        floors = {attention: self.score(self.oracle, self.dtype, attention) for attention in ATTENTION}
        return compare_scores(self.inputs.sequences, truth, self.score(self.options.engine, self.dtype), floors)

    def free_running(self) -> FreeRunning:
        """Both engines in the engine's dtype, as published comparisons have them."""
        engine = self._generate(self.options.engine, TOP)
        return compare_generations(engine, self._generate(self.oracle, None))

    def _generate(self, engine: str, top: int | None) -> list[Generation]:
        self._progress(f"{engine}, free-running")
        scorer = open_scorer(engine, self.tested, self.settings(self.dtype, "sdpa"))
        try:
            prompts = [sequence.prompt for sequence in self.inputs.sequences]
            return scorer.generate(prompts, self.options.decode_len, top)
        finally:
            scorer.close()

    def paths(self) -> PathMatrix:
        self._only_lamella("paths")
        return run_paths(
            self.tested,
            self._longest(_PATH_TOKENS),
            self.dtype,
            self.device,
            self.options.seed,
            self.options.candidate,
            lambda name: self._progress(f"path: {name}"),
        )

    def bisect(self) -> Bisection:
        self._only_lamella("bisect")
        given = self.options.dtype != "auto" or self.options.candidate is not None
        dtype = self.dtype if given else torch.float32
        self._progress("bisect")
        tokens = self._longest(_BISECT_TOKENS)
        return run_bisect(self.tested, tokens, dtype, self.device, self.oracle, self.options.candidate)

    def _only_lamella(self, check: str) -> None:
        if self.options.engine != "lamella":
            raise ConfigError(f"{check}: looks inside the engine lamella; {self.options.engine} can be asked for stats")

    def _longest(self, length: int) -> tuple[int, ...]:
        """The first tokens of the longest sequence."""
        return max((sequence.token_ids for sequence in self.inputs.sequences), key=len)[:length]

    def report(self, checks: Sequence[str], tolerances: Tolerances) -> Report:
        start = time.perf_counter()
        reasons: list[str] = []
        stats = matrix = bisection = free = None
        if "stats" in checks:
            stats = self.compare()
            reasons += judge_stats(stats, self.dtype, tolerances)
        if self.options.free_running:
            free = self.free_running()
        if "paths" in checks:
            matrix = self.paths()
            reasons += judge_paths(matrix)
        if "bisect" in checks:
            bisection = self.bisect()
            reasons += judge_bisection(bisection)
        return Report(
            tested=self.tested,
            engine=self.options.engine,
            oracle=self.oracle,
            dtype=_name(self.dtype),
            reference_dtype=_name(_WIDER[self.dtype]),
            device=str(self.device),
            seed=self.options.seed,
            inputs=self.inputs,
            top=self.top,
            tolerances=tolerances,
            reasons=reasons,
            stats=stats,
            paths=matrix,
            bisection=bisection,
            free_running=free,
            seconds=time.perf_counter() - start,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
