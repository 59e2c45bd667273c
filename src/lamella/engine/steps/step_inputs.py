"""Input tensors of a step, packed into one buffer, so that one copy transfers them to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamella.engine.requests.request import SAMPLING_FIELDS, Request
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import NO_FEATURES, Forms, StepFeatures
from lamella.layers.context import BlockView, ForwardBatch
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.ragged import RaggedBatch
from lamella.state.manager import Allocation, StateManager
from lamella.state.spec import PagedState

_ALIGNMENT = 16  # bytes: the widest load of a kernel


@dataclass(frozen=True)
class Layout:
    """Layout of a step's tensors in their buffer.

    Attributes:
        requests: number of requests, padding rows included.
        tokens: number of tokens, padding included.
        groups: number of block groups.
        blocks: number of columns of each block table.
        prefill_blocks: total number of blocks of the requests after the decodes.
        extra: name, dtype and shape of each array of a feature, see `StepFeature`.
    """

    requests: int
    tokens: int
    groups: int
    blocks: int
    prefill_blocks: int = 0
    extra: tuple[tuple[str, type, tuple[int, ...]], ...] = ()

    def fields(self) -> dict[str, tuple[type, tuple[int, ...]]]:
        """Return dtype and shape of each field.

        | field | shape | content |
        |---|---|---|
        | input_ids | (tokens,) | token ids; -1 - r: the token that row r of the previous step sampled |
        | positions | (tokens,) | position of each token in its request |
        | token_request | (tokens,) | row of each token's request |
        | slot_mapping | (groups, tokens) | cache row of each token: block * block_size + offset |
        | slots | (requests,) | slot of each request |
        | seed, step, top_k, temperature, top_p, min_p | (requests,) | sampling parameters |
        | query_start_loc | (requests + 1,) | first token of each request |
        | seq_lens | (requests,) | length of each request after the step |
        | block_table | (groups, requests, blocks) | blocks of each request |
        | block_list | (groups, prefill_blocks) | blocks of the requests after the decodes, concatenated |
        """
        requests, tokens = (self.requests,), (self.tokens,)
        return {
            "input_ids": (np.int64, tokens),
            "positions": (np.int64, tokens),
            "token_request": (np.int64, tokens),
            "slot_mapping": (np.int64, (self.groups, self.tokens)),
            "slots": (np.int64, requests),
            "seed": (np.int64, requests),
            "step": (np.int64, requests),
            "query_start_loc": (np.int32, (self.requests + 1,)),
            "seq_lens": (np.int32, requests),
            "top_k": (np.int32, requests),
            "temperature": (np.float32, requests),
            "top_p": (np.float32, requests),
            "min_p": (np.float32, requests),
            "block_table": (np.int32, (self.groups, self.requests, self.blocks)),
            "block_list": (np.int32, (self.groups, self.prefill_blocks)),
            **{name: (dtype, shape) for name, dtype, shape in self.extra},
        }

    def spans(self) -> tuple[dict[str, tuple[int, int, type, tuple[int, ...]]], int]:
        """Return (start, stop, dtype, shape) of each field, in bytes, and the size of the buffer in bytes."""
        return _spans(self)

    def arrays(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields of a host buffer (nbytes,), uint8, as arrays that share its memory."""
        return {
            name: buffer[start:stop].view(dtype).reshape(shape)
            for name, (start, stop, dtype, shape) in self.spans()[0].items()
        }

    def tensors(self, buffer: Tensor) -> dict[str, Tensor]:
        """Return the fields of a buffer (nbytes,), uint8, as tensors that share its memory."""
        return {
            name: buffer[start:stop].view(_TORCH[dtype]).view(shape)
            for name, (start, stop, dtype, shape) in self.spans()[0].items()
        }


_TORCH: Mapping[Any, torch.dtype] = {np.int64: torch.int64, np.int32: torch.int32, np.float32: torch.float32}


