"""The path matrix: every way to compute the same tokens, each against the same engine's full forward, state included.

A new way to compute joins here, as an entry of `catalogue`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from lamella.config import AttentionConfig, FeedForwardConfig, ModelConfig, SingleMixerConfig
from lamella.config.placement import covering_placements
from lamella.engine.engine import Engine
from lamella.engine.loading import check_split, find_image_model
from lamella.engine.options import EngineOptions
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.errors import ConfigError, ParameterError, WorkerError
from lamella.layers.decoder import LanguageModel
from lamella.ops import native
from lamella.ops.backend import portable_only
from lamella.parity.forcing import ForcedEngine, Record, computing, record_of
from lamella.parity.oracle import Oracle
from lamella.parity.routing import HeldRouting
from lamella.parity.scores import Scores
from lamella.parity.sequences import TokenSequence, split
from lamella.parity.subject import Subject
from lamella.state.memory import StateCost

PAGE_SIZE = 16
SMALL_PAGE = 4  # where a page has to be short of the sequence
SHORTEST = 4 * SMALL_PAGE  # tokens; with fewer, nothing need be preempted or evicted

# What rounding may move: log-probabilities in fp32 and states in each dtype, both as shares of their own size.
LOGPROB_LIMIT = 1e-4
STATE_LIMITS = {torch.float32: 1e-4, torch.float16: 0.03, torch.bfloat16: 0.25}
# A path may stray from the full forward so many times as far as that strays from the truth.
NOISE_LIMIT = 4.0
_UNHELD = "experts cannot be held there, and rounding decides between some: with dtype float32 it is tried"


@dataclass(frozen=True)
class Path:
    """One way to compute a sequence.

    Attributes:
        name: for people.
        run: gives the sequence's record; raises `NotExercised` where the way was not really taken.
        bitwise: whether nothing but memory differs from the full forward, so that every bit must agree.
        unavailable: why this version cannot take it; such a path is shown, not skipped silently.
    """

    name: str
    run: Callable[[Laboratory], Record] | None
    bitwise: bool = False
    unavailable: str | None = None


class NotExercised(Exception):
    """The engine did not do what the path is meant to test."""


class Laboratory:
    """One loaded model, one sequence, and engines as each path needs them."""

    def __init__(
        self,
        model: LanguageModel,
        device: torch.device,
        token_ids: Sequence[int],
        seed: int,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`options` of an engine that loads the same model, for paths that take a process more."""
        self.model, self.device, self.token_ids = model, device, tuple(token_ids)
        self.options = options or {}
        self.routing = HeldRouting(model, token_ids[:-1])  # the last is only predicted
        self._random = random.Random(f"strangers {seed}")  # other tokens than a random sequence of the same seed has

    def engine(self, pads: int = 0, **options: Any) -> ForcedEngine:
        usual = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 4096,
            "block_size": PAGE_SIZE,
            "num_blocks": 1024,
            "enforce_eager": True,
        }
        return ForcedEngine(self.model, usual | options, self.device, pads=pads)

    def divided(self, size: int) -> Engine:
        """An engine of so many tensor-parallel ranks."""
        usual = {"max_num_seqs": 1, "block_size": PAGE_SIZE, "num_blocks": 1024, "enforce_eager": True}
        chunk = len(self.token_ids) * 2 // 3  # one chunk and a rest
        return Engine.load(
            EngineOptions(**{**usual, **self.options}, max_num_batched_tokens=chunk, tensor_parallel_size=size)
        )

    @property
    def grows(self) -> bool:
        """Whether any state grows with the sequence, so that a pool can run out."""
        return any(spec.reach is None for spec in StateCost.of(self.model.active_holders()).paged)

    @property
    def slot_bytes(self) -> int:
        """Of one request's slot state."""
        return StateCost.of(self.model.active_holders()).bytes_per_request

    def sequence(self, prompt_len: int | None = None) -> TokenSequence:
        """The sequence, all but the last token of it a prompt unless said otherwise."""
        return split(self.token_ids, len(self.token_ids) - (prompt_len or len(self.token_ids) - 1))

    def stranger(self, prompt_len: int, count: int) -> TokenSequence:
        """Random tokens of somebody else."""
        vocab = self.model.config.vocab_size
        ids = [self._random.randrange(vocab) for _ in range(prompt_len + count)]
        return split(ids, count)

    def sharing(self, length: int) -> TokenSequence:
        """Somebody else's tokens whose first `length` are ours, a token longer as a prompt than what is shared."""
        other = (self.token_ids[length] + 1) % self.model.config.vocab_size
        return TokenSequence((*self.token_ids[:length], other), self.stranger(1, 6).continuation)

    def full(self) -> Record:
        return self.engine().score([self.sequence()])[0]


