"""Path matrix: compute the same tokens on every execution path, and compare logits and state with a full forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import get_args

import torch
from torch import Tensor

from lamella.config import FeedForwardConfig, SingleMixerConfig
from lamella.engine.loading import check_split, find_image_model
from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError, ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.layers.supernet.placing import has_choice
from lamella.parity.catalogue import Path, catalogue
from lamella.parity.forcing import Record
from lamella.parity.laboratory import SMALL_BLOCK, Laboratory, NotExercised
from lamella.parity.reference_model import ReferenceModel
from lamella.parity.tested_model import ModelUnderTest

SHORTEST = 4 * SMALL_BLOCK  # tokens; shorter sequences may cause no preemption and no eviction

# Differences that rounding may cause, relative to the size: log-probabilities in fp32, and states by dtype.
LOGPROB_LIMIT = 1e-4
STATE_LIMITS = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
# A path may differ from the full forward by this many times the full forward's difference from the reference.
NOISE_LIMIT = 4.0
_NOT_PINNED = (
    "the choice of experts cannot be pinned on this path, and rounding decides between close experts; use float32"
)


@dataclass(frozen=True)
class Cell:
    """Comparison of one path with the full forward.

    Attributes:
        path: name of the path.
        status: "pass", "fail" or "unavailable".
        why: reason unless the path passes.
        bitwise: whether all log-probabilities and state values are equal.
        logprob_max: largest absolute difference of log-probabilities over the vocabulary.
        logprob_rms: largest root mean square, over the vocabulary, of the differences at one position.
        agreement: fraction of positions with the same likeliest token.
        state_max: largest relative difference of the state: rms of the differences of a row (one head's keys at one
            position, or one row of a slot) divided by the rms of the whole state; None if the path leaves no state.
        state_worst: path of the state with the largest difference.
    """

    path: str
    status: str
    why: str | None = None
    bitwise: bool | None = None
    logprob_max: float | None = None
    logprob_rms: float | None = None
    agreement: float | None = None
    state_max: float | None = None
    state_worst: str | None = None


@dataclass(frozen=True)
class PathMatrix:
    """Results of all paths.

    Attributes:
        cells: one result per path.
        limits: limit of `logprob_rms` in nats, and limit of `state_max` ("state").
        full_rms: difference between the engine's full forward and the reference in fp32: the largest root mean square,
            over the vocabulary, at one position.
    """

    cells: tuple[Cell, ...]
    limits: dict[str, float]
    full_rms: float

    @property
    def failures(self) -> list[Cell]:
        """Cells of the paths that failed."""
        return [cell for cell in self.cells if cell.status == "fail"]


def run_paths(
    tested: ModelUnderTest,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    candidate: LanguageModel | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> PathMatrix:
    """Run all paths over one sequence.

    Args:
        tested: model under test.
        token_ids: at least 16 tokens.
        dtype: dtype of the engine.
        device: device of engine and reference.
        seed: seed of the other requests' tokens.
        candidate: loaded model to test instead of the checkpoint's.
        progress: called with the name of each path before it runs.

    Raises:
        ParameterError: too few tokens.
    """
    if len(token_ids) < SHORTEST:
        raise ParameterError(f"paths need a sequence of at least {SHORTEST} tokens, not {len(token_ids)}")
    not_sharded = (
        "the model is given, and no other process can load it" if candidate else _why_not_sharded(tested, device)
    )
    options = {
        "model": tested.checkpoint.path,
        "dtype": dtype,
        "device": device.type,
        "load_format": tested.load_format,
        "seed": tested.seed,
        "max_model_len": tested.max_model_len,
        "placement": tested.placement,
        "hf_overrides": tested.overrides,
    }
    if find_image_model(tested.checkpoint, tested.load_format) is not None:
        options["limit_mm_per_prompt"] = {"image": 0}  # image placeholder tokens are ordinary tokens here
    lab = Laboratory(candidate or tested.load(dtype, device), device, token_ids, seed, options)
    with lab.routing.recorded():
        full = lab.full()
    reference = (
        ReferenceModel(tested.config, tested.weights(device), torch.float32, device)
        .logits(token_ids[:-1])
        .log_softmax(-1)
    )
    own, size = _worst_row(full.scores.logprobs - reference.cpu()), float(reference.square().mean().sqrt())
    limits = {
        # Bounded, so that a wrong full forward does not raise the limit without end.
        "logprob_rms": max(LOGPROB_LIMIT * max(1.0, size), NOISE_LIMIT * min(own, 0.5)),
        "state": STATE_LIMITS[dtype],
    }
    cells = []
    pin = bool(lab.routing) and dtype != torch.float32
    for path in catalogue(tested.config, len(token_ids), device, not_sharded, has_choice(lab.model)):
        progress(path.name)
        if pin and path.cannot_pin_routing:
            path = replace(path, unavailable=path.unavailable or _NOT_PINNED)
        with lab.routing.pinned() if pin else nullcontext():
            cells.append(_cell(path, lab, full, limits))
    return PathMatrix(tuple(cells), limits, own)


def _why_not_sharded(tested: ModelUnderTest, device: torch.device) -> str | None:
    """Return the reason why the model cannot be sharded over two ranks; None if it can."""
    kinds = {type(part) for layer in tested.config.layers for part in (layer.mixer, layer.feed_forward)}
    if not kinds <= {*get_args(SingleMixerConfig), *get_args(FeedForwardConfig)}:
        return "a layer of another package may not support tensor parallelism"
    try:
        options = EngineOptions(model=tested.checkpoint.path, device=device.type, tensor_parallel_size=2)
        options.resolve_device()
        check_split(tested.checkpoint, options)
    except ConfigError as error:
        return str(error)
    return None


def _why(path: Path, cell: Cell, logprob_rms: float, limits: dict[str, float]) -> str | None:
    """Return the reason why a cell fails, or None. NaN fails every comparison."""
    if path.bitwise and not cell.bitwise:
        return "must be bitwise equal, and is not"
    logprobs, state = limits["logprob_rms"], limits["state"]
    if not logprob_rms <= logprobs:
        return f"log-probabilities differ by {logprob_rms:.2g} rms at one position, allowed are {logprobs:.2g}"
    if cell.state_max is not None and not cell.state_max <= state:
        return f"the state of {cell.state_worst} differs by {cell.state_max:.2g} of its size, allowed are {state:.2g}"
    return None


def _worst_row(difference: Tensor) -> float:
    """Return the largest root mean square of a row."""
    return float(difference.double().square().mean(-1).sqrt().max())


def _relative(ours: Tensor, expected: Tensor) -> float:
    """Return the worst row's rms difference divided by the rms of `expected`; infinite if a value is NaN."""
    if ours.shape != expected.shape:
        return math.inf
    difference = _worst_row(ours.double() - expected.double())
    relative = difference / float(expected.double().square().mean().sqrt()) if difference else 0.0
    return math.inf if math.isnan(relative) else relative


