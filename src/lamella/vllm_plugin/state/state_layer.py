"""Slot state in vLLM: one layer without computation for each decoder layer, in whose pages the state lies.

vLLM keeps state in blocks of its cache, a block for each request and group of layers, and tells by layer name which
block is whose. Everything that reads or writes state is one opaque operation to torch.compile and to graphs: inside
it, what the layers do is what they do in lamella's own engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.library import Library
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadata, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)

from lamella.config import ModelConfig
from lamella.layers.block_input import BlockInput
from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.holders import SlotHolder, SlotRows, state_holders
from lamella.layers.local_kit import LocalKit
from lamella.layers.rotary import Positions
from lamella.layers.supernet.stochastic import Stochastic
from lamella.ops.operands import ConvState, ResidualNorm
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import add_rms_norm
from lamella.parallel.group import Group
from lamella.parallel.sharding import Share
from lamella.state.spec import SlotState
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.registration import OPERATIONS
from lamella.vllm_plugin.state.state_blocks import StateSpec


@dataclass(frozen=True)
class StateLayout:
    """A layer's block as vLLM sees it, the same for all layers, so that they are one group with small pages.

    Where all state is the last inputs of convolutions in the model's dtype, a block is rows of channels, and with
    speculation has more of them. Otherwise it is bytes, in which each holder's state starts at an offset; the mixers of
    a stochastic layer, of which one computes a request, start at the same one.

    Attributes:
        shape, dtype: of a block, without spare rows.
        offsets: in bytes, by the holder's prefix; None for rows of channels.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offsets: Mapping[str, int] | None = None

    @classmethod
    @cache
    def of(cls, model: ModelConfig, share: Share, dtype: torch.dtype) -> StateLayout | None:
        """That of a rank; None where no layer keeps slot state."""
        layers = LanguageModel(model, LocalKit(dtype, "meta", Group(share)))
        holders = [holder for holder in state_holders(layers) if isinstance(holder, SlotHolder)]
        if not holders:
            return None
        specs = [holder.specs[0] for holder in holders]
        alone = len({decoder_layer(holder.prefix) for holder in holders}) == len(holders)
        plain = all(len(holder.specs) == 1 and len(holder.specs[0].shape) == 2 for holder in holders)
        if alone and plain and {spec.dtype for spec in specs} == {dtype}:
            rows, channels = (max(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True))
            return cls((rows, channels), dtype)
        offsets: dict[str, int] = {}
        most = 0
        for _, group in groupby(holders, key=lambda holder: decoder_layer(holder.prefix)):
            ours = sorted(group, key=lambda holder: _CHOICE in holder.prefix)  # what has no alternative first
            start = end = 0
            for holder in ours:
                offsets[holder.prefix] = start
                stop = start + sum(_room(spec) for spec in holder.specs)
                end = max(end, stop)
                start = start if _CHOICE in holder.prefix else stop
            most = max(most, end)
        return cls((most,), torch.uint8, offsets)

    def block(self, spare_rows: int) -> tuple[int, ...]:
        """The shape with so many spare rows."""
        if not spare_rows:
            return self.shape
        assert self.offsets is None
        return (self.shape[0] + spare_rows, self.shape[1])


_CHOICE = ".mixer.mixers."  # in the prefix of what belongs to one mixer of a stochastic layer
_ALIGNMENT = 16  # bytes


