"""Memory of an engine: what a step takes, and how much is left for state.

State is blocks of each group, slots of requests, and snapshots of the prefix cache.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from lamella.engine.options import EngineOptions
from lamella.errors import ConfigError, ParameterError
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.ragged import RaggedBatch
from lamella.ops.self_check import self_check
from lamella.parallel.group import Group
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost
from lamella.state.spec import PagedState

logger = logging.getLogger("lamella")

# Of the memory that is free when the pools are made.
_MEMORY_SHARE = {"cpu": 0.25, "cuda": 0.85}
# Room for the prefix cache beyond what running requests can fill: snapshots a request, and blocks in all.
_SNAPSHOTS_PER_REQUEST = 4
_BLOCKS_TO_KEEP = 2
# So many prompts, none of which fills a block, are worth a warning.
_SHORT_PROMPTS = 32


@dataclass(frozen=True)
class Capacity:
    """Blocks of each group, and slots: those of requests and of snapshots."""

    blocks: Mapping[PagedState, int]
    num_slots: int

    @classmethod
    def plan(
        cls,
        options: EngineOptions,
        cost: StateCost,
        max_model_len: int,
        budget: int,
    ) -> Capacity:
        """As asked, or as much as `budget` bytes hold and requests and cache could fill.

        Raises `ConfigError` where not even one block fits beside the requests' slots.
        """
        snapshots = _snapshots(options, cost, budget)
        num_slots = options.max_num_seqs + snapshots
        return cls(_blocks(options, cost, max_model_len, budget - num_slots * cost.bytes_per_request), num_slots)


def memory_budget(device: torch.device, reserved: int, group: Group, utilization: float | None = None) -> int:
    """Return the bytes for state, the same on all ranks of a group.

    Args:
        device: where the state is kept.
        reserved: bytes that are left to whatever else a step needs.
        group: the ranks.
        utilization: fraction of the whole memory that may be in use when the state is there; None takes a share of the
            free memory.

    Raises:
        ConfigError: more than `utilization` is in use already.
    """
    ranks = group.partition.size if device.type == "cpu" else 1  # which have one memory
    free = _free_memory(device) - reserved
    if utilization is None:
        return int(group.all_reduce_min(free) * _MEMORY_SHARE[device.type] / ranks)
    total = _total_memory(device)
    budget = int(group.all_reduce_min(min(free, int(total * utilization) - (total - free))) / ranks)
    if budget <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={utilization}: {(total - free) / total:.2f} of the memory of {device} is in use "
            "already: raise it, or give num_blocks"
        )
    return budget


def longest_answer(state: StateManager, options: EngineOptions, prompt: int, most: int) -> int:
    """Return the most tokens of an answer, from 1 up to `most`, for which the pools have room behind a prompt."""

    def is_too_long(answer: int) -> bool:
        return any(blocks > capacity for blocks, capacity in _peaks(prompt + answer - 1, state, options))

    return max(1, bisect.bisect_left(range(1, most + 1), True, key=is_too_long))


def _peaks(tokens: int, state: StateManager, options: EngineOptions) -> Iterator[tuple[int, int]]:
    """Yield for each group the most blocks that a request of `tokens` tokens holds at once, and how many there are."""
    chunk = min(tokens, options.max_num_batched_tokens)
    for index, pool in enumerate(state.block_pools):
        yield state.peak_blocks(index, tokens, chunk), pool.capacity


def warn_if_no_prefix_can_hit(options: EngineOptions, cost: StateCost, plan: Capacity, max_model_len: int) -> None:
    """Log a warning if the settings make prefix hits impossible."""
    if not options.enable_prefix_caching:
        logger.info("prefix caching is off: every prompt is computed whole")
    elif options.block_size >= max_model_len:
        logger.warning(
            "prefix cache: no prompt of max_model_len=%d fills a block of block_size=%d tokens: nothing can hit",
            max_model_len,
            options.block_size,
        )
    elif cost.slots and plan.num_slots == options.max_num_seqs:
        logger.warning(
            "prefix cache: no snapshot of the %d bytes of slot state fits its budget, so that hits are only "
            "possible while requests leave slots unused; see snapshot_bytes",
            cost.bytes_per_request,
        )


def check_pools(tokens: int, state: StateManager, options: EngineOptions) -> None:
    """Raises `ParameterError` where a request of `tokens` tokens does not fit into the empty pools of a state."""
    for blocks, capacity in _peaks(tokens, state, options):
        if blocks > capacity:
            raise ParameterError(
                f"prompt and max_tokens need {blocks} blocks of {state.block_size} tokens, and num_blocks="
                f"{capacity} is all there are"
            )


class ShortPrompts:
    """Says once in the log if the first prompts are all too short for the prefix cache."""

    def __init__(self, options: EngineOptions) -> None:
        self._block_size = options.block_size
        self._so_far: int | None = 0 if options.enable_prefix_caching else None  # None: no longer of interest

    def count(self, length: int) -> None:
        """Take note of a prompt of `length` tokens."""
        if self._so_far is None:
            return
        self._so_far = self._so_far + 1 if length <= self._block_size else None
        if self._so_far == _SHORT_PROMPTS:
            logger.warning(
                "prefix cache: the first %d prompts are no longer than a block, so that none of them can "
                "hit; block_size=%d is the block's size in tokens",
                _SHORT_PROMPTS,
                self._block_size,
            )


def _snapshots(options: EngineOptions, cost: StateCost, budget: int) -> int:
    """How many copies of slot state the prefix cache may keep."""
    if not options.enable_prefix_caching or not cost.slots:
        return 0
    if options.snapshot_bytes is not None:
        # Each snapshot is a slot of the pools: more than memory holds cannot be given numbers, either.
        if options.snapshot_bytes > max(0, budget):
            raise ConfigError(
                f"snapshot_bytes={options.snapshot_bytes}: more than the {max(0, budget)} bytes that there are for "
                "state; give less, or leave it out"
            )
        return options.snapshot_bytes // cost.bytes_per_request
    return min(max(0, budget) // 10 // cost.bytes_per_request, _SNAPSHOTS_PER_REQUEST * options.max_num_seqs)


def _blocks(options: EngineOptions, cost: StateCost, max_model_len: int, budget: int) -> dict[PagedState, int]:
    """Blocks of each group within `budget` bytes; windowed and chunked groups, which need few, come first."""
    seqs, size = options.max_num_seqs, options.block_size

    def useful(spec: PagedState) -> int:
        """More blocks than this can never be held at once."""
        whole = seqs * -(-max_model_len // size)
        if spec.reach is None:
            return whole
        # See StateManager.peak_blocks; the chunks of all requests together are one step's tokens.
        return min(whole, seqs * (-(-spec.reach // size) + 2) + -(-options.max_num_batched_tokens // size))

    block = {spec: spec.bytes_per_token * size * layers for spec, layers in cost.paged.items()}
    full = [spec for spec in cost.paged if spec.reach is None]
    for keep in (_BLOCKS_TO_KEEP, 1) if options.enable_prefix_caching else (1,):
        most = {spec: keep * useful(spec) for spec in cost.paged}
        if options.num_blocks is not None:
            return {spec: min(options.num_blocks, count) for spec, count in most.items()}
        rest = budget - sum(block[spec] * count for spec, count in most.items() if spec.reach is not None)
        share = rest // max(1, sum(block[spec] for spec in full))
        if rest >= 0 and (share >= 1 or not full):
            return {spec: count if spec.reach is not None else min(share, count) for spec, count in most.items()}
    raise ConfigError(
        f"max_num_seqs={seqs}: the state of so many requests does not fit into {max(0, budget) >> 20} MiB: give fewer, "
        "a smaller max_num_batched_tokens, or more memory"
    )


def _total_memory(device: torch.device) -> int:
    """Bytes that the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = _meminfo("MemTotal")
    return 4 << 30 if total is None else total


