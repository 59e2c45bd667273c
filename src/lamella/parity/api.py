"""Functions of the parity kit. All take a model (a folder, `demo`, or a Hub id) and the keywords of `ParityOptions`."""

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
from lamella.parity.scorers import check_reference, open_scorer, resolve_reference
from lamella.parity.scores import Generation, Scores, Settings
from lamella.parity.sequences import Inputs, TokenSequence, make_inputs
from lamella.parity.stats import Comparison, compare_scores
from lamella.parity.tested_model import ModelUnderTest
from lamella.parity.verdict import Tolerances, judge_bisection, judge_paths, judge_stats
from lamella.validation import checked_int

CHECKS = ("stats", "paths", "bisect")
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
# Keep log-probabilities of the whole vocabulary up to this size over all runs; otherwise the top _TOP per position.
_WHOLE_BYTES = 2 << 30
_TOP = 256
# Engine options that must be given as parity options, because the reference uses them too.
_PARITY_OPTIONS = frozenset({"dtype", "device", "load_format", "hf_overrides"})
_PATH_TOKENS = 64
_BISECT_TOKENS = 48


@dataclass(frozen=True, kw_only=True)
class ParityOptions:
    """Options of a comparison.

    Attributes:
        engine: engine under test: "lamella", "vllm", "hf" or "reference". The checks `paths` and `bisect` support only
            "lamella".
        reference: reference implementation: "hf" (`transformers`), "reference" (the kit's own plain torch code, without
            dependencies), or "auto" for "hf" if `transformers` supports the model and "reference" otherwise.
        oracle: deprecated name of `reference`; give only one of the two.
        dtype: dtype of the engine. "auto" is the checkpoint's dtype; for bisect it is float32, which makes errors
            easiest to see. The reference runs in float32 for 16-bit dtypes, and in float64 for float32.
        device: "auto" (CUDA if available), "cpu" or "cuda".
        prompts: a file, a list of prompts, "random", or None for the bundled text; see `make_inputs`.
        count: maximum number of sequences; exact number for "random" (16 if None).
        prompt_len: tokens of each sequence that are prefilled.
        decode_len: tokens of each sequence that are decoded one by one.
        batch_size: sequences that the engine runs at the same time.
        seed: seed of random tokens and dummy weights.
        top: number of likeliest tokens compared at each position; None for the whole vocabulary if that needs at most
            2 GiB, and 256 otherwise.
        free_running: also generate freely and compare as published comparisons do.
        load_format: "auto", or "dummy" for random weights.
        max_model_len: length in tokens for which a `dynamic` RoPE scaling is computed.
        placement: placement of a supernet, see `lamella.config.read_placement`.
        hf_overrides: values that replace those of the config file, for all engines and for the reference; see
            `EngineOptions.hf_overrides`.
        engine_options: options of lamella or vllm under the engine's own names. Used by `stats` only.
        candidate: loaded model to test instead of the checkpoint's, with its dtype and device (engine "lamella" only).
            The reference still uses the checkpoint.
    """

    engine: str = "lamella"
    reference: str = "auto"
    oracle: str | None = None
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
        if self.oracle is not None:
            if self.reference != "auto":
                raise ConfigError(
                    f"oracle={self.oracle!r}: is the deprecated name of reference, and reference is given too; "
                    "remove oracle"
                )
            check_reference("oracle", self.oracle)
            object.__setattr__(self, "reference", self.oracle)
        for name, least in (("batch_size", 1), ("top", 2)):
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name), least)
        if self.engine_options and self.engine in ("hf", "reference"):
            raise ConfigError(f"engine_options: {self.engine} has none")
        if self.engine == "lamella" and (own := sorted(_PARITY_OPTIONS & self.engine_options.keys())):
            raise ConfigError(
                f"engine_options: {', '.join(own)} must be given as an option of parity, beside engine_options: the "
                "reference follows it too"
            )
        if self.candidate is not None and self.engine != "lamella":
            raise ConfigError(f"candidate: only the engine lamella can test a loaded model, not {self.engine}")


def score(model: str | Path, **options: Any) -> tuple[list[TokenSequence], list[Scores]]:
    """Score sequences with one engine, teacher-forced.

    Args:
        model: a folder, `demo`, or a Hub id.
        options: keywords of `ParityOptions`.

    Returns:
        The sequences, and the engine's log-probabilities for each of them.
    """
    run = _Run(model, ParityOptions(**options))
    return list(run.inputs.sequences), run.score(run.options.engine, run.dtype)


def compare(model: str | Path, **options: Any) -> Comparison:
    """Compare the engine with the reference and with the noise floor, teacher-forced.

    Args:
        model: a folder, `demo`, or a Hub id.
        options: keywords of `ParityOptions`.
    """
    return _Run(model, ParityOptions(**options)).compare()


def paths(model: str | Path, **options: Any) -> PathMatrix:
    """Compute one sequence on every execution path, and compare logits and state with the engine's full forward.

    Args:
        model: a folder, `demo`, or a Hub id.
        options: keywords of `ParityOptions`. The sequence has at most 64 tokens.
    """
    return _Run(model, ParityOptions(**options)).paths()


