"""What lies between the fused query/key/value projection and attention: norm, canon, rotation, cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lamella.ops.backend import use_triton
from lamella.ops.qkv import reference


def prepare_qkv(
    qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int, **options: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `reference.prepare_qkv`."""
    if use_triton(qkv):
        from lamella.ops.qkv import triton

        return triton.prepare_qkv(qkv, num_heads, num_kv_heads, head_dim, **options)
    return reference.prepare_qkv(qkv, num_heads, num_kv_heads, head_dim, **options)