@lru_cache(maxsize=1024)
def _spans(layout: Layout) -> tuple[dict[str, tuple[int, int, type, tuple[int, ...]]], int]:
    spans, offset = {}, 0
    for name, (dtype, shape) in layout.fields().items():
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        spans[name] = (offset, offset + size, dtype, shape)
        offset += -(-size // _ALIGNMENT) * _ALIGNMENT
    return spans, offset


@dataclass(frozen=True)
class StepTensors:
    """Inputs of a step on the device.

    Attributes:
        batch: positions and state of the step, which layers read.
        input_ids: (num_tokens,) int64; -1 - r is a placeholder for the token that row r of the previous step sampled.
        sampling: (num_requests,) tensors by name: seed, step, top_k, temperature, top_p, min_p.
    """

    batch: ForwardBatch
    input_ids: Tensor
    sampling: Mapping[str, Tensor]

    @classmethod
    def from_fields(
        cls,
        tensors: Mapping[str, Tensor],
        groups: Sequence[PagedState],
        query_lens: tuple[int, ...],
        context_lens: tuple[int, ...],
        block_size: int,
        attention: AttentionSpace | None = None,
        context: Mapping[str, Any] | None = None,
        snapshots: tuple[tuple[tuple[int, int], ...], ...] = (),
    ) -> StepTensors:
        """Make a step's inputs as views of the fields of a buffer.

        Args:
            tensors: fields, see `Layout.fields`.
            groups: block groups, in the order of the fields.
            query_lens: number of tokens of each request.
            context_lens: length of each request after the step; empty if not known on the host (graph replay).
            block_size: tokens per block.
            attention: workspace of the attention kernels; None if they are not used.
            context: attributes of `ForwardBatch` that features add.
            snapshots: see `ForwardBatch`.
        """
        num_decodes = next((i for i, n in enumerate(query_lens) if n != 1), len(query_lens))
        ragged = RaggedBatch(
            positions=tensors["positions"],
            query_start_loc=tensors["query_start_loc"],
            seq_lens=tensors["seq_lens"],
            token_request=tensors["token_request"],
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=num_decodes,
        )
        blocks = {
            group: BlockView(
                tensors["block_table"][index], tensors["slot_mapping"][index], tensors["block_list"][index], block_size
            )
            for index, group in enumerate(groups)
        }
        sampling = {name: tensors[name] for name in ("seed", "step", "top_k", "temperature", "top_p", "min_p")}
        batch = ForwardBatch(ragged, blocks, tensors["slots"], attention, snapshots=snapshots, **(context or {}))
        return cls(batch, tensors["input_ids"], sampling)


def prefills(chunks: Sequence[Scheduled]) -> Sequence[Scheduled]:
    """Return the chunks from the first one with several tokens on. The chunks before it are decodes."""
    first = next((index for index, chunk in enumerate(chunks) if chunk.count != 1), len(chunks))
    return chunks[first:]


def _snapshots(chunks: Sequence[Scheduled]) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Return the snapshots of a step as `ForwardBatch.snapshots`; none if no chunk has any."""
    if not any(chunk.snapshots for chunk in chunks):
        return ()
    return tuple(tuple((position - chunk.start, slot) for position, slot in chunk.snapshots) for chunk in chunks)


class RequestRows:
    """Block tables and sampling parameters of running requests on the host, one row per slot.

    Only rows of new requests and new blocks are written in a step, so a step costs no Python work per block.

    Attributes:
        blocks: (num_groups, num_slots, max_blocks) int32, block tables.
        sampling: (num_slots,) arrays by name, see `SAMPLING_FIELDS`.
    """

    def __init__(self, state: StateManager, max_blocks: int) -> None:
        self.state = state
        slots = state.slot_pool.capacity + 1
        self.blocks = np.zeros((len(state.groups), slots, max_blocks), np.int32)
        self.sampling = {name: np.zeros(slots, kind) for name, kind in SAMPLING_FIELDS.items()}
        self._allocations: list[Allocation | None] = [None] * slots
        self._num_blocks = np.zeros((len(state.groups), slots), np.int64)  # blocks that are in `blocks` already

    def slot(self, request: Request) -> int:
        """Update the rows of a request, and return its slot."""
        allocation = self.state.allocations[request]
        slot = allocation.slot
        if self._allocations[slot] is not allocation:
            self._allocations[slot] = allocation
            self._num_blocks[:, slot] = 0
            for name, value in request.sampling.items():
                self.sampling[name][slot] = value
        for group, blocks in enumerate(allocation.blocks):
            count = self._num_blocks[group, slot]
            if len(blocks) > count:
                self.blocks[group, slot, count : len(blocks)] = blocks[count:]
                self._num_blocks[group, slot] = len(blocks)
        return slot


class StepInputs:
    """Builds the input tensors of steps for one set of pools."""

    def __init__(
        self,
        state: StateManager,
        max_model_len: int,
        device: torch.device,
        attention: AttentionSpace | None,
        features: StepFeatures = NO_FEATURES,
    ) -> None:
        self.state, self.device, self.attention, self.features = state, device, attention, features
        self.max_blocks = state.num_blocks(max_model_len)
        self._rows = RequestRows(state, self.max_blocks)

    def build(
        self,
        chunks: Sequence[Scheduled],
        latest_rows: Mapping[Request, int],
        num_padding: int = 0,
        forms: Forms = (),
    ) -> StepTensors:
        """Build the inputs of a step in new memory, and copy them to the device.

        Args:
            chunks: of the step, decodes first.
            latest_rows: for requests with a token in flight, the row of the previous step that sampled it.
            num_padding: number of padding rows; only for steps without prefills.
            forms: forms of the features, see `StepFeature`.

        Returns:
            The inputs on the device.
        """
        lengths, size = [chunk.start + chunk.count for chunk in chunks] + [1] * num_padding, self.state.block_size
        prefill_blocks = (
            0 if self.attention is None else sum(self.state.num_blocks(c.start + c.count) for c in prefills(chunks))
        )
        layout = Layout(
            requests=len(chunks) + num_padding,
            tokens=sum(chunk.count for chunk in chunks) + num_padding,
            groups=len(self.state.groups),
            blocks=self.state.num_blocks(max(lengths)),
            prefill_blocks=prefill_blocks,
            extra=self.extra(forms, len(chunks) + num_padding),
        )
        assert not num_padding or layout.tokens == layout.requests
        buffer = torch.empty(layout.spans()[1], dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        self.fill(layout.arrays(buffer.numpy()), chunks, latest_rows, forms)
        on_device = buffer.to(self.device, non_blocking=True)
        tensors = layout.tensors(on_device)
        return StepTensors.from_fields(
            tensors,
            self.state.groups,
            (*(chunk.count for chunk in chunks), *(1,) * num_padding),
            tuple(lengths),
            size,
            self.attention,
            self.features.context(forms, tensors, chunks),
            _snapshots(chunks),
        )

    def extra(self, forms: Forms, requests: int) -> tuple[tuple[str, type, tuple[int, ...]], ...]:
        """Return the arrays of the features for a step of `requests` rows, see `Layout.extra`."""
        fields = self.features.fields(forms, requests)
        return tuple((name, dtype, shape) for name, (dtype, shape) in fields.items())

    def fill(
        self,
        arrays: Mapping[str, np.ndarray],
        chunks: Sequence[Scheduled],
        latest_rows: Mapping[Request, int],
        forms: Forms = (),
    ) -> None:
        """Write a step into the arrays of a host buffer.

        Rows after the chunks become padding rows. Each is a request of one token with the dummy block and dummy slot.

        Args:
            arrays: fields, see `Layout.fields`.
            chunks: of the step, decodes first.
            latest_rows: see `build`.
            forms: see `build`.
        """
        used = len(chunks)
        starts = np.array([chunk.start for chunk in chunks])
        counts = np.array([chunk.count for chunk in chunks])
        slots = np.array([self._rows.slot(chunk.request) for chunk in chunks])
        bounds = np.cumsum(counts)
        tokens = int(bounds[-1])
        token_request = np.repeat(np.arange(used), counts)
        positions = np.arange(tokens) + (starts + counts - bounds)[token_request]
        ids: list[int] = []
        for chunk in chunks:
            request = chunk.request
            if request.num_in_flight:
                assert chunk.count == 1
                ids.append(-1 - latest_rows[request])
            else:
                ids += request.token_ids(chunk.start, chunk.start + chunk.count)
        size = self.state.block_size
        arrays["input_ids"][:tokens], arrays["input_ids"][tokens:] = ids, 0
        arrays["positions"][:tokens], arrays["positions"][tokens:] = positions, 0
        num_padding = len(arrays["slots"]) - used
        arrays["token_request"][:tokens] = token_request
        arrays["token_request"][tokens:] = used + np.arange(num_padding)
        arrays["query_start_loc"][0], arrays["query_start_loc"][1 : used + 1] = 0, bounds
        arrays["query_start_loc"][used + 1 :] = tokens + 1 + np.arange(num_padding)
        arrays["seq_lens"][:used], arrays["seq_lens"][used:] = starts + counts, 1
        arrays["slots"][:used], arrays["slots"][used:] = slots, 0
        columns = arrays["block_table"].shape[2]
        for group in range(len(self.state.groups)):
            table = self._rows.blocks[group]
            blocks = table[slots[token_request], positions // size].astype(np.int64)
            arrays["slot_mapping"][group, :tokens] = blocks * size + positions % size
            arrays["slot_mapping"][group, tokens:] = 0
            np.take(table[:, :columns], slots, axis=0, out=arrays["block_table"][group, :used])
            arrays["block_table"][group, used:, :1] = 0
            if arrays["block_list"].shape[1]:
                first = used - len(prefills(chunks))
                block_counts = -(-(starts + counts)[first:] // size)
                rows = [table[slot, :count] for slot, count in zip(slots[first:], block_counts, strict=True)]
                np.concatenate(rows, out=arrays["block_list"][group])
        self.features.fill(forms, arrays, chunks)
        for name, values in self._rows.sampling.items():
            arrays[name][:used], arrays[name][used:] = values[slots], 0
        arrays["step"][:used] = [chunk.request.num_sampled for chunk in chunks]
        arrays["step"][used:] = 0
