"""Norm, canon, rotation and cache write of queries, keys and values, composed of the ops' references."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.operands import ConvStep, PagedCache, QKVSteps
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import rms_norm
from lamella.ops.rotary.reference import rotate_heads
from lamella.ops.short_conv.reference import short_conv


def prepare_qkv(
    qkv: Tensor, steps: QKVSteps, cache: PagedCache | None = None, canon: ConvStep | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Prepare the projected [q | k | v] for attention.

    In this order: RMS norm of each head of q and k; the convolution `canon` of [q | k | v], for one new token per
    request; rotation of q and k; multiplication of q by `steps.q_scale`; write of k and v to the rows
    `cache.slot_mapping` of the cache. An operation is skipped if its argument is None, and rounds to the dtype of qkv.

    Returns:
        q (T, H, D), k and v (T, KV, D); k and v are None if `cache` is given.
    """
    (num_heads, num_kv_heads, head_dim), norms, rope, q_scale = steps
    heads = num_heads, num_kv_heads, num_kv_heads
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split([count * head_dim for count in heads], dim=-1))
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    if canon is not None:
        batch = RaggedBatch.from_decodes(canon.positions)
        joined = short_conv(torch.cat((q, k, v), dim=1).flatten(1), canon.weights, batch, canon.state)
        q, k, v = joined.unflatten(-1, (-1, head_dim)).split(heads, dim=1)
    if rope is not None:
        q, k = rotate_heads(q, k, rope)
    if q_scale is not None:
        q = (q.float() * q_scale[:, None, None]).to(q.dtype)
    if cache is None:
        return q.contiguous(), k.contiguous(), v.contiguous()
    cache.k.flatten(0, 1)[cache.slot_mapping] = k
    cache.v.flatten(0, 1)[cache.slot_mapping] = v
    return q.contiguous(), None, None
