"""Memory planning: peak memory of a step, the budget for state, and the capacities of the state pools.

State consists of blocks of each group, slots of requests, and snapshots of the prefix cache.
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

# Fraction of free memory that the pools take by default.
_MEMORY_FRACTION = {"cpu": 0.25, "cuda": 0.85}
# Capacity for the prefix cache: snapshots per request, and blocks as a multiple of what running requests can fill.
_SNAPSHOTS_PER_REQUEST = 4
_BLOCKS_FACTOR = 2
_SHORT_PROMPTS = 32  # log a warning after this many prompts that do not fill a block


@dataclass(frozen=True)
class Capacity:
    """Capacities of the state pools.

    Attributes:
        blocks: number of blocks of each group, without the dummy.
        num_slots: number of slots of requests and snapshots, without the dummy.
    """

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
        """Plan the capacities: those of the options, or as many as fit and as requests and prefix cache can use.

        Args:
            options: of the engine.
            cost: size of the state.
            max_model_len: in tokens.
            budget: bytes for state.

        Raises:
            ConfigError: not even one block fits beside the slots of `max_num_seqs` requests.
        """
        snapshots = _snapshots(options, cost, budget)
        num_slots = options.max_num_seqs + snapshots
        return cls(_blocks(options, cost, max_model_len, budget - num_slots * cost.bytes_per_request), num_slots)


def memory_budget(device: torch.device, reserved: int, group: Group, utilization: float | None = None) -> int:
    """Return the bytes for state, equal on all ranks of a group.

    Args:
        device: of the state tensors.
        reserved: bytes that a step needs besides state.
        group: the ranks.
        utilization: fraction of the whole memory that may be in use once the state is allocated; None: a fraction of
            the free memory.

    Raises:
        ConfigError: more than `utilization` is already in use.
    """
    ranks = group.partition.size if device.type == "cpu" else 1  # ranks on a CPU share its memory
    free = _free_memory(device) - reserved
    if utilization is None:
        return int(group.all_reduce_min(free) * _MEMORY_FRACTION[device.type] / ranks)
    total = _total_memory(device)
    budget = int(group.all_reduce_min(min(free, int(total * utilization) - (total - free))) / ranks)
    if budget <= 0:
        raise ConfigError(
            f"gpu_memory_utilization={utilization}: {(total - free) / total:.2f} of the memory of {device} is in use "
            "already; give a larger fraction, or num_blocks"
        )
    return budget


def longest_output(state: StateManager, options: EngineOptions, prompt: int, limit: int) -> int:
    """Return the most output tokens, in [1, limit], that fit into empty pools after `prompt` prompt tokens."""

    def is_too_long(output: int) -> bool:
        return any(blocks > capacity for blocks, capacity in _peaks(prompt + output - 1, state, options))

    return max(1, bisect.bisect_left(range(1, limit + 1), True, key=is_too_long))


def _peaks(tokens: int, state: StateManager, options: EngineOptions) -> Iterator[tuple[int, int]]:
    """Yield for each group the peak number of blocks of a request of `tokens` tokens, and the pool's capacity."""
    chunk = min(tokens, options.max_num_batched_tokens)
    for index, pool in enumerate(state.block_pools):
        yield state.peak_blocks(index, tokens, chunk), pool.capacity


def warn_if_no_prefix_can_hit(options: EngineOptions, cost: StateCost, plan: Capacity, max_model_len: int) -> None:
    """Log a warning if the settings make prefix hits impossible."""
    if not options.enable_prefix_caching:
        logger.info("prefix caching is off: every prompt is computed from its first token")
    elif options.block_size >= max_model_len:
        logger.warning(
            "prefix cache: no prompt of max_model_len=%d fills a block of block_size=%d tokens, so there are no hits; "
            "give a smaller block_size",
            max_model_len,
            options.block_size,
        )
    elif cost.slots and plan.num_slots == options.max_num_seqs:
        logger.warning(
            "prefix cache: no snapshot of %d bytes of slot state fits into its budget, so hits are possible only while "
            "some slots are unused; give a larger snapshot_bytes",
            cost.bytes_per_request,
        )


def check_pools(tokens: int, state: StateManager, options: EngineOptions) -> None:
    """Check that a request of `tokens` tokens fits into empty pools.

    Raises:
        ParameterError: a pool is too small.
    """
    for blocks, capacity in _peaks(tokens, state, options):
        if blocks > capacity:
            raise ParameterError(
                f"prompt and max_tokens need {blocks} blocks of {state.block_size} tokens, more than num_blocks="
                f"{capacity}; shorten them, or give more num_blocks"
            )


