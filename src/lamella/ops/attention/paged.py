"""Paged attention on a GPU: what an engine keeps for it, and what a step plans once for all layers of a state group."""

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

FLASHINFER_HEAD_DIMS = (64, 128, 256)  # its Hopper kernels assert that it is one of these, as they compile


class AttentionSpace:
    """Device memory for the attention of one engine's steps, made when first asked for.

    A step may be prepared while the one before it still runs, so there are two of what the host writes to.
    """

    def __init__(self, max_requests: int, max_length: int, device: torch.device) -> None:
        """For steps of so many requests, padding included, of so many tokens each."""
        self.max_requests, self.max_length, self.device = max_requests, max_length, device
        self._workspaces: dict[tuple[Any, ...], DecodeWorkspace] = {}
        self._prefills: dict[tuple[int, tuple[Any, ...]], Prefill] = {}
        self._turn = 0
        self._whole: AttentionSpace | None = None
        self._parts: list[AttentionSpace] = []

    def begin_step(self) -> None:
        """The host is about to prepare another step."""
        self._turn = 1 - self._turn
        for part in self._parts:
            part.begin_step()

    def subspace(self, index: int) -> AttentionSpace:
        """Return the space of one of a step's parts, whose layers' plans must not lie in the whole step's.

        It is the same one in each step, so that a graph finds it where it was captured.
        """
        while len(self._parts) <= index:
            self._parts.append(AttentionSpace(self.max_requests, self.max_length, self.device))
            self._parts[-1]._whole = self
        return self._parts[index]

    def decode_workspace(
        self, heads: int, kv_heads: int, head_dim: int, window: int | None, chunk: int | None = None
    ) -> DecodeWorkspace:
        """Return the memory for decodes of layers of this shape."""
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
        """FlashInfer's attention of many tokens a request, for one plan of this turn; None where it cannot serve."""
        if not _flashinfer_has(head_dim, dtype):
            return None
        from lamella.ops.attention.flashinfer import Prefill

        key = heads, kv_heads, head_dim, scale, chunk
        if (self._turn, key) not in self._prefills:
            self._prefills[self._turn, key] = Prefill(self.device)
        return self._prefills[self._turn, key]


@cache
def _flashinfer_has(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether that library is there and has kernels for these heads; says once what serves instead."""
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
    """One step's work for the layers of a state group that have equally many query heads.

    Attributes:
        decode_workspace: of a step that has decodes.
        prefill: FlashInfer's plan for the other requests, or None where our own kernel serves them.
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
        """`block_list` (N,) int32: the blocks of the requests after the decodes, one request's after the other's.

        Without `flashinfer`, our own kernel serves these requests even where that library is there.
        """
        from lamella.ops.attention import triton

        decodes = batch.num_decodes
        if decodes:
            self.decode_workspace = space.decode_workspace(heads, kv_heads, head_dim, window, chunk)
            triton.plan_decode(batch.seq_lens[:decodes], window, self.decode_workspace, chunk)
        self.prefill: Prefill | None = None
        # Beyond a window lie blocks that were given back: FlashInfer would read them, if only to weigh them by zero.
        # Chunks are requests of their own to it, where each starts with a block.
        apart = chunk is None or chunk % block_size == 0
        if decodes < batch.num_requests and window is None and apart and flashinfer:
            self.prefill = space.prefill(heads, kv_heads, head_dim, scale, dtype, chunk)
            if self.prefill is not None:
                query_lens: Sequence[int] = batch.query_lens[decodes:]
                context_lens: Sequence[int] = batch.context_lens[decodes:]
                if chunk is not None:
                    cut = pieces(query_lens, context_lens, chunk)
                    seen = torch.tensor(seen_blocks(query_lens, context_lens, chunk, block_size))
                    block_list = block_list[seen.to(block_list.device, non_blocking=True)]
                    query_lens, context_lens = [piece.new for piece in cut], [piece.length for piece in cut]
                self.prefill.plan(
                    query_lens, context_lens, block_list, heads, kv_heads, head_dim, block_size, dtype, scale
                )


def is_few_decodes(batch: RaggedBatch) -> bool:
    """Return whether `decode_prepared` is for this step: a few requests, and all decode."""
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
    """See `reference.paged_attention`."""
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
