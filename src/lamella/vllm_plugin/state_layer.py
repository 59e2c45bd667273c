"""Slot state in vLLM: one layer without computation for each decoder layer, in whose pages the state lies.

vLLM keeps state in blocks of its cache, a block for each request and group of layers, and tells by layer name which
block is whose. Everything that reads or writes state is one opaque operation to torch.compile and to graphs: inside
it, what the layers do is what they do in lamella's own engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend, CommonAttentionMetadata
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.attention.backends.short_conv_attn import (
    ShortConvAttentionBackend,
    ShortConvAttentionMetadata,
    ShortConvAttentionMetadataBuilder,
)

from lamella.config import ModelConfig
from lamella.distributed.group import Group
from lamella.distributed.sharding import Share
from lamella.errors import ConfigError
from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.decoder import LanguageModel
from lamella.layers.kit import LocalKit, SlotHolder, state_holders
from lamella.ops.ragged import RaggedBatch
from lamella.ops.rms_norm import add_rms_norm
from lamella.state.spec import SlotState
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.registration import OPERATIONS


def widest_slot(model: ModelConfig, share: Share, dtype: torch.dtype) -> SlotState | None:
    """The shape into which the slot state of every layer fits, on a rank; None where no layer has any."""
    layers = LanguageModel(model, LocalKit(dtype, "meta", Group(share)))
    specs = {holder.spec for holder in state_holders(layers) if isinstance(holder.spec, SlotState)}
    if not specs:
        return None
    for spec in specs:
        if len(spec.shape) != 2 or spec.dtype != dtype:
            raise ConfigError(
                f"{model.architecture}: slot state {spec.shape} in {spec.dtype} cannot be kept in vLLM yet, "
                "only the last inputs of convolutions, in the model's dtype"
            )
    return SlotState(tuple(max(sizes) for sizes in zip(*(spec.shape for spec in specs), strict=True)), dtype)


class StateLayer(SlotHolder, MambaBase):
    """The state of one decoder layer, as a layer that vLLM's cache knows of.

    A slot is the first `spec.shape` of a block (rows, channels). With speculation each has `spare_rows` more rows: a
    step leaves all its inputs, and the next begins behind those that were accepted.
    """

    inline = False

    def __init__(self, spec: SlotState, room: SlotState, spare_rows: int, prefix: str) -> None:
        super().__init__(spec, prefix)
        self.spare_rows = spare_rows
        self.shape = (room.shape[0] + spare_rows, room.shape[1])
        self.kv_cache = (torch.tensor([]),)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers
        layers[prefix] = self

    # What vLLM asks a state layer for.

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (self.spec.dtype,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[AttentionBackend]:
        return StateBackend

    # What our layers ask a holder for.

    def run(self, part: str, x: Tensor, width: int) -> Tensor:
        out = x.new_empty(x.shape[0], width)
        torch.ops.lamella.stateful(x, out, self.prefix, part)
        return out

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if self.spare_rows:  # what is normed must be kept row by row
            normed, total = add_rms_norm(x, residual, weight, eps)
            return self.run(part, normed, x.shape[1]), total
        out, total = torch.empty_like(x), torch.empty_like(x)
        torch.ops.lamella.stateful_after_norm(x, residual, weight, eps, out, total, self.prefix, f"{part}.after_norm")
        return out, total

    def current(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        slots, rows = require_batch().slots, self.kv_cache[0]
        if slots is None:
            return None, None
        if not rows.numel():  # a rehearsal
            rows = torch.zeros((1, *self.shape), dtype=self.spec.dtype, device=slots.device)
        return rows, slots

    def window(self, channels: slice, x: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        rows, slots = self.current()
        if rows is None or slots is None:
            return None, None
        rows, size = rows[:, :, channels], self.spec.shape[0]
        if not self.spare_rows:
            return rows[:, :size], slots
        assert x is not None
        return advance_window(rows, slots, size, x, require_batch().ragged.query_start_loc, self._metadata())

    def compute(self, part: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *constants: Any) -> None:
        """The operation itself: `part` of the inputs, and of what is no row of a token, into the outputs, whose rows
        beyond the step's tokens become zero."""
        metadata = self._metadata()
        if metadata is None and (self.kv_cache[0].numel() or self.spare_rows):  # a run for the sake of others
            for out in outputs:
                out.zero_()
            return
        batch = self._rehearsal(inputs[0]) if metadata is None else metadata.batch()
        count = batch.ragged.num_tokens
        with forward_batch(batch):
            self.parts[part](*(x[:count] for x in inputs), *constants, *(out[:count] for out in outputs))
        for out in outputs:
            out[count:].zero_()

    def _rehearsal(self, x: Tensor) -> ForwardBatch:
        """The step of a run for memory's sake, before there are blocks: one prompt. So kernels are compiled before the
        first request comes, and take the memory that they will take."""
        tokens = x.shape[0]
        ragged = RaggedBatch.from_lengths([tokens], [tokens], x.device)
        return ForwardBatch(ragged, slots=torch.zeros(1, dtype=torch.int64, device=x.device))

    def _metadata(self) -> Any:
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.prefix) if isinstance(metadata, dict) else None


