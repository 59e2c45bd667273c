"""Metadata of a vLLM step, and its conversion to lamella's `ForwardBatch`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadata

from lamella.layers.context import ForwardBatch
from lamella.ops.ragged import RaggedBatch


@dataclass
class StateMetadata(AttentionMetadata):
    """Tensors of vLLM's model runner that describe a step, and the `ForwardBatch` built from them.

    The first layer of a step builds the batch. If the step is captured in a CUDA graph, each replay rebuilds it on the
    device, without work on the host.

    Attributes:
        block_table: (R, blocks), blocks of each request's state. The current block is in the first column or, with
            `tokens_per_block`, in the column of the last token.
        query_start_loc: (R + 1,) on the device; may be longer.
        seq_lens: (R,) on the device, new tokens included; may be longer.
        index: 0, 1, 2, ... for as many tokens as a step may have.
        num_tokens: new tokens of all requests.
        num_decodes: number of requests with one new token, or with accepted drafts. These requests come first.
        query_lens: (R,) on the host if any request is not a decode; empty otherwise.
        tokens_per_block: tokens per block of the prefix cache; None without prefix caching.
        num_accepted_tokens: (R,) accepted tokens of the decodes; None without speculation.
        spare_rows: extra rows of a slot for draft tokens.
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    index: Tensor
    num_tokens: int
    num_decodes: int
    query_lens: tuple[int, ...] = ()
    tokens_per_block: int | None = None
    num_accepted_tokens: Tensor | None = None
    spare_rows: int = 0
    _batch: ForwardBatch | None = None

    def batch(self) -> ForwardBatch:
        """Return the batch. Building it reads no tensor on the host, so a CUDA graph can capture it."""
        if self._batch is None:
            self._batch = self._make_batch()
        return self._batch

    def _make_batch(self) -> ForwardBatch:
        requests, tokens = self.block_table.shape[0], self.num_tokens
        is_one_token_each = not self.query_lens and not self.spare_rows
        if is_one_token_each:
            requests = min(requests, tokens)  # padding requests of a step of decodes may have no token
        lengths, index = self.seq_lens[:requests], self.index[:tokens]
        if is_one_token_each:
            positions, token_request = lengths - 1, index
            starts = self.index[: tokens + 1].int()
        else:
            starts = self.query_start_loc[: requests + 1]
            token_request = torch.searchsorted(starts[1:], index, right=True).clamp(max=requests - 1)
            positions = (lengths - starts[1:])[token_request] + index
        ragged = RaggedBatch(
            positions=positions.long(),
            query_start_loc=starts,
            seq_lens=lengths,
            token_request=token_request,
            query_lens=self.query_lens,
            context_lens=(),
            num_decodes=0 if self.spare_rows else min(self.num_decodes, requests),
        )
        return ForwardBatch(ragged, slots=self._slots(requests, lengths))

    def _slots(self, requests: int, lengths: Tensor) -> Tensor:
        table = self.block_table[:requests]
        if self.tokens_per_block is not None:
            column = (lengths - 1).clamp(min=0) // self.tokens_per_block  # padding requests have length 0
            table = table.gather(1, column[:, None].long())
        return table[:, 0].long()

    def skipped_and_first(self, query_start_loc: Tensor) -> tuple[Tensor, Tensor]:
        """Return two numbers per request for steps with speculation, (R,) each.

        Returns:
            The number of rows of the slot before the window (accepted tokens minus one), and the index in
            [window | new inputs] of the slot's first row after the step.
        """
        lengths = query_start_loc.diff()
        skipped, first = torch.zeros_like(lengths), lengths.clone()
        if self.num_decodes:
            assert self.num_accepted_tokens is not None
            skipped[: self.num_decodes] = self.num_accepted_tokens[: self.num_decodes] - 1
            first[: self.num_decodes] = 1
        return skipped.clamp(min=0), first
