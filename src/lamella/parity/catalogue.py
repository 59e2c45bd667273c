"""Execution paths of the path matrix: every way in which the engine can compute the same tokens.

To add an execution path, add an entry to `catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lamella.config import AttentionConfig, ModelConfig
from lamella.config.placement import covering_placements
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.errors import WorkerError
from lamella.layers.supernet.placing import activate, active_placement
from lamella.ops import native
from lamella.ops.backend import portable_only
from lamella.parity.forcing import ForcedEngine, Record, computing, record_from_sequence
from lamella.parity.laboratory import BLOCK_SIZE, SMALL_BLOCK, Laboratory, NotExercised
from lamella.parity.scores import Scores
from lamella.parity.sequences import TokenSequence


@dataclass(frozen=True)
class Path:
    """One way to compute a sequence.

    Attributes:
        name: readable name.
        run: returns the record of the sequence; raises `NotExercised` if the engine did not take the path.
        bitwise: whether the results must be bitwise equal to the full forward, because only memory addresses differ.
        unavailable: reason why the path cannot run here; it is shown in the matrix. None if it can run.
        cannot_pin_routing: whether the choice of experts cannot be pinned on this path.
    """

    name: str
    run: Callable[[Laboratory], Record] | None
    bitwise: bool = False
    unavailable: str | None = None
    cannot_pin_routing: bool = False


def catalogue(
    config: ModelConfig,
    length: int,
    device: torch.device,
    not_sharded: str | None = "no checkpoint to divide",
    supernet: bool = False,
) -> list[Path]:
    """Return the execution paths for a model.

    Args:
        config: config of the model, or of one placement of a supernet.
        length: number of tokens of the sequence.
        device: device of the model.
        not_sharded: reason why the model cannot be sharded over two ranks; None if it can.
        supernet: whether layers have several mixers.
    """
    on_gpu = device.type == "cuda"
    kernels = on_gpu or native.available()
    return [
        Path("full forward, again", Laboratory.full, bitwise=True),
        Path("recycled blocks and slot", _recycled, bitwise=True),
        Path("a plain module, no engine", _module),
        Path("portable operations", _portable, unavailable=None if kernels else "nothing but these here"),
        *(Path(f"chunked, cut at {cut}", _split_at(cut)) for cut in _split_points(config, length)),
        *(Path(f"chunked, every {size}", _chunks_of(size)) for size in _chunk_sizes(config, length)),
        Path("prompt, then token by token", _decode(length // 2)),
        Path("token by token from the first", _decode(1)),
        Path("batched with strangers", _batched_with_strangers),
        *([Path("beside requests of other placements", _beside_another_placement)] if supernet else []),
        Path("preempted in a small pool", _preempted),
        Path("padded rows", _padded),
        Path("prefix hit at a block's end", _prefix_hit(0)),
        Path("prefix hit inside a block", _prefix_hit(2)),
        *(Path(f"prefix hit at a chunk's end, {end}", _prefix_hit_at(end)) for end in _chunk_ends(config, length)),
        Path("prefix of a running request", _prefix_of_a_running_request),
        Path("prefix evicted and found again", _prefix_evicted),
        Path("a conversation's next turn", _next_turn),
        Path("preempted, resumed by prefix", _resumed),
        Path(
            "token by token in graphs",
            _graphs,
            unavailable=None if on_gpu else "graphs need a GPU",
            cannot_pin_routing=True,
        ),
        Path("two tensor-parallel ranks", _two_ranks, unavailable=not_sharded, cannot_pin_routing=True),
    ]


def _boundary_lengths(config: ModelConfig) -> set[int]:
    """Return lengths around kernel widths, windows, attention chunks and blocks, where errors at boundaries show."""
    widths = {canon.kernel for layer in config.layers for canon in layer.canons}
    widths |= {kernel for layer in config.layers if (kernel := getattr(layer.mixer, "kernel", None)) is not None}
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    windows = {size for mixer in mixers for size in (mixer.window, mixer.chunk) if size is not None}
    return {size + step for size in widths for step in (-2, -1, 0, 1)} | {
        size + step for size in {BLOCK_SIZE} | windows for step in (-1, 0, 1)
    }


def _split_points(config: ModelConfig, length: int) -> list[int]:
    return sorted(cut for cut in {1, 2, length - 2} | _boundary_lengths(config) if 0 < cut < length - 1)


def _chunk_sizes(config: ModelConfig, length: int) -> list[int]:
    return sorted(size for size in {2, 3} | _boundary_lengths(config) if 1 < size < length - 1)


def _split_at(cut: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        return _require_steps(lab.engine().score([lab.sequence()], [cut])[0], [cut, len(lab.token_ids) - 1 - cut])

    return run


def _chunks_of(size: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        whole, rest = divmod(len(lab.token_ids) - 1, size)
        record = lab.engine(max_num_batched_tokens=size).score([lab.sequence()])[0]
        return _require_steps(record, [size] * whole + [rest] * (rest > 0))

    return run


def _decode(prompt_len: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        record = lab.engine().score([lab.sequence(prompt_len)])[0]
        return _require_steps(record, [prompt_len] + [1] * (len(lab.token_ids) - 1 - prompt_len))

    return run


def _graphs(lab: Laboratory) -> Record:
    engine = lab.engine(enforce_eager=False)
    engine.score([lab.stranger(9, 12), lab.stranger(40, 20), lab.stranger(3, 7)])
    if not engine.engine.runner.num_replays:
        raise NotExercised("no step was a graph's replay")
    return engine.score([lab.sequence(1)])[0]


def _require_steps(record: Record, steps: list[int]) -> Record:
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
    scores = Scores.from_logits(logits, sequence.token_ids[1:], None)
    return Record(sequence.prompt, sequence.continuation, 1, _rows(scores))


def _rows(scores: Scores) -> dict[int, Scores]:
    pairs = zip(scores.target.split(1), scores.logprobs.split(1), strict=True)
    return {index: Scores(*pair) for index, pair in enumerate(pairs)}


def _two_ranks(lab: Laboratory) -> Record:
    """Run on two tensor-parallel ranks; compare logits only, because each rank holds a shard of the state."""
    sequence, rows = lab.sequence(), []
    try:
        engine = lab.sharded(2)
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
    scores = Scores.from_logits(torch.cat(rows), sequence.token_ids[1:], None)
    return Record(sequence.prompt, sequence.continuation, 1, _rows(scores))


def _portable(lab: Laboratory) -> Record:
    with portable_only():
        return lab.engine().score([lab.sequence()])[0]


def _batched_with_strangers(lab: Laboratory) -> Record:
    length = len(lab.token_ids)
    strangers = [lab.stranger(prompt, count) for prompt, count in ((1, 9), (length // 2, 4), (5, length // 3))]
    batch = [*strangers[:2], lab.sequence(length // 2), strangers[2]]
    record = lab.engine(max_num_batched_tokens=max(4, length // 3)).score(batch)[2]
    if len(record.steps) < 3:
        raise NotExercised("the other requests did not change the steps")
    return record


def _beside_another_placement(lab: Laboratory) -> Record:
    model, length = lab.model, len(lab.token_ids)
    others = [placement for placement in covering_placements(model.config) if placement != active_placement(model)]
    strangers = [
        replace(record_from_sequence(lab.stranger(5 + 3 * index, 9)), placement=other)
        for index, other in enumerate(others)
    ]
    active = active_placement(model)
    engine = lab.engine(mixed_placements=True, max_num_batched_tokens=max(4, length // 3))
    try:
        ours = replace(record_from_sequence(lab.sequence(length // 2)), placement=active)
        return engine.run([*strangers[:2], ours, *strangers[2:]])[len(strangers[:2])]
    finally:
        activate(model, active)


def _preempted(lab: Laboratory, **options: Any) -> Record:
    if not lab.has_growing_state:
        # No pool can run out, because no state grows with the sequence. Preempt the requests explicitly.
        engine = lab.engine(block_size=SMALL_BLOCK, **options)
        half = len(lab.token_ids) // 2
        return engine.run([record_from_sequence(lab.sequence(half))], preempt_after=SMALL_BLOCK)[0]
    # Three requests start in a pool with blocks for two. The youngest, which gets preempted, is the tested sequence.
    half = len(lab.token_ids) // 2
    others = [lab.stranger(half, len(lab.token_ids) - half) for _ in range(2)]
    blocks = 2 * -(-len(lab.token_ids) // SMALL_BLOCK)
    engine = lab.engine(block_size=SMALL_BLOCK, num_blocks=blocks, **options)
    record = engine.score([*others, lab.sequence(half)])[2]
    if not record.preemptions:
        raise NotExercised("nothing was preempted")
    return record


def _padded(lab: Laboratory) -> Record:
    return lab.engine(padding_rows=3).score([lab.sequence(len(lab.token_ids) // 2)])[0]


def _caching(lab: Laboratory, **options: Any) -> ForcedEngine:
    return lab.engine(enable_prefix_caching=True, snapshot_prompts="always", block_size=SMALL_BLOCK, **options)


def _shared_length(lab: Laboratory) -> int:
    """Return about half of the sequence's length, rounded down to whole blocks."""
    return len(lab.token_ids) // 2 // SMALL_BLOCK * SMALL_BLOCK


