"""Metadata builder and backend of the state layers, which vLLM calls in each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)

from lamella.vllm_plugin import compat
from lamella.vllm_plugin.state.metadata import StateMetadata


class StateMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Build the metadata of a step from views of the runner's tensors, which have fixed addresses for CUDA graphs.

    vLLM's own builder splits and copies these tensors on the host in each step. With speculation, vLLM's builder still
    runs to determine which requests have drafts.
    """

    supports_update_block_table = False  # the metadata caches a batch made of the block table
    needs_causal_conv1d_metadata = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        """Allocate the index tensor; arguments as in vLLM's builder."""
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        most = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 1
        self._index = torch.arange(most, device=device)
        self._spare_rows = compat.num_speculative_tokens(vllm_config)
        aligned = vllm_config.cache_config.mamba_cache_mode == "align"
        self._tokens_per_block = kv_cache_spec.block_size if aligned else None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **options: Any,
    ) -> StateMetadata:
        """Return the metadata of a step; arguments as in vLLM's builder."""
        step, requests = common_attn_metadata, common_attn_metadata.num_reqs
        lengths: tuple[int, ...] = ()
        if step.max_query_len > 1 or self._spare_rows:
            lengths = tuple(step.query_start_loc_cpu[: requests + 1].diff().tolist())
        table, tokens_per_block, accepted = step.block_table_tensor[:requests], self._tokens_per_block, None
        decodes = next((request for request, length in enumerate(lengths) if length != 1), requests)
        if self._spare_rows:
            vllm_metadata = super().build(common_prefix_len, step, fast_build, **options)
            table, tokens_per_block = _first_blocks(vllm_metadata), None
            decodes, accepted = vllm_metadata.num_decodes, vllm_metadata.num_accepted_tokens
            lengths = lengths if vllm_metadata.num_prefills else ()
        return StateMetadata(
            block_table=table,
            query_start_loc=step.query_start_loc,
            seq_lens=step.seq_lens,
            index=self._index,
            num_tokens=step.num_actual_tokens,
            num_decodes=decodes,
            query_lens=lengths,
            tokens_per_block=tokens_per_block,
            num_accepted_tokens=accepted,
            spare_rows=self._spare_rows,
        )


def _first_blocks(vllm_metadata: ShortConvAttentionMetadata) -> Tensor:
    """Return the first block of each request's state, (R, 1), from vLLM's tables for decodes and prefills."""
    tables = [
        table
        for table in (vllm_metadata.state_indices_tensor_d, vllm_metadata.state_indices_tensor_p)
        if table is not None
    ]
    columns = [table.reshape(table.shape[0], -1)[:, :1] for table in tables if table.shape[0]]
    return columns[0] if len(columns) == 1 else torch.cat(columns)


compat.accept_token_counts(StateMetadataBuilder)


class StateBackend(ShortConvAttentionBackend):
    """Backend of the state layers, from which vLLM gets the metadata builder."""

    @staticmethod
    def get_name() -> str:
        """Return the name of the backend."""
        return "LAMELLA_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        """Return the class of the builder."""
        return StateMetadataBuilder
