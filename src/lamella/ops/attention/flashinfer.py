"""Prefill attention through FlashInfer, which plans a step on the host and has kernels for each GPU generation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import flashinfer
import torch
from torch import Tensor

WORKSPACE_BYTES = 256 << 20


class Prefill:
    """One planned prefill step. Plan the next step only after this one has run on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        memory = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(memory, "NHD")

    def plan(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        block_list: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        scale: float,
    ) -> None:
        """Plan a step.

        Args:
            query_lens: new tokens of each request.
            context_lens: tokens of each request, including the new ones.
            block_list: (N,) int32 on the device, concatenated block ids of the requests.
            heads: query heads.
            kv_heads: key/value heads.
            head_dim: channels of a head.
            block_size: tokens per block.
            dtype: dtype of queries, keys and values.
            scale: factor of the scores.
        """

        def host(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32)

        blocks = [-(-length // block_size) for length in context_lens]
        self._wrapper.plan(
            host([0, *accumulate(query_lens)]),
            host([0, *accumulate(blocks)]),
            block_list,
            host([(length - 1) % block_size + 1 for length in context_lens]),
            heads,
            kv_heads,
            head_dim,
            block_size,
            causal=True,
            sm_scale=scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    def run(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> None:
        """Write the attention of q (T, H, D) over the caches (blocks, block_size, KV, D) to out (T, H, D)."""
        self._wrapper.run(q, (k_cache, v_cache), out=out)