def _require_hit(record: Record, length: int) -> Record:
    if record.cached != length:
        raise NotExercised(f"{record.cached} tokens came from the prefix cache, not {length}")
    return record


def _prefix_hit(beyond: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        engine, length = _caching(lab), _shared_length(lab)
        engine.score([lab.sharing(length + beyond)])
        return _require_hit(engine.score([lab.sequence()])[0], length)

    return run


def _chunk_ends(config: ModelConfig, length: int) -> list[int]:
    """Return the last chunk end within a prefix of `length` tokens, for each chunk size of the attention layers."""
    mixers = [layer.mixer for layer in config.layers if isinstance(layer.mixer, AttentionConfig)]
    ends = {(length - 2) // mixer.chunk * mixer.chunk for mixer in mixers if mixer.chunk is not None}
    return sorted(end for end in ends if end and end % SMALL_BLOCK == 0)


def _prefix_hit_at(length: int) -> Callable[[Laboratory], Record]:
    def run(lab: Laboratory) -> Record:
        engine = _caching(lab)
        engine.score([lab.sharing(length)])
        return _require_hit(engine.score([lab.sequence()])[0], length)

    return run


def _prefix_of_a_running_request(lab: Laboratory) -> Record:
    # The first step's budget covers only the shared blocks of the first request. The tested request starts in the
    # second step, next to the first request's continuation.
    length = _shared_length(lab)
    return _require_hit(_caching(lab).score([lab.sharing(length), lab.sequence()], [length])[1], length)


def _prefix_evicted(lab: Laboratory) -> Record:
    length = len(lab.token_ids)
    options: dict[str, Any] = {"num_blocks": -(-length // SMALL_BLOCK) + 2}
    if not lab.has_growing_state:
        options["snapshot_bytes"] = lab.slot_bytes  # one snapshot: without paged state, only snapshots can be evicted
    engine = _caching(lab, max_num_seqs=1, **options)
    engine.score([lab.sequence()])
    engine.score([lab.stranger(length, 1)])
    engine.score([lab.sequence()])
    if not engine.engine.stats()["prefix_evictions"]:
        raise NotExercised("nothing was evicted")
    return _require_hit(engine.score([lab.sequence()])[0], (length - 2) // SMALL_BLOCK * SMALL_BLOCK)


def _next_turn(lab: Laboratory) -> Record:
    engine, length = _caching(lab), _shared_length(lab)
    start = length // 2
    engine.score([TokenSequence(lab.token_ids[:start], lab.token_ids[start : length + 2])])
    return _require_hit(engine.score([lab.sequence()])[0], length)


def _resumed(lab: Laboratory) -> Record:
    return _preempted(lab, enable_prefix_caching=True)
