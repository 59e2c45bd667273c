"""What a GPU engine does before it takes memory for state: check its kernels, and measure what a step takes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial

import torch

from lamella.config.placement import covering_placements
from lamella.engine.images.embeddings import ImageRows
from lamella.engine.options import EngineOptions
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.ragged import RaggedBatch
from lamella.ops.self_check import self_check

logger = logging.getLogger("lamella")


def warm_up(
    model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device, images: ImageRows
) -> int:
    """Bytes that the largest step takes beside weights and state; 0 on the CPU, where there is nothing to do.

    Raises `KernelError` where a kernel of ours does not work on this machine.
    """
    if device.type != "cuda":
        return 0
    start = time.perf_counter()
    self_check(model.get_parameter("model.embed_tokens.weight").dtype, device)
    checked = time.perf_counter()
    active, nbytes = model.placement, _peak_bytes(images.run_largest, device)
    for placement in covering_placements(model.config):  # whatever it is switched to later
        model.activate(placement)
        nbytes = max(nbytes, _peak_bytes(partial(_largest_step, model, options, max_model_len, device), device))
    model.activate(active)
    logger.info("kernels agree with their references (%.1f s); a step takes %d MiB", checked - start, nbytes >> 20)
    return nbytes


@torch.inference_mode()
def _peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """What it takes at most, beyond what there is before."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak


def _largest_step(model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device) -> None:
    """The one with the most tokens that there can be, without state."""
    whole, rest = divmod(options.max_num_batched_tokens, max_model_len)
    lengths = [max_model_len] * whole + [rest] * (rest > 0)
    with forward_batch(ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))):
        hidden = model(torch.zeros(sum(lengths), dtype=torch.int64, device=device))
        model.compute_logits(hidden[: options.max_num_seqs])
