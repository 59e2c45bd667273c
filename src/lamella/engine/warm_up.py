"""What a GPU engine does before its first request: measure the memory of a step, compile, check."""

from __future__ import annotations

import logging

import torch

from lamella.engine.options import EngineOptions
from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.ragged import RaggedBatch

logger = logging.getLogger("lamella")


@torch.inference_mode()
def activation_bytes(model: LanguageModel, options: EngineOptions, max_model_len: int, device: torch.device) -> int:
    """The memory that the largest step takes beside weights and state, measured by running one; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    whole, rest = divmod(options.max_num_batched_tokens, max_model_len)
    lengths = [max_model_len] * whole + [rest] * (rest > 0)
    batch = ForwardBatch(RaggedBatch.from_lengths(lengths, lengths, device))
    with forward_batch(batch):
        hidden = model(torch.zeros(sum(lengths), dtype=torch.int64, device=device))
        model.compute_logits(hidden[: options.max_num_seqs])
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    logger.info("a step of %d tokens takes %d MiB", sum(lengths), peak >> 20)
    return peak