def available_memory(device: torch.device) -> int | None:
    """Bytes that new tensors on `device` can take; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _meminfo("MemAvailable")


def _meminfo(field: str) -> int | None:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields[field].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def _free_memory(device: torch.device) -> int:
    available = available_memory(device)
    return 4 << 30 if available is None else available  # systems without procfs; num_blocks says better


def measure_steps(runs: Iterable[Callable[[], None]], dtype: torch.dtype, device: torch.device) -> int:
    """Check the kernels, and return the most bytes that any of the `runs` takes; 0 on the CPU, where none is run.

    Raises:
        KernelError: a kernel of ours does not work on this machine.
    """
    if device.type != "cuda":
        return 0
    start = time.perf_counter()
    self_check(dtype, device)
    checked = time.perf_counter()
    nbytes = max(_peak_bytes(run, device) for run in runs)
    logger.info("kernels agree with their references (%.1f s); a step takes %d MiB", checked - start, nbytes >> 20)
    return nbytes


@torch.inference_mode()
def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Return the most memory that a run allocates beyond what is allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def run_largest_step(model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device) -> None:
    """Compute a step with as many tokens as the options allow, without state."""
    whole, rest = divmod(options.max_num_batched_tokens, max_model_len)
    lengths = [max_model_len] * whole + [rest] * (rest > 0)
    with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))):
        hidden = model(torch.zeros(sum(lengths), dtype=torch.int64, device=device))
        model.compute_logits(hidden[: options.max_num_seqs])
