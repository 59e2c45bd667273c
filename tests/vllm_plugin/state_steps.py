"""Steps as described by vLLM's runners, and the batches that the plugin builds from them."""

from __future__ import annotations

from dataclasses import MISSING, fields
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lamella.ops.ragged import RaggedBatch
from lamella.vllm_plugin.state.metadata import StateMetadata
from lamella.vllm_plugin.state.metadata_builder import StateMetadataBuilder


def assert_same_tensors(made: RaggedBatch, expected: RaggedBatch) -> None:
    """Compare the tensors of two batches."""
    for name in ("positions", "query_start_loc", "seq_lens", "token_request"):
        assert getattr(made, name).tolist() == getattr(expected, name).tolist(), name


def starts_of(lengths: list[int]) -> Tensor:
    """Return `query_start_loc` of requests with so many new tokens."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def metadata(**values: Any) -> StateMetadata:
    """Return the metadata of a step; fields without a default that `values` lacks are None."""
    return StateMetadata(
        **(dict.fromkeys(field.name for field in fields(StateMetadata) if field.default is MISSING) | values)
    )


def described(
    query: list[int], context: list[int], slots: list[int], tokens_per_block: int | None = None, padding: int = 0
) -> StateMetadata:
    """Return the metadata that the builder makes from a step without drafts, described by either runner."""
    builder = StateMetadataBuilder.__new__(StateMetadataBuilder)
    builder._index, builder._spare_rows, builder._tokens_per_block = torch.arange(100), 0, tokens_per_block
    requests = len(query) + padding
    table = torch.full((requests, 8), -1, dtype=torch.int32)
    for row in range(requests):
        column = (context[row] - 1) // tokens_per_block if tokens_per_block and row < len(query) else 0
        table[row, column] = slots[row] if row < len(query) else 0
    starts = starts_of([*query, *[0] * padding])
    step = SimpleNamespace(
        num_reqs=requests,
        num_actual_tokens=sum(query) + padding,
        max_query_len=max(query),
        query_start_loc=starts,
        query_start_loc_cpu=torch.cat([starts, starts[-1:]]),  # the newer runner has more room there
        seq_lens=torch.tensor([*context, *[0] * (padding + 1)], dtype=torch.int32),
        block_table_tensor=table,
    )
    return builder.build(0, step)


def drafted(query: list[int], context: list[int], slots: list[int], decodes: int, padding: int = 0) -> StateMetadata:
    """Return the metadata of a step with up to three drafts a request."""
    return metadata(
        block_table=torch.tensor(slots, dtype=torch.int32)[:, None],
        num_tokens=sum(query),
        num_decodes=decodes,
        query_lens=tuple(query) if len(query) + padding > decodes else (),
        seq_lens=torch.tensor([*context, *[0] * padding], dtype=torch.int32),
        query_start_loc=starts_of([*query, *[0] * padding]),
        index=torch.arange(100),
        spare_rows=3,
    )