def advance_window(
    rows: Tensor, slots: Tensor, size: int, x: Tensor, query_start_loc: Tensor, metadata: StateMetadata
) -> tuple[Tensor, Tensor]:
    """The `size` inputs before each request's new ones as (R, size, C), with their indices (R,), where slots have spare
    rows; and the slots are made ready for the step after.

    rows (slots, size + spare, C) is written; x (T, C). Before the call a slot holds what the step before saw from its
    second token's window on, of which as many as were accepted count. Nothing waits for the device.
    """
    requests, device = slots.shape[0], rows.device
    index = torch.arange(rows.shape[1], device=device)
    skipped, first = metadata.skipped_and_first(query_start_loc)
    held = rows[slots]  # (R, size + spare, C)
    history = held.gather(1, (skipped[:, None] + index[:size])[:, :, None].expand(-1, -1, rows.shape[2]))
    # Row i becomes entry first + i of [history | new inputs].
    entry = first[:, None] + index
    new = (query_start_loc[:-1, None] + entry - size).clamp(0, x.shape[0] - 1)
    old = history.gather(1, entry.clamp(max=size - 1)[:, :, None].expand(-1, -1, rows.shape[2]))
    kept = torch.where((entry < size)[:, :, None], old, x[new])
    length = query_start_loc.diff()
    rows[slots] = torch.where((entry < size + length[:, None])[:, :, None], kept, held)
    return history, torch.arange(requests, device=device)


@dataclass
class StateMetadata(ShortConvAttentionMetadata):
    """vLLM's metadata of a step, and the step in our terms, made by the first layer that asks."""

    query_start_loc: Tensor | None = None  # (R + 1,), of all requests
    index: Tensor | None = None  # 0, 1, 2, ... for as many tokens as a step may have
    spare_rows: int = 0
    _batch: ForwardBatch | None = None

    def batch(self) -> ForwardBatch:
        """No tensor of it is asked for by the host: a graph may capture what makes it."""
        if self._batch is None:
            self._batch = self._make_batch()
        return self._batch

    def _make_batch(self) -> ForwardBatch:
        assert self.query_start_loc is not None and self.index is not None
        tokens = self.num_decode_tokens + self.num_prefill_tokens
        # Requests that pad a step of decodes have no token.
        decodes = self.num_decodes if self.spare_rows else min(self.num_decodes, self.num_decode_tokens)
        assert decodes == self.num_decodes or not self.num_prefills
        slots = []
        if decodes:
            assert self.state_indices_tensor_d is not None
            slots.append(self.state_indices_tensor_d[:decodes, 0])
        if self.num_prefills:
            assert self.state_indices_tensor_p is not None
            slots.append(self.state_indices_tensor_p)
        requests = decodes + self.num_prefills
        lengths, index = self.seq_lens[:requests], self.index[:tokens]
        if not self.num_prefills and not self.spare_rows:
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
            query_lens=(),
            context_lens=(),
            num_decodes=0 if self.spare_rows else decodes,
        )
        return ForwardBatch(ragged, slots=torch.cat(slots).long())

    def skipped_and_first(self, query_start_loc: Tensor) -> tuple[Tensor, Tensor]:
        """With speculation, of each request (R,): how many of a slot's rows stand before its window, one less than the
        tokens accepted; and the entry of [window | new inputs] that the slot begins with after the step."""
        lengths = query_start_loc.diff()
        skipped, first = torch.zeros_like(lengths), lengths.clone()
        if self.num_decodes:
            assert self.num_accepted_tokens is not None
            skipped[: self.num_decodes] = self.num_accepted_tokens[: self.num_decodes] - 1
            first[: self.num_decodes] = 1
        return skipped.clamp(min=0), first


class StateMetadataBuilder(ShortConvAttentionMetadataBuilder):
    """The short convolution's, with what `StateMetadata` has beside it."""

    metadata_cls = StateMetadata
    supports_update_block_table = False  # a group's metadata holds what its slots gave
    needs_causal_conv1d_metadata = False

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        scheduler = vllm_config.scheduler_config
        most = max(scheduler.max_num_batched_tokens, scheduler.max_num_seqs) + 1
        self._index = torch.arange(most, device=device)
        self._spare_rows = compat.num_speculative_tokens(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
        **options: Any,
    ) -> StateMetadata:
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **options)
        metadata.query_start_loc = common_attn_metadata.query_start_loc
        metadata.index, metadata.spare_rows = self._index, self._spare_rows
        return metadata


compat.accept_token_counts(StateMetadataBuilder)


class StateBackend(ShortConvAttentionBackend):
    """What vLLM asks for a step's metadata."""

    @staticmethod
    def get_name() -> str:
        return "LAMELLA_STATE"

    @staticmethod
    def get_builder_cls() -> type[StateMetadataBuilder]:
        return StateMetadataBuilder


def _stateful(x: Tensor, out: Tensor, layer: str, part: str) -> None:
    """A part of the state layer named `layer`, of x (T, ...) into out (T, ...)."""
    get_forward_context().no_compile_layers[layer].compute(part, (x,), (out,))


def _stateful_after_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, total: Tensor, layer: str, part: str
) -> None:
    """The same of the weighted RMS norm of x + residual, which sum goes into total."""
    get_forward_context().no_compile_layers[layer].compute(part, (x, residual), (out, total), weight, eps)


def _nothing(*_: Any) -> None:
    """What the operations do to tensors without data."""


_library = Library("lamella", "FRAGMENT")  # the operations go with it
for _operation, _function, _outputs in (
    ("stateful", _stateful, ["out"]),
    ("stateful_after_norm", _stateful_after_norm, ["out", "total"]),
):
    assert f"lamella::{_operation}" in OPERATIONS
    direct_register_custom_op(
        op_name=_operation, op_func=_function, mutates_args=_outputs, fake_impl=_nothing, target_lib=_library
    )