def _room(spec: SlotState) -> int:
    return -(-spec.bytes_per_request // _ALIGNMENT) * _ALIGNMENT


def decoder_layer(prefix: str) -> str:
    """The path of the decoder layer that a module belongs to."""
    return ".".join(prefix.split(".")[:3])


class StateLayer(nn.Module, MambaBase):
    """The state of one decoder layer, as a layer that vLLM's cache knows of; it computes nothing itself.

    With speculation a slot has `spare_rows` more rows: a step leaves all its inputs, and the next begins behind those
    that were accepted.
    """

    def __init__(self, layout: StateLayout, spare_rows: int, prefix: str) -> None:
        super().__init__()
        self.layout, self.spare_rows, self.prefix = layout, spare_rows, prefix
        self.shape = layout.block(spare_rows)
        self.holders: dict[str, VllmHolder] = {}
        self.kv_cache = (torch.tensor([]),)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers
        layers[prefix] = self

    # What vLLM asks a state layer for.

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (self.layout.dtype,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StateSpec:
        return StateSpec.of(super().get_kv_cache_spec(vllm_config))

    def slots(self, like: Tensor) -> Tensor:
        """The blocks (slots, *shape); before there are any, one of zeros on the device of `like`."""
        blocks = self.kv_cache[0]
        return blocks if blocks.numel() else torch.zeros((1, *self.shape), dtype=self.layout.dtype, device=like.device)

    def compute(self, holder: str, part: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *more: Any) -> None:
        """The operation itself: a holder's part of the inputs, and of what is no row of a token, into the outputs,
        whose rows beyond the step's tokens become zero.
        """
        metadata = self.metadata()
        if metadata is None and (self.kv_cache[0].numel() or self.spare_rows):  # a run for the sake of others
            for out in outputs:
                out.zero_()
            return
        batch = self._rehearsal(inputs[0]) if metadata is None else metadata.batch()
        count = batch.ragged.num_tokens
        if count < inputs[0].shape[0]:
            for out in outputs:
                out[count:].zero_()
            inputs, outputs = [x[:count] for x in inputs], [out[:count] for out in outputs]
        with forward_batch(batch):
            self.holders[holder].parts[part](*inputs, *more, *outputs)

    def _rehearsal(self, x: Tensor) -> ForwardBatch:
        """The step of a run for memory's sake, before there are blocks: one prompt. So kernels are compiled before the
        first request comes, and take the memory that they will take.
        """
        tokens = x.shape[0]
        ragged = RaggedBatch.from_lengths([tokens], [tokens], x.device)
        return ForwardBatch(ragged, slots=torch.zeros(1, dtype=torch.int64, device=x.device))

    def metadata(self) -> Any:
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.prefix) if isinstance(metadata, dict) else None


class VllmHolder(SlotHolder):
    """A holder whose state lies in a layer's blocks, beside other holders' or in their place."""

    inline = False

    def __init__(self, specs: Sequence[SlotState], layer: StateLayer, prefix: str) -> None:
        super().__init__(specs, prefix)
        self.layer = layer
        layer.holders[prefix] = self

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        out = inputs[0].new_empty(inputs[0].shape[0], width)
        torch.ops.lamella.stateful(list(inputs), out, self.layer.prefix, self.prefix, part)
        return out

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if self.layer.spare_rows:  # what is normed must be kept row by row
            normed, total = add_rms_norm(x, ResidualNorm(residual, weight, eps))
            return self.run(part, (normed,), x.shape[1]), total
        out, total = torch.empty_like(x), torch.empty_like(x)
        torch.ops.lamella.stateful_after_norm(
            x, residual, weight, eps, out, total, self.layer.prefix, self.prefix, f"{part}.after_norm"
        )
        return out, total

    def current(self) -> SlotRows | None:
        slots = require_batch().slots
        if slots is None:
            return None
        rows = self.layer.slots(slots)
        if self.layer.layout.offsets is None:
            return SlotRows((rows,), slots)
        views, start = [], self.layer.layout.offsets[self.prefix]
        for spec in self.specs:
            part = rows[:, start : start + spec.bytes_per_request]
            views.append(part.view(spec.dtype).unflatten(1, spec.shape))
            start += _room(spec)
        return SlotRows(views, slots)

    def window(self, channels: slice, x: Tensor | None) -> ConvState | None:
        current = self.current()
        if current is None:
            return None
        rows, slots, size = current.tensors[0][:, :, channels], current.slots, self.specs[0].shape[0]
        if not self.layer.spare_rows:
            return ConvState(rows[:, :size], slots)
        assert x is not None
        ragged, metadata = require_batch().ragged, self.layer.metadata()
        return advance_window(ConvState(rows, slots), size, x, ragged.query_start_loc, ragged.positions, metadata)


def advance_window(
    state: ConvState,
    size: int,
    x: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    metadata: StateMetadata,
) -> ConvState:
    """The `size` inputs before each request's new ones as rings (R, size, C), see `short_conv`, with their indices
    (R,), where slots have spare rows; and the slots are made ready for the step after.

    The rows of the state (slots, size + spare, C) are written; x (T, C), positions (T,). Slots are no rings but in
    order, as vLLM expects when it copies them: before the call a slot holds what the step before saw from its second
    token's window on, of which as many as were accepted count. Nothing waits for the device.
    """
    rows, slots = state
    requests, device = slots.shape[0], rows.device
    index = torch.arange(rows.shape[1], device=device)
    skipped, first = metadata.skipped_and_first(query_start_loc)
    held = rows[slots]  # (R, size + spare, C)

    def window(entry: Tensor) -> Tensor:
        """Of each request some of the inputs before its new ones, (R, entries)."""
        return held.gather(1, (skipped[:, None] + entry)[:, :, None].expand(-1, -1, rows.shape[2]))

    position = positions[query_start_loc[:-1].clamp(max=x.shape[0] - 1)]
    history = window((index[:size] - position[:, None]) % size)
    # Row i becomes entry first + i of [window | new inputs].
    entry = first[:, None] + index
    new = (query_start_loc[:-1, None] + entry - size).clamp(0, x.shape[0] - 1)
    old = window(entry.clamp(max=size - 1))
    kept = torch.where((entry < size)[:, :, None], old, x[new])
    length = query_start_loc.diff()
    rows[slots] = torch.where((entry < size + length[:, None])[:, :, None], kept, held)
    return ConvState(history, torch.arange(requests, device=device))


@dataclass
class StateMetadata(AttentionMetadata):
    """A step as the runner knows it, and in our terms, made by the first layer that asks: within a captured graph, if
    there is one, which then makes it in each replay, at no cost to the host.

    Attributes:
        block_table: (R, blocks), of each request the blocks of its state; in the first column is the one of now, or
            with `tokens_per_block` in the column of its last token.
        query_start_loc: (R + 1,) on the device, and more behind them.
        seq_lens: (R,) on the device, with the new tokens, and more behind them.
        index: 0, 1, 2, ... for as many tokens as a step may have.
        num_tokens: of all requests.
        num_decodes: requests with one new token, or with accepted drafts, which come first.
        query_lens: (R,) on the host, of a step with other requests than these.
        num_accepted_tokens: (R,) of the decodes, with speculation.
        spare_rows: of a slot, for drafts.
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
        """No tensor of it is asked for by the host: a graph may capture what makes it."""
        if self._batch is None:
            self._batch = self._make_batch()
        return self._batch

    def _make_batch(self) -> ForwardBatch:
        requests, tokens = self.block_table.shape[0], self.num_tokens
        one_each = not self.query_lens and not self.spare_rows
        if one_each:
            requests = min(requests, tokens)  # those that pad a step of decodes may have no token
        lengths, index = self.seq_lens[:requests], self.index[:tokens]
        if one_each:
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
            column = (lengths - 1).clamp(min=0) // self.tokens_per_block  # requests that pad have length 0
            table = table.gather(1, column[:, None].long())
        return table[:, 0].long()

    def skipped_and_first(self, query_start_loc: Tensor) -> tuple[Tensor, Tensor]:
        """With speculation, of each request (R,): how many of a slot's rows stand before its window, one less than the
        tokens accepted; and the entry of [window | new inputs] that the slot begins with after the step.
        """
        lengths = query_start_loc.diff()
        skipped, first = torch.zeros_like(lengths), lengths.clone()
        if self.num_decodes:
            assert self.num_accepted_tokens is not None
            skipped[: self.num_decodes] = self.num_accepted_tokens[: self.num_decodes] - 1
            first[: self.num_decodes] = 1
        return skipped.clamp(min=0), first


class StateMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """Makes a step's metadata of views of the runner's tensors, which stay where they are for graphs' sake; vLLM's own
    builder splits and copies them on the host for each step. With speculation it is vLLM's that says who drafts.
    """

    supports_update_block_table = False  # a group's metadata holds what its slots gave
    needs_causal_conv1d_metadata = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
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
        step, requests = common_attn_metadata, common_attn_metadata.num_reqs
        lengths: tuple[int, ...] = ()
        if step.max_query_len > 1 or self._spare_rows:
            lengths = tuple(step.query_start_loc_cpu[: requests + 1].diff().tolist())
        table, tokens_per_block, accepted = step.block_table_tensor[:requests], self._tokens_per_block, None
        decodes = next((request for request, length in enumerate(lengths) if length != 1), requests)
        if self._spare_rows:
            theirs = super().build(common_prefix_len, step, fast_build, **options)
            table, tokens_per_block = _first_blocks(theirs), None
            decodes, accepted = theirs.num_decodes, theirs.num_accepted_tokens
            lengths = lengths if theirs.num_prefills else ()
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


def _first_blocks(theirs: ShortConvAttentionMetadata) -> Tensor:
    """Of each request (R, 1) the block that its state begins in, of the two tables in which vLLM keeps them."""
    tables = [table for table in (theirs.state_indices_tensor_d, theirs.state_indices_tensor_p) if table is not None]
    columns = [table.reshape(table.shape[0], -1)[:, :1] for table in tables if table.shape[0]]
    return columns[0] if len(columns) == 1 else torch.cat(columns)


compat.accept_token_counts(StateMetadataBuilder)


class StateBackend(ShortConvAttentionBackend):
    """What vLLM asks for a step's metadata."""

    @staticmethod
    def get_name() -> str:
        return "LAMELLA_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder


def _stateful(inputs: list[Tensor], out: Tensor, layer: str, holder: str, part: str) -> None:
    """A part of a holder in the state layer named `layer`, of inputs (T, ...) into out (T, ...)."""
    get_forward_context().no_compile_layers[layer].compute(holder, part, inputs, (out,))


def _stateful_after_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    total: Tensor,
    layer: str,
    holder: str,
    part: str,
) -> None:
    """The same of the weighted RMS norm of x + residual, which sum goes into total."""
    get_forward_context().no_compile_layers[layer].compute(holder, part, (x, residual), (out, total), weight, eps)