def bisect(model: str | Path, **options: Any) -> Bisection:
    """Compare every operation, given the reference's input, with the reference's output.

    Args:
        model: a folder, `demo`, or a Hub id.
        options: keywords of `ParityOptions`. The sequence has at most 48 tokens.

    Returns:
        The result; `.first` is the first operation whose error is larger than rounding explains, or None.
    """
    return _Run(model, ParityOptions(**options)).bisect()


def check(
    model: str | Path,
    checks: Sequence[str] = (),
    tolerances: Tolerances | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Report:
    """Run checks and judge their results.

    Args:
        model: a folder, `demo`, or a Hub id.
        checks: names out of "stats", "paths" and "bisect"; by default all that the engine supports.
        tolerances: limits of `stats`; None for the defaults.
        progress: called with a line of text at the start of each part of the work.
        options: keywords of `ParityOptions`.

    Returns:
        The report; `.passed` is the verdict.

    Raises:
        ConfigError: an option is wrong, or the engine does not support a check.
    """
    settings = ParityOptions(**options)
    possible = CHECKS if settings.engine == "lamella" else CHECKS[:1]
    for name in checks:
        if name not in possible:
            raise ConfigError(f"check {name!r}: the engine {settings.engine} supports {', '.join(possible)}")
    return _Run(model, settings, progress).report(checks or possible, tolerances or Tolerances())


def assert_parity(model: str | Path, checks: Sequence[str] = (), **options: Any) -> Report:
    """Run `check` and return its report.

    Args:
        model: a folder, `demo`, or a Hub id.
        checks: names out of "stats", "paths" and "bisect"; by default all that the engine supports.
        options: keywords of `ParityOptions`.

    Raises:
        AssertionError: a check fails; the message lists the reasons.
    """
    report = check(model, checks, **options)
    assert report.passed, f"{model}: " + "; ".join(report.reasons)
    return report


class _Run:
    """One run of the kit: a model, its inputs, and a set of options."""

    def __init__(
        self, model: str | Path, options: ParityOptions, progress: Callable[[str], None] = lambda text: None
    ) -> None:
        self.options, self._progress = options, progress
        o = options
        checked = EngineOptions(model=model, device=o.device, hf_overrides=o.hf_overrides)
        self.tested = ModelUnderTest.open(model, o.load_format, o.seed, o.max_model_len, o.placement, o.hf_overrides)
        self.device = checked.resolve_device()
        self.dtype = self.tested.dtype(options.dtype)
        if options.candidate is not None:
            self._use_candidate(options.candidate)
        self.reference = resolve_reference(options.reference, self.tested)

    def _use_candidate(self, candidate: LanguageModel) -> None:
        """Use the dtype and device of a loaded model.

        Raises:
            ConfigError: the options name another dtype or device.
        """
        weight = candidate.get_parameter("model.embed_tokens.weight")
        for name, requested, own in (("dtype", self.dtype, weight.dtype), ("device", self.device, weight.device)):
            if getattr(self.options, name) != "auto" and requested != own:
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
        reference = self.score(self.reference, _WIDER[self.dtype])
        floors = {attention: self.score(self.reference, self.dtype, attention) for attention in ATTENTION}
        return compare_scores(self.inputs.sequences, reference, self.score(self.options.engine, self.dtype), floors)

    def free_running(self) -> FreeRunning:
        """Compare free-running generations; both sides use the engine's dtype, as in published comparisons."""
        engine = self._generate(self.options.engine, TOP)
        return compare_generations(engine, self._generate(self.reference, None))

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
            self._longest_sequence(_PATH_TOKENS),
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
        tokens = self._longest_sequence(_BISECT_TOKENS)
        return run_bisect(self.tested, tokens, dtype, self.device, self.reference, self.options.candidate)

    def _only_lamella(self, check: str) -> None:
        if self.options.engine != "lamella":
            raise ConfigError(f"{check}: needs the engine lamella; the engine {self.options.engine} supports stats")

    def _longest_sequence(self, length: int) -> tuple[int, ...]:
        """Return at most `length` tokens from the start of the longest sequence."""
        return max((sequence.token_ids for sequence in self.inputs.sequences), key=len)[:length]

    def report(self, checks: Sequence[str], tolerances: Tolerances) -> Report:
        start = time.perf_counter()
        reasons: list[str] = []
        stats = matrix = bisection = generations = None
        if "stats" in checks:
            stats = self.compare()
            reasons += judge_stats(stats, self.dtype, tolerances)
        if self.options.free_running:
            generations = self.free_running()
        if "paths" in checks:
            matrix = self.paths()
            reasons += judge_paths(matrix)
        if "bisect" in checks:
            bisection = self.bisect()
            reasons += judge_bisection(bisection)
        return Report(
            tested=self.tested,
            engine=self.options.engine,
            reference=self.reference,
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
            free_running=generations,
            seconds=time.perf_counter() - start,
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
