"""Causal attention: over the tokens of a step, or over a paged KV cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lamella.ops import native
from lamella.ops.attention import paged, reference, sdpa
from lamella.ops.attention.paged import AttentionPlan
from lamella.ops.backend import BackendTable
from lamella.ops.operands import PagedCache, QKVSteps
from lamella.ops.ragged import RaggedBatch

_causal = BackendTable("causal_attention", __name__)
_write = BackendTable("write_kv", __name__)
_paged = BackendTable("paged_attention", __name__)
_prepared = BackendTable("decode_prepared", __name__)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
) -> Tensor:
    """Compute the attention of every request over its own new tokens; see `reference.causal_attention`.

    Args:
        q: (T, H, D).
        k: (T, KV, D), H a multiple of KV.
        v: (T, KV, D).
        batch: lengths of the requests.
        scale: factor of the scores.
        window: number of latest keys that a query sees, including its own; None for all.
        chunk: a query sees the keys from the last multiple of this number up to its own position; None for all.

    Returns:
        (T, H, D) in the dtype of q.
    """
    return _causal.choose(q)(q, k, v, batch, scale, window, chunk)


def write_kv(k: Tensor, v: Tensor, cache: PagedCache) -> None:
    """Write keys and values to the cache, in place.

    Args:
        k: (T, KV, D).
        v: (T, KV, D).
        cache: is written at the rows `cache.slot_mapping`.
    """
    _write.choose(k)(k, v, cache)


def paged_attention(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Compute the attention of new tokens over each request's whole context; see `reference.paged_attention`.

    Args:
        q: (T, H, D).
        cache: keys and values, including those of the new tokens.
        batch: lengths of the requests.
        scale: factor of the scores.
        window: as for `causal_attention`.
        chunk: as for `causal_attention`.
        plan: plan of the step if the engine has an `AttentionSpace`, otherwise None.

    Returns:
        (T, H, D) in the dtype of q.
    """
    return _paged.choose(q, plan)(q, cache, batch, scale, window, chunk, plan)


def decode_prepared(
    qkv: Tensor, steps: QKVSteps, cache: PagedCache, batch: RaggedBatch, scale: float, window: int | None,
    chunk: int | None, plan: AttentionPlan,
) -> Tensor:  # fmt: skip
    """Compute `prepare_qkv` and `paged_attention` for a few decoding requests, in one kernel on a GPU.

    Args:
        qkv: (R, (H + 2 * KV) * D), one new token of each request.
        steps: as for `prepare_qkv`.
        cache: is written and read.
        batch: lengths of the requests; `paged.is_few_decodes` must be True.
        scale: factor of the scores.
        window: as for `causal_attention`.
        chunk: as for `causal_attention`.
        plan: plan of the step.

    Returns:
        (R, H, D) in the dtype of qkv.
    """
    return _prepared.choose(qkv)(qkv, steps, cache, batch, scale, window, chunk, plan)


@_causal.lazy("triton")
def _triton_causal() -> Callable[..., Tensor]:
    from lamella.ops.attention import triton_prefill

    def causal_attention(
        q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, scale: float, window: int | None, chunk: int | None = None
    ) -> Tensor:
        longest = max(batch.query_lens)
        return triton_prefill.causal_attention(q, k, v, batch.query_start_loc, longest, scale, window, chunk)

    return causal_attention


@_write.backend("native")
def _native_write(k: Tensor, v: Tensor, cache: PagedCache) -> None:
    native.write_kv(k, v, cache.k, cache.v, cache.slot_mapping)


@_paged.backend("triton", lambda q, plan: plan is not None)
def _triton_paged(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    assert plan is not None
    return paged.paged_attention(q, cache, batch, scale, window, chunk, plan)


@_paged.backend("native")
def _native_paged(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None = None,
    plan: AttentionPlan | None = None,
) -> Tensor:
    decodes = batch.num_decodes
    outputs = []
    if decodes:
        table, lengths = cache.block_table[:decodes], batch.seq_lens[:decodes]
        outputs.append(native.decode_attention(q[:decodes], cache.k, cache.v, table, lengths, scale, window, chunk))
    outputs += sdpa.prefill_attention(q, cache, batch, scale, window, chunk)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@_prepared.lazy("triton")
def _triton_prepared() -> Callable[..., Tensor]:
    from lamella.ops.attention import triton_decode_few

    def decode_prepared(
        qkv: Tensor, steps: QKVSteps, cache: PagedCache, batch: RaggedBatch, scale: float, window: int | None,
        chunk: int | None, plan: AttentionPlan,
    ) -> Tensor:  # fmt: skip
        return triton_decode_few.decode_prepared(qkv, steps, cache, scale, window, plan.decode_workspace)

    return decode_prepared


_causal.backend("torch")(sdpa.causal_attention)
_causal.backend("reference")(reference.causal_attention)
_write.backend("reference")(reference.write_kv)
_paged.backend("torch")(sdpa.paged_attention)
_paged.backend("reference")(reference.paged_attention)
_paged.backend("flashinfer", within="triton")(_triton_paged)
_prepared.backend("reference")(reference.decode_prepared)
