"""Causal attention: over the tokens at hand, or over paged keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.attention import paged, sdpa
from lamella.ops.attention.paged import AttentionPlan, decode_prepared
from lamella.ops.backend import use_native, use_triton
from lamella.ops.ragged import RaggedBatch

__all__ = ["causal_attention", "decode_prepared", "paged_attention", "write_kv"]


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
) -> Tensor:
    """See `reference.causal_attention`."""
    if use_triton(q):
        from lamella.ops.attention import triton_prefill

        longest = max(batch.query_lens)
        return triton_prefill.causal_attention(q, k, v, batch.query_start_loc, longest, scale, window, chunk)
    return sdpa.causal_attention(q, k, v, batch, scale, window, chunk)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, rows: Tensor) -> None:
    """Put k and v (T, KV, D) into the flat cache rows (T,) int64 = page * page_size + offset, in place."""
    if use_native(k):
        native.write_kv(k, v, k_cache, v_cache, rows)
        return
    k_cache.flatten(0, 1).index_copy_(0, rows, k)
    v_cache.flatten(0, 1).index_copy_(0, rows, v)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    plan: AttentionPlan | None = None,
    chunk: int | None = None,
) -> Tensor:
    """See `reference.paged_attention`; `plan` is the step's, where the engine has an `AttentionSpace`."""
    if plan is not None and use_triton(q):
        return paged.paged_attention(q, k_cache, v_cache, page_table, batch, scale, window, plan, chunk)
    if not use_native(q):
        return sdpa.paged_attention(q, k_cache, v_cache, page_table, batch, scale, window, chunk)
    decodes = batch.num_decodes
    outputs = []
    if decodes:
        outputs.append(
            native.decode_attention(
                q[:decodes], k_cache, v_cache, page_table[:decodes], batch.seq_lens[:decodes], scale, window, chunk
            )
        )
    outputs += sdpa.prefill_attention(q, k_cache, v_cache, page_table, batch, scale, window, chunk)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