class ShortPrompts:
    """Logs one warning if all of the first prompts are too short for the prefix cache."""

    def __init__(self, options: EngineOptions) -> None:
        self._block_size = options.block_size
        self._count: int | None = 0 if options.enable_prefix_caching else None  # None: a longer prompt has been seen

    def count(self, length: int) -> None:
        """Count a prompt of `length` tokens."""
        if self._count is None:
            return
        self._count = self._count + 1 if length <= self._block_size else None
        if self._count == _SHORT_PROMPTS:
            logger.warning(
                "prefix cache: none of the first %d prompts is longer than a block, so none can hit; give a smaller "
                "block_size than %d tokens",
                _SHORT_PROMPTS,
                self._block_size,
            )


def _snapshots(options: EngineOptions, cost: StateCost, budget: int) -> int:
    """Return the number of snapshots of slot state that the prefix cache may keep."""
    if not options.enable_prefix_caching or not cost.slots:
        return 0
    if options.snapshot_bytes is not None:
        # The slot pool lists every slot, so an absurd number of snapshots would exhaust host memory.
        if options.snapshot_bytes > max(0, budget):
            raise ConfigError(
                f"snapshot_bytes={options.snapshot_bytes}: more than the {max(0, budget)} bytes available for state; "
                "give less, or leave it out"
            )
        return options.snapshot_bytes // cost.bytes_per_request
    return min(max(0, budget) // 10 // cost.bytes_per_request, _SNAPSHOTS_PER_REQUEST * options.max_num_seqs)


def _blocks(options: EngineOptions, cost: StateCost, max_model_len: int, budget: int) -> dict[PagedState, int]:
    """Return the number of blocks of each group within `budget` bytes.

    Windowed and chunked groups need few blocks and get all they can use. The other groups share the remaining memory.
    """
    seqs, size = options.max_num_seqs, options.block_size

    def most_used(spec: PagedState) -> int:
        """Return the most blocks of a group that running requests can allocate at once."""
        whole = seqs * -(-max_model_len // size)
        if spec.reach is None:
            return whole
        # See StateManager.peak_blocks. The chunks of all requests together are at most the token budget of a step.
        return min(whole, seqs * (-(-spec.reach // size) + 2) + -(-options.max_num_batched_tokens // size))

    block_bytes = {spec: spec.bytes_per_token * size * layers for spec, layers in cost.paged.items()}
    full = [spec for spec in cost.paged if spec.reach is None]
    for factor in (_BLOCKS_FACTOR, 1) if options.enable_prefix_caching else (1,):
        most = {spec: factor * most_used(spec) for spec in cost.paged}
        if options.num_blocks is not None:
            return {spec: min(options.num_blocks, count) for spec, count in most.items()}
        remaining = budget - sum(block_bytes[spec] * count for spec, count in most.items() if spec.reach is not None)
        fitting = remaining // max(1, sum(block_bytes[spec] for spec in full))
        if remaining >= 0 and (fitting >= 1 or not full):
            return {spec: count if spec.reach is not None else min(fitting, count) for spec, count in most.items()}
    raise ConfigError(
        f"max_num_seqs={seqs}: the state of so many requests does not fit into {max(0, budget) >> 20} MiB: give fewer, "
        "a smaller max_num_batched_tokens, or more memory"
    )


def _total_memory(device: torch.device) -> int:
    """Return the bytes of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    total = _meminfo("MemTotal")
    return 4 << 30 if total is None else total


def available_memory(device: torch.device) -> int | None:
    """Return the bytes that new tensors on `device` can take; None if the system does not report it."""
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
    return 4 << 30 if available is None else available  # a guess on systems without procfs; see num_blocks


def measure_steps(runs: Iterable[Callable[[], None]], dtype: torch.dtype, device: torch.device) -> int:
    """Check the kernels against their references, and measure the peak memory of steps.

    Args:
        runs: each executes a step.
        dtype: of the model.
        device: of the model.

    Returns:
        The largest peak in bytes. 0 on the CPU, where nothing is checked or run.

    Raises:
        KernelError: a kernel does not agree with its reference on this machine.
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
    """Return the peak bytes that a run allocates, beyond those allocated before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def run_largest_step(model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device) -> None:
    """Execute a step with as many tokens as the options allow, without state, to measure its memory."""
    whole, remainder = divmod(options.max_num_batched_tokens, max_model_len)
    lengths = [max_model_len] * whole + [remainder] * (remainder > 0)
    with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))):
        hidden = model(torch.zeros(sum(lengths), dtype=torch.int64, device=device))
        model.compute_logits(hidden[: options.max_num_seqs])
