"""Norm, canon, rotation and cache write of queries, keys and values, by the operations' own references."""

from __future__ import annotations

import torch
from torch import Tensor

from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm.reference import rms_norm
from lamella.ops.rotary.reference import rotate
from lamella.ops.short_conv.reference import ConvStep, short_conv


def prepare_qkv(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    q_scale: Tensor | None = None,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    rows: Tensor | None = None,
    canon: ConvStep | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The projected [q | k | v] made ready for attention: (q (T, H, D), k, v).

    In this order: RMS norm of each head of q and of k with the weights q_norm and k_norm (D,) fp32; the convolution
    `canon` of [q | k | v], for one new token a request at `positions` (T,) int64; rotation of q and k by cos and sin
    (T, P) fp32, see ops/rotary; q times q_scale (T,) fp32, a factor for each token; k and v written to the flat rows
    `rows` (T,) int64 of the caches (pages, page_size, KV, D), in place. Each step is left out where its tensors are
    None, and rounds to the dtype of qkv (T, (H + 2 KV) D). k and v are returned, each (T, KV, D), only without caches.
    """
    tokens, heads = qkv.shape[0], (num_heads, num_kv_heads, num_kv_heads)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in qkv.split([count * head_dim for count in heads], dim=-1))
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    k = k if k_norm is None else rms_norm(k, k_norm, eps)
    if canon is not None:
        assert positions is not None
        index = torch.arange(tokens + 1, device=qkv.device)
        batch = RaggedBatch(
            positions=positions,
            query_start_loc=index.int(),
            seq_lens=(positions + 1).int(),
            token_request=index[:-1],
            query_lens=(1,) * tokens,
            context_lens=(),  # unknown to the host, and not needed
            num_decodes=tokens,
        )
        weight, bias, history, slots, activation, residual = canon
        joined = torch.cat((q, k, v), dim=1).flatten(1)
        joined = short_conv(joined, weight, bias, batch, history, slots, activation=activation, residual=residual)
        q, k, v = joined.unflatten(-1, (-1, head_dim)).split(heads, dim=1)
    if cos is not None:
        assert sin is not None
        q, k = rotate(q, cos, sin, interleaved), rotate(k, cos, sin, interleaved)
    if q_scale is not None:
        q = (q.float() * q_scale[:, None, None]).to(q.dtype)
    if k_cache is None:
        return q.contiguous(), k.contiguous(), v.contiguous()
    assert v_cache is not None and rows is not None
    k_cache.flatten(0, 1)[rows] = k
    v_cache.flatten(0, 1)[rows] = v
    return q.contiguous(), None, None
