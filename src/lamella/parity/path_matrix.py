"""The path matrix: every way to compute the same tokens, each compared with a full forward, state included."""

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
from lamella.parity.tested_model import TestedModel

SHORTEST = 4 * SMALL_BLOCK  # tokens; with fewer, nothing need be preempted or evicted

# What rounding may move: log-probabilities in fp32 and states in each dtype, both as shares of their own size.
LOGPROB_LIMIT = 1e-4
STATE_LIMITS = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
# A path may stray from the full forward so many times as far as that strays from the truth.
NOISE_LIMIT = 4.0
_UNHELD = "experts cannot be held there, and rounding decides between some: with dtype float32 it is tried"


@dataclass(frozen=True)
class Cell:
    """How one path compares with the full forward.

    Attributes:
        path: its name.
        status: "pass", "fail" or "unavailable", and `why` unless it passes.
        bitwise: whether every log-probability and state value was equal.
        logprob_max, logprob_rms: of the differences of log-probabilities over the vocabulary, the largest, and the
            root of the mean square.
        agreement: share of positions with the same likeliest token.
        state_max: the largest root mean square of a row's differences in any layer's state (a row is a head's keys of
            one position, or one row of a slot), in units of that state's own root mean square; None where the path
            leaves no state.
        state_worst: where.
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
    """The cells, what they were allowed, and how far the full forward itself is from the reference's in fp32.

    That last figure is the largest root mean square, over the vocabulary, at one position; so is the limit of the
    paths' log-probabilities. States may differ by the limit times their own root mean square.
    """

    cells: tuple[Cell, ...]
    limits: dict[str, float]
    full_rms: float

    @property
    def failures(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.status == "fail"]


def run_paths(
    tested: TestedModel,
    token_ids: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    candidate: LanguageModel | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> PathMatrix:
    """All paths over one sequence. `candidate` is tested in place of the one that the checkpoint gives."""
    if len(token_ids) < SHORTEST:
        raise ParameterError(f"paths need a sequence of at least {SHORTEST} tokens, not {len(token_ids)}")
    undivided = "the model is given, and no other process can load it" if candidate else _why_undivided(tested, device)
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
        options["limit_mm_per_prompt"] = {"image": 0}  # tokens of images are tokens like any others here
    lab = Laboratory(candidate or tested.load(dtype, device), device, token_ids, seed, options)
    with lab.routing.recorded():
        full = lab.full()
    truth = (
        ReferenceModel(tested.config, tested.weights(device), torch.float32, device)
        .logits(token_ids[:-1])
        .log_softmax(-1)
    )
    own, size = _worst_row(full.scores.logprobs - truth.cpu()), float(truth.square().mean().sqrt())
    limits = {
        # A full forward that is broken itself must not excuse its paths.
        "logprob_rms": max(LOGPROB_LIMIT * max(1.0, size), NOISE_LIMIT * min(own, 0.5)),
        "state": STATE_LIMITS[dtype],
    }
    cells = []
    hold = bool(lab.routing) and dtype != torch.float32
    for path in catalogue(tested.config, len(token_ids), device, undivided, has_choice(lab.model)):
        progress(path.name)
        if hold and path.holds_no_routing:
            path = replace(path, unavailable=path.unavailable or _UNHELD)
        with lab.routing.held() if hold else nullcontext():
            cells.append(_cell(path, lab, full, limits))
    return PathMatrix(tuple(cells), limits, own)


def _why_undivided(tested: TestedModel, device: torch.device) -> str | None:
    """Why two ranks cannot share the model."""
    kinds = {type(part) for layer in tested.config.layers for part in (layer.mixer, layer.feed_forward)}
    if not kinds <= {*get_args(SingleMixerConfig), *get_args(FeedForwardConfig)}:
        return "a layer of a kind that may not know how to be divided"
    try:
        options = EngineOptions(model=tested.checkpoint.path, device=device.type, tensor_parallel_size=2)
        options.resolve_device()
        check_split(tested.checkpoint, options)
    except ConfigError as error:
        return str(error)
    return None


def _why(path: Path, cell: Cell, logprob_rms: float, limits: dict[str, float]) -> str | None:
    """Return why a cell fails. Comparisons are written so that a NaN fails."""
    if path.bitwise and not cell.bitwise:
        return "must be bitwise equal, and is not"
    logprobs, state = limits["logprob_rms"], limits["state"]
    if not logprob_rms <= logprobs:
        return f"log-probabilities differ by {logprob_rms:.2g} rms at one position, allowed are {logprobs:.2g}"
    if cell.state_max is not None and not cell.state_max <= state:
        return f"the state of {cell.state_worst} differs by {cell.state_max:.2g} of its size, allowed are {state:.2g}"
    return None


def _worst_row(difference: Tensor) -> float:
    """The largest root mean square of a row."""
    return float(difference.double().square().mean(-1).sqrt().max())


def _relative(ours: Tensor, expected: Tensor) -> float:
    """The worst row in units of the expected tensor's root mean square; infinite where one is not a number."""
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
        states[f"{name}.router"] = _relative(logits[there], lab.routing.truth[name][there])
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
