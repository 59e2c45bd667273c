"""Slot state of a decoder layer as a layer of vLLM.

vLLM keeps state in blocks of its KV cache, one block per request and group of layers, and finds blocks by the name of a
layer. Each decoder layer with slot state therefore has one `StateLayer`, whose blocks hold the state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lamella.layers.context import ForwardBatch, forward_batch
from lamella.layers.state_modules import SlotStateModule
from lamella.ops.ragged import RaggedBatch
from lamella.vllm_plugin.state.layout import StateLayout
from lamella.vllm_plugin.state.metadata_builder import StateBackend
from lamella.vllm_plugin.state.state_blocks import StateSpec


class StateLayer(nn.Module, MambaBase):
    """Slot state of one decoder layer in vLLM's blocks; it runs the computations of its state modules.

    With speculation a slot has spare rows: a step stores all its inputs, and the next step starts after the accepted
    ones.
    """

    def __init__(self, layout: StateLayout, spare_rows: int, prefix: str) -> None:
        """Register the layer with vLLM.

        Args:
            layout: layout of a block.
            spare_rows: extra rows of a slot for draft tokens.
            prefix: dotted path of the layer.
        """
        super().__init__()
        self.layout, self.spare_rows, self.prefix = layout, spare_rows, prefix
        self.shape = layout.block(spare_rows)
        self.state_modules: dict[str, SlotStateModule] = {}
        self.kv_cache = (torch.tensor([]),)
        layers = get_current_vllm_config().compilation_config.static_forward_context
        assert prefix not in layers
        layers[prefix] = self

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of a block; called by vLLM."""
        return (self.shape,)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of a block; called by vLLM."""
        return (self.layout.dtype,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """Kind of state; read by vLLM."""
        return MambaAttentionBackendEnum.SHORT_CONV

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend that builds the metadata of a step; called by vLLM."""
        return StateBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StateSpec:
        """Return the spec of the state; called by vLLM's memory planning."""
        return StateSpec.from_spec(super().get_kv_cache_spec(vllm_config))

    def slots(self, like: Tensor) -> Tensor:
        """Return the blocks (slots, *shape); before vLLM allocates them, one block of zeros on the device of `like`."""
        blocks = self.kv_cache[0]
        return blocks if blocks.numel() else torch.zeros((1, *self.shape), dtype=self.layout.dtype, device=like.device)

    def compute(
        self, state_module: str, part: str, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *more: Any
    ) -> None:
        """Run a computation of a state module in the current step. Output rows after the step's tokens become zero.

        Args:
            state_module: prefix of the state module.
            part: name of the computation.
            inputs: (T, ...) each, one row per token.
            outputs: (T, ...) each; are written.
            more: further arguments that are not per token.
        """
        metadata = self.metadata()
        if metadata is None and (self.kv_cache[0].numel() or self.spare_rows):  # a dummy run
            for out in outputs:
                out.zero_()
            return
        batch = self._dummy_batch(inputs[0]) if metadata is None else metadata.batch()
        count = batch.ragged.num_tokens
        if count < inputs[0].shape[0]:
            for out in outputs:
                out[count:].zero_()
            inputs, outputs = [x[:count] for x in inputs], [out[:count] for out in outputs]
        with forward_batch(batch):
            self.state_modules[state_module].parts[part](*inputs, *more, *outputs)

    def _dummy_batch(self, x: Tensor) -> ForwardBatch:
        """Return a step of one prompt, for vLLM's memory profiling, which runs before blocks are allocated.

        Kernels are thereby compiled before the first request, and the profile includes their memory.
        """
        tokens = x.shape[0]
        ragged = RaggedBatch.from_lengths([tokens], [tokens], x.device)
        return ForwardBatch(ragged, slots=torch.zeros(1, dtype=torch.int64, device=x.device))

    def metadata(self) -> Any:
        """Return the `StateMetadata` of the current step; None in dummy runs."""
        metadata = get_forward_context().attn_metadata
        return metadata.get(self.prefix) if isinstance(metadata, dict) else None