def _cell(path: Path, lab: Laboratory, full: Record, limits: dict[str, float]) -> Cell:
    if path.run is None or path.unavailable:
        return Cell(path.name, "unavailable", path.unavailable)
    try:
        record = path.run(lab)
    except NotExercised as error:
        return Cell(path.name, "fail", f"not exercised: {error}")
    ours, expected = record.scores.logprobs, full.scores.logprobs[record.cached :]
    difference = ours - expected
    states = {name: _relative(record.state[name], full.state[name]) for name in record.state}
    for name, logits in lab.routing.seen.items():
        there = ~logits.isnan().all(-1)
        states[f"{name}.router"] = _relative(logits[there], lab.routing.reference[name][there])
    worst = max(states, key=lambda name: states[name], default=None)
    bitwise = torch.equal(ours, expected) and all(value == 0 for value in states.values())
    logprob_rms = _worst_row(difference)
    cell = Cell(
        path=path.name,
        status="pass",
        bitwise=bitwise,
        logprob_max=float(difference.abs().max()),
        logprob_rms=logprob_rms,
        agreement=float((ours.argmax(-1) == expected.argmax(-1)).double().mean()),
        state_max=None if worst is None else states[worst],
        state_worst=worst,
    )
    why = _why(path, cell, logprob_rms, limits)
    return cell if why is None else replace(cell, status="fail", why=why)