def _chosen_mixer(x: Tensor, positions: Tensor, out: Tensor, layer: str) -> None:
    """The active mixer of the stochastic layer named `layer`, of what enters it, x (T, C), at positions (T,), into out
    (T, C).
    """
    out.copy_(get_forward_context().no_compile_layers[layer].choose(x, positions))


def _nothing(*_: Any) -> None:
    """What the operations do to tensors without data."""


_library = Library("lamella", "FRAGMENT")  # the operations go with it
for _operation, _function, _outputs in (
    ("stateful", _stateful, ["out"]),
    ("stateful_after_norm", _stateful_after_norm, ["out", "total"]),
    ("chosen_mixer", _chosen_mixer, ["out"]),
):
    assert f"lamella::{_operation}" in OPERATIONS
    direct_register_custom_op(
        op_name=_operation, op_func=_function, mutates_args=_outputs, fake_impl=_nothing, target_lib=_library
    )


class Chooser:
    """Calls a stochastic layer's active mixer from within an operation: which one it is must not be traced, and what it
    computes not be captured, since it may be another tomorrow.
    """

    def __init__(self, stochastic: Stochastic, prefix: str) -> None:
        self._stochastic, self._prefix = stochastic, prefix
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers
        layers[prefix] = self

    def __call__(self, positions: Positions, entry: BlockInput) -> Tensor:
        x = entry.tensor()
        out = torch.empty_like(x)
        torch.ops.lamella.chosen_mixer(x, positions.index, out, self._prefix)
        return out

    def choose(self, x: Tensor, positions: Tensor) -> Tensor:
        """The active mixer of x (T, C) at positions (T,)."""
        return self._stochastic.mixers[self._stochastic.active](Positions(positions), BlockInput.ready(x))
