"""Paged attention on a GPU: workspaces of an engine, and the plan of a step, shared by layers of a state group."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lamella.ops.attention.chunks import pieces, seen_blocks
from lamella.ops.operands import PagedCache
from lamella.ops.ragged import RaggedBatch

if TYPE_CHECKING:
    from lamella.ops.attention.flashinfer import Prefill
    from lamella.ops.attention.triton import DecodeWorkspace

logger = logging.getLogger("lamella")

FLASHINFER_HEAD_DIMS = (64, 128, 256)  # FlashInfer's Hopper kernels fail to compile for others


class AttentionSpace:
    """Device memory for the attention of one engine, allocated on first use.

    A step may be prepared while the previous step still runs, so buffers that the host writes to exist twice.
    """

    def __init__(self, max_requests: int, max_length: int, device: torch.device) -> None:
        """Set the limits.

        Args:
            max_requests: maximum requests per step, including padding.
            max_length: maximum tokens per request.
            device: device of the memory.
        """
        self.max_requests, self.max_length, self.device = max_requests, max_length, device
        self._workspaces: dict[tuple[Any, ...], DecodeWorkspace] = {}
        self._prefills: dict[tuple[int, tuple[Any, ...]], Prefill] = {}
        self._buffer = 0
        self._whole: AttentionSpace | None = None
        self._subspaces: list[AttentionSpace] = []

    def begin_step(self) -> None:
        """Switch to the other set of buffers, before the host prepares the next step."""
        self._buffer = 1 - self._buffer
        for subspace in self._subspaces:
            subspace.begin_step()

    def subspace(self, index: int) -> AttentionSpace:
        """Return a separate space for one mixer batch of a step, whose plans must not overwrite those of others.

        The space of an index is the same in every step, so that CUDA graphs find it at a fixed address.
        """
        while len(self._subspaces) <= index:
            self._subspaces.append(AttentionSpace(self.max_requests, self.max_length, self.device))
            self._subspaces[-1]._whole = self
        return self._subspaces[index]

    def decode_workspace(
        self, heads: int, kv_heads: int, head_dim: int, window: int | None, chunk: int | None = None
    ) -> DecodeWorkspace:
        """Return the workspace for decodes of layers with this shape."""
        from lamella.ops.attention import triton

        key = heads, kv_heads, head_dim, window, chunk
        if key not in self._workspaces and self._whole is not None:
            self._workspaces[key] = self._whole.decode_workspace(*key).for_another_plan()
        elif key not in self._workspaces:
            length = min(self.max_length, window or self.max_length, chunk or self.max_length)
            self._workspaces[key] = triton.DecodeWorkspace(
                self.max_requests,
                triton.max_items(self.max_requests, length),
                heads,
                kv_heads,
                head_dim,
                self.device,
            )
        return self._workspaces[key]

    def prefill(
        self, heads: int, kv_heads: int, head_dim: int, scale: float, dtype: torch.dtype, chunk: int | None = None
    ) -> Prefill | None:
        """Return FlashInfer's prefill attention for this step's buffers; None if FlashInfer cannot compute it."""
        if not _flashinfer_supports(head_dim, dtype):
            return None
        from lamella.ops.attention.flashinfer import Prefill

        key = heads, kv_heads, head_dim, scale, chunk
        if (self._buffer, key) not in self._prefills:
            self._prefills[self._buffer, key] = Prefill(self.device)
        return self._prefills[self._buffer, key]


@cache
def _flashinfer_supports(head_dim: int, dtype: torch.dtype) -> bool:
    """Return True if FlashInfer is installed and has kernels for these heads; log once which kernel is used."""
    if head_dim not in FLASHINFER_HEAD_DIMS or dtype == torch.float32:
        logger.info("attention of prompts by our Triton kernel: no FlashInfer for head_dim %d in %s", head_dim, dtype)
        return False
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        logger.info("attention of prompts by our Triton kernel: flashinfer cannot be imported (%s)", error)
        return False
    logger.info("attention of prompts by FlashInfer")
    return True


class AttentionPlan:
    """Plan of one step for the layers of a state group with the same number of query heads.

    Attributes:
        decode_workspace: workspace of the decodes; set only if the step has decodes.
        prefill: FlashInfer's plan for the other requests; None if lamella's kernel computes them.
    """

    decode_workspace: DecodeWorkspace

    def __init__(
        self,
        space: AttentionSpace,
        batch: RaggedBatch,
        block_list: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        scale: float,
        window: int | None,
        flashinfer: bool = True,
        chunk: int | None = None,
    ) -> None:
        """Plan a step.

        Args:
            space: workspaces of the engine.
            batch: lengths of the requests.
            block_list: (N,) int32, concatenated block ids of the requests after the decodes.
            heads: query heads.
            kv_heads: key/value heads.
            head_dim: channels of a head.
            block_size: tokens per block.
            dtype: dtype of queries, keys and values.
            scale: factor of the scores.
            window: see `causal_attention`.
            flashinfer: whether FlashInfer may be used.
            chunk: see `causal_attention`.
        """
        from lamella.ops.attention import triton

        decodes = batch.num_decodes
        if decodes:
            self.decode_workspace = space.decode_workspace(heads, kv_heads, head_dim, window, chunk)
            triton.plan_decode(batch.seq_lens[:decodes], window, self.decode_workspace, chunk)
        self.prefill: Prefill | None = None
        # Blocks outside a window may have been freed. FlashInfer would read them, although with weight zero. Chunks are
        # separate requests for FlashInfer, which requires that each starts at a block boundary.
        is_aligned = chunk is None or chunk % block_size == 0
        if decodes < batch.num_requests and window is None and is_aligned and flashinfer:
            self.prefill = space.prefill(heads, kv_heads, head_dim, scale, dtype, chunk)
            if self.prefill is not None:
                query_lens: Sequence[int] = batch.query_lens[decodes:]
                context_lens: Sequence[int] = batch.context_lens[decodes:]
                if chunk is not None:
                    segments = pieces(query_lens, context_lens, chunk)
                    seen = torch.tensor(seen_blocks(query_lens, context_lens, chunk, block_size))
                    block_list = block_list[seen.to(block_list.device, non_blocking=True)]
                    query_lens, context_lens = [piece.new for piece in segments], [piece.length for piece in segments]
                self.prefill.plan(
                    query_lens, context_lens, block_list, heads, kv_heads, head_dim, block_size, dtype, scale
                )


def is_few_decodes(batch: RaggedBatch) -> bool:
    """Return True if `decode_prepared` supports this step: few requests, and all of them decode."""
    from lamella.ops.attention import triton

    return batch.num_requests <= triton.FEW_REQUESTS and batch.num_decodes == batch.num_requests


def paged_attention(
    q: Tensor,
    cache: PagedCache,
    batch: RaggedBatch,
    scale: float,
    window: int | None,
    chunk: int | None,
    plan: AttentionPlan,
) -> Tensor:
    """Compute paged attention by Triton kernels and FlashInfer; see `reference.paged_attention`."""
    from lamella.ops.attention import triton, triton_prefill

    decodes = batch.num_decodes
    k_cache, v_cache, block_table, _ = cache
    if decodes == batch.num_requests:
        return triton.decode_attention(q, k_cache, v_cache, block_table, scale, plan.decode_workspace)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if decodes:
        triton.decode_attention(
            q[:decodes], k_cache, v_cache, block_table[:decodes], scale, plan.decode_workspace, out=out[:decodes]
        )
    if plan.prefill is not None:
        plan.prefill.run(q[decodes:], k_cache, v_cache, out[decodes:])
        return out
    return triton_prefill.prefill_attention(
        q,
        k_cache,
        v_cache,
        block_table[decodes:],
        batch.query_start_loc[decodes:],
        batch.seq_lens[decodes:],
        max(batch.query_lens[decodes:]),
        scale,
        window,
        chunk,
        out=out,
    )