def catalogue(
    config: ModelConfig,
    length: int,
    device: torch.device,
    undivided: str | None = "no checkpoint to divide",
    supernet: bool = False,
) -> list[Path]:
    """The paths for a model on `device` and a sequence of `length` tokens; `undivided`: why ranks cannot share it;
    `supernet`: whether its layers have a choice of mixers, of which `config` is one.
    """
    on_gpu = device.type == "cuda"
    kernels = on_gpu or native.available()
    return [
        Path("full forward, again", Laboratory.full, bitwise=True),
        Path("recycled pages and slot", _recycled, bitwise=True),
        Path("a plain module, no engine", _module),
        Path("portable operations", _portable, unavailable=None if kernels else "nothing but these here"),
        *(Path(f"chunked, cut at {cut}", _cut(cut)) for cut in _cuts(config, length)),
        *(Path(f"chunked, every {size}", _every(size)) for size in _sizes(config, length)),
        Path("prompt, then token by token", _decode(length // 2)),
        Path("token by token from the first", _decode(1)),
        Path("batched with strangers", _strangers),
        *([Path("beside requests of other placements", _beside_another_placement)] if supernet else []),
        Path("preempted in a small pool", _preempted),
        Path("padded rows", _padded),
        Path("prefix hit at a page's end", _prefix_hit(0)),
        Path("prefix hit inside a page", _prefix_hit(2)),
        *(Path(f"prefix hit at a chunk's end, {end}", _hit_at(end)) for end in _chunk_ends(config, length)),
        Path("prefix of a running request", _prefix_of_a_running_request),
        Path("prefix evicted and found again", _prefix_evicted),
        Path("a conversation's next turn", _next_turn),
        Path("preempted, resumed by prefix", _resumed),
        Path("token by token in graphs", _graphs, unavailable=None if on_gpu else "graphs need a GPU"),
        Path("two tensor-parallel ranks", _two_ranks, unavailable=undivided),
    ]


def _interesting(config: ModelConfig) -> set[int]:
    """Lengths around which state changes hands: kernel widths, windows, chunks, pages."""
    widths = {canon.kernel for layer in config.layers for canon in layer.canons}
    widths |= {kernel for layer in config.layers if (kernel := getattr(layer.mixer, "kernel", None)) is not None}
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    windows = {size for mixer in mixers for size in (mixer.window, mixer.chunk) if size is not None}
    return {size + step for size in widths for step in (-2, -1, 0, 1)} | {
        size + step for size in {PAGE_SIZE} | windows for step in (-1, 0, 1)
    }


def _cuts(config: ModelConfig, length: int) -> list[int]:
    return sorted(cut for cut in {1, 2, length - 2} | _interesting(config) if 0 < cut < length - 1)


def _sizes(config: ModelConfig, length: int) -> list[int]:
    return sorted(size for size in {2, 3} | _interesting(config) if 1 < size < length - 1)


def _cut(cut: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        return _took(lab.engine().score([lab.sequence()], [cut])[0], [cut, len(lab.token_ids) - 1 - cut])

    return run


def _every(size: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        whole, rest = divmod(len(lab.token_ids) - 1, size)
        record = lab.engine(max_num_batched_tokens=size).score([lab.sequence()])[0]
        return _took(record, [size] * whole + [rest] * (rest > 0))

    return run


def _decode(prompt_len: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        record = lab.engine().score([lab.sequence(prompt_len)])[0]
        return _took(record, [prompt_len] + [1] * (len(lab.token_ids) - 1 - prompt_len))

    return run


def _graphs(lab: Laboratory) -> Record:
    engine = lab.engine(enforce_eager=False)
    engine.score([lab.stranger(9, 12), lab.stranger(40, 20), lab.stranger(3, 7)])
    if not engine.engine.runner.num_replays:
        raise NotExercised("no step was a graph's replay")
    return engine.score([lab.sequence(1)])[0]


def _took(record: Record, steps: list[int]) -> Record:
    if record.steps != steps:
        raise NotExercised(f"steps of {record.steps} tokens, not {steps}")
    return record


def _recycled(lab: Laboratory) -> Record:
    engine = lab.engine(max_num_seqs=1)
    engine.score([lab.stranger(len(lab.token_ids), 5), lab.stranger(3, 2)])
    return engine.score([lab.sequence()])[0]


def _module(lab: Laboratory) -> Record:
    sequence = lab.sequence()
    with torch.inference_mode(), computing([(sequence.prompt, 0, len(sequence.prompt))]):
        logits = lab.model.compute_logits(lab.model(torch.tensor(sequence.prompt, device=lab.device)))
    scores = Scores.of(logits, sequence.token_ids[1:], None)
    return Record(sequence.prompt, sequence.continuation, 1, _rows(scores))


def _rows(scores: Scores) -> dict[int, Scores]:
    pairs = zip(scores.target.split(1), scores.logprobs.split(1), strict=True)
    return {index: Scores(*pair) for index, pair in enumerate(pairs)}


def _two_ranks(lab: Laboratory) -> Record:
    """Each rank's state is another part of the whole; what is compared are the logits, of which all have all."""
    sequence, rows = lab.sequence(), []
    try:
        engine = lab.divided(2)
        compute = engine.model.compute_logits

        def logits(hidden: Tensor) -> Tensor:
            rows.append(compute(hidden))
            return rows[-1]

        engine.model.compute_logits = logits  # type: ignore[method-assign]
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        engine.add(engine.make_job("path", {"prompt_token_ids": list(sequence.prompt)}, params))
        while engine.has_work:
            engine.step()
        engine.close()
    except WorkerError as error:
        raise NotExercised(str(error)) from error
    scores = Scores.of(torch.cat(rows), sequence.token_ids[1:], None)
    return Record(sequence.prompt, sequence.continuation, 1, _rows(scores))


def _portable(lab: Laboratory) -> Record:
    with portable_only():
        return lab.engine().score([lab.sequence()])[0]


def _strangers(lab: Laboratory) -> Record:
    length = len(lab.token_ids)
    strangers = [lab.stranger(prompt, count) for prompt, count in ((1, 9), (length // 2, 4), (5, length // 3))]
    batch = [*strangers[:2], lab.sequence(length // 2), strangers[2]]
    record = lab.engine(max_num_batched_tokens=max(4, length // 3)).score(batch)[2]
    if len(record.steps) < 3:
        raise NotExercised("the strangers left no mark on the steps")
    return record


def _beside_another_placement(lab: Laboratory) -> Record:
    model, length = lab.model, len(lab.token_ids)
    others = [placement for placement in covering_placements(model.config) if placement != model.placement]
    strangers = [
        replace(record_of(lab.stranger(5 + 3 * turn, 9)), placement=other) for turn, other in enumerate(others)
    ]
    active = model.placement
    engine = lab.engine(mixed_placements=True, max_num_batched_tokens=max(4, length // 3))
    try:
        ours = replace(record_of(lab.sequence(length // 2)), placement=active)
        return engine.run([*strangers[:2], ours, *strangers[2:]])[len(strangers[:2])]
    finally:
        model.activate(active)


def _preempted(lab: Laboratory, **options: Any) -> Record:
    if not lab.grows:
        # No pool runs out, whatever its size: the requests are told to give up their state.
        engine = lab.engine(block_size=SMALL_PAGE, **options)
        half = len(lab.token_ids) // 2
        return engine.run([record_of(lab.sequence(half))], preempt_after=SMALL_PAGE)[0]
    # Three requests start side by side in a pool that only two can finish in; the youngest is ours.
    half = len(lab.token_ids) // 2
    others = [lab.stranger(half, len(lab.token_ids) - half) for _ in range(2)]
    pages = 2 * -(-len(lab.token_ids) // SMALL_PAGE)
    engine = lab.engine(block_size=SMALL_PAGE, num_blocks=pages, **options)
    record = engine.score([*others, lab.sequence(half)])[2]
    if not record.preemptions:
        raise NotExercised("nothing was preempted")
    return record


def _padded(lab: Laboratory) -> Record:
    return lab.engine(pads=3).score([lab.sequence(len(lab.token_ids) // 2)])[0]


def _caching(lab: Laboratory, **options: Any) -> ForcedEngine:
    return lab.engine(enable_prefix_caching=True, snapshot_prompts="always", block_size=SMALL_PAGE, **options)


def _shared_length(lab: Laboratory) -> int:
    """About half of the sequence, whole pages."""
    return len(lab.token_ids) // 2 // SMALL_PAGE * SMALL_PAGE


def _hit(record: Record, length: int) -> Record:
    if record.cached != length:
        raise NotExercised(f"{record.cached} tokens came from the prefix cache, not {length}")
    return record


def _prefix_hit(beyond: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        engine, length = _caching(lab), _shared_length(lab)
        engine.score([lab.sharing(length + beyond)])
        return _hit(engine.score([lab.sequence()])[0], length)

    return run


def _chunk_ends(config: ModelConfig, length: int) -> list[int]:
    """Of each size of attention's chunks, the last end of one that a prefix of `length` tokens can be cut at."""
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    ends = {(length - 2) // mixer.chunk * mixer.chunk for mixer in mixers if mixer.chunk is not None}
    return sorted(end for end in ends if end and end % SMALL_PAGE == 0)


def _hit_at(length: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        engine = _caching(lab)
        engine.score([lab.sharing(length)])
        return _hit(engine.score([lab.sequence()])[0], length)

    return run


def _prefix_of_a_running_request(lab: Laboratory) -> Record:
    # The first step's budget is used up by the other's shared pages, so that ours starts beside its continuation.
    length = _shared_length(lab)
    return _hit(_caching(lab).score([lab.sharing(length), lab.sequence()], [length])[1], length)


def _prefix_evicted(lab: Laboratory) -> Record:
    length = len(lab.token_ids)
    options: dict[str, Any] = {"num_blocks": -(-length // SMALL_PAGE) + 2}
    if not lab.grows:
        options["snapshot_bytes"] = lab.slot_bytes  # one snapshot, and no pages that could run out
    engine = _caching(lab, max_num_seqs=1, **options)
    engine.score([lab.sequence()])
    engine.score([lab.stranger(length, 1)])
    engine.score([lab.sequence()])
    if not engine.engine.stats()["prefix_evictions"]:
        raise NotExercised("nothing was evicted")
    return _hit(engine.score([lab.sequence()])[0], (length - 2) // SMALL_PAGE * SMALL_PAGE)


def _next_turn(lab: Laboratory) -> Record:
    engine, length = _caching(lab), _shared_length(lab)
    start = length // 2
    engine.score([TokenSequence(lab.token_ids[:start], lab.token_ids[start : length + 2])])
    return _hit(engine.score([lab.sequence()])[0], length)


def _resumed(lab: Laboratory) -> Record:
    return _preempted(lab, enable_prefix_caching=True)


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
    subject: Subject,
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
    undivided = "the model is given, and no other process can load it" if candidate else _why_undivided(subject, device)
    options = {
        "model": subject.checkpoint.path,
        "dtype": dtype,
        "device": device.type,
        "load_format": subject.load_format,
        "seed": subject.seed,
        "max_model_len": subject.max_model_len,
        "placement": subject.placement,
        "hf_overrides": subject.overrides,
    }
    if find_image_model(subject.checkpoint, subject.load_format) is not None:
        options["limit_mm_per_prompt"] = {"image": 0}  # tokens of images are tokens like any others here
    lab = Laboratory(candidate or subject.load(dtype, device), device, token_ids, seed, options)
    with lab.routing.recorded():
        full = lab.full()
    truth = (
        Oracle(subject.config, subject.weights(device), torch.float32, device).logits(token_ids[:-1]).log_softmax(-1)
    )
    own, size = _worst_row(full.scores.logprobs - truth.cpu()), float(truth.square().mean().sqrt())
    limits = {
        # A full forward that is broken itself must not excuse its paths.
        "logprob_rms": max(LOGPROB_LIMIT * max(1.0, size), NOISE_LIMIT * min(own, 0.5)),
        "state": STATE_LIMITS[dtype],
    }
    cells = []
    hold = bool(lab.routing) and dtype != torch.float32
    for path in catalogue(subject.config, len(token_ids), device, undivided, lab.model.has_choice):
        progress(path.name)
        if hold and path.run in (_graphs, _two_ranks):
            path = replace(path, unavailable=path.unavailable or _UNHELD)
        with lab.routing.held() if hold else nullcontext():
            cells.append(_cell(path, lab, full, limits))
    return PathMatrix(tuple(cells), limits, own)


def _why_undivided(subject: Subject, device: torch.device) -> str | None:
    """Why two ranks cannot share the model."""
    kinds = {type(part) for layer in subject.config.layers for part in (layer.mixer, layer.feed_forward)}
    if not kinds <= {*get_args(SingleMixerConfig), *get_args(FeedForwardConfig)}:
        return "a layer of a kind that may not know how to be divided"
    try:
        options = EngineOptions(model=subject.checkpoint.path, device=device.type, tensor_parallel_size=2)
        options.resolve_device()
        check_split(subject.checkpoint, options)
    except ConfigError as error:
        return str(error)
    return None


def _why(path: Path, cell: Cell, limits: dict[str, float]) -> str | None:
    """Why a cell fails. Comparisons are written so that a NaN fails."""
    if path.bitwise and not cell.bitwise:
        return "must be bitwise equal, and is not"
    assert cell.logprob_rms is not None
    logprobs, state = limits["logprob_rms"], limits["state"]
    if not cell.logprob_rms <= logprobs:
        return f"log-probabilities differ by {cell.logprob_rms:.2g} rms at one position, allowed are {logprobs:.2g}"
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
    cell = Cell(
        path=path.name,
        status="pass",
        bitwise=bitwise,
        logprob_max=float(difference.abs().max()),
        logprob_rms=_worst_row(difference),
        agreement=float((ours.argmax(-1) == expected.argmax(-1)).double().mean()),
        state_max=None if worst is None else states[worst],
        state_worst=worst,
    )
    why = _why(path, cell, limits)
    return cell if why is None else replace(cell, status="fail", why=why)
