"""`VllmKit`: the kit that builds lamella's layers from vLLM's modules."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from lamella.config import ModelConfig, MoEConfig
from lamella.layers.kit import Widths, sections
from lamella.layers.linear import Biases, MergedLinear, without_bias
from lamella.layers.moe import Experts
from lamella.layers.norm import RMSNorm, SplitRMSNorm
from lamella.layers.supernet.stochastic import Stochastic
from lamella.models.names import rename
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition, Split
from lamella.state.spec import PagedState, SlotState
from lamella.vllm_plugin import compat
from lamella.vllm_plugin.attention import VllmAttention
from lamella.vllm_plugin.chooser import Chooser
from lamella.vllm_plugin.experts import VllmExperts
from lamella.vllm_plugin.packed import PackedProjections, Shard
from lamella.vllm_plugin.state.layer import StateLayer
from lamella.vllm_plugin.state.layout import StateLayout, decoder_layer
from lamella.vllm_plugin.state.state_module import VllmStateModule

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.lamella")  # a child of vLLM's logger, so that vLLM formats the lines


class VllmGroup(Group):
    """Tensor-parallel group of vLLM."""

    def __init__(self) -> None:
        """Read rank and size from vLLM."""
        super().__init__(Partition(get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()))

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum over the ranks."""
        return tensor_model_parallel_all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the tensors of all ranks, concatenated along the last dimension."""
        return tensor_model_parallel_all_gather(x)


class VllmKit:
    """Kit with vLLM's projections, embeddings and attention, quantization and tensor parallelism; see `Kit`.

    Attributes:
        packed: modules that hold several projections of a checkpoint, with these projections.
    """

    def __init__(self, config: VllmConfig, model: ModelConfig, names: Mapping[str, str]) -> None:
        """Plan the slot state.

        Args:
            config: vLLM's config.
            model: config of the model to build.
            names: checkpoint names by lamella's names, see `Architecture.checkpoint_names`.
        """
        self.config, self._names = config, names
        self.dtype, self.device = (
            config.model_config.dtype,
            torch.empty(0).device,
        )  # vLLM sets the default device while it builds a model
        self.group: Group = VllmGroup()
        self.partition = self.group.partition
        # All layers use slots of one shape, so that vLLM puts them into one group with small blocks.
        self._layout = StateLayout.from_model(model, self.partition, self.dtype)
        self._spare_rows = compat.num_speculative_tokens(config)
        self._state_layers: dict[str, StateLayer] = {}
        self.packed: dict[nn.Module, PackedProjections] = {}
        if self._layout is not None:
            layers = len(model.layers)
            size = layers * math.prod(self._layout.block(self._spare_rows)) * self._layout.dtype.itemsize
            logger.info("state: %.2f MB a request, in one group of %d layers", size / 1e6, layers)

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        widths: list[int] = []
        shards: dict[str, list[Shard]] = {}
        for name, each in parts.items():
            start = 0
            for width in sections(each):
                self.partition.even(width, f"{prefix}.{name}")
                shards.setdefault(name, []).append(Shard(len(widths), start, start + width))
                widths.append(width)
                start += width
        linear = MergedColumnParallelLinear(in_size, widths, bias=bias, **self._common(prefix))
        self.packed[linear] = PackedProjections(shards)
        return linear

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        # lamella's own module: narrow projections gain nothing from quantization, and vLLM has no merged replicated
        # linear.
        splits = {name: Split.whole(width) for name, width in parts.items()}
        return MergedLinear(Split.whole(in_size), splits, bias, self.dtype, self.device)

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        linear = QKVParallelLinear(in_size, head_dim, heads, kv_heads, bias=bool(bias), **self._common(prefix))
        shards = {f"{name}_proj": [Shard(name)] for name in "qkv"}
        self.packed[linear] = PackedProjections(shards, without_bias(shards, bias))
        if self.packed[linear].unbiased:
            with torch.no_grad():
                linear.bias.zero_()
        return linear

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        self.partition.even(in_size, prefix)
        return RowParallelLinear(in_size, out_size, bias=bias, reduce_results=reduce, **self._common(prefix))

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        if self.partition.size > 1:
            return SplitRMSNorm(channels, eps, self.device, self.group)
        return RMSNorm(channels.size, eps, self.device)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        return VocabParallelEmbedding(vocab_size, hidden_size, **self._quantised(prefix))

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        head = ParallelLMHead(vocab_size, hidden_size, **self._quantised(prefix))
        return head if tied is None else head.tie_weights(tied)

    def experts(self, config: MoEConfig, hidden_size: int, prefix: str) -> nn.Module:
        if self.config.quant_config is None and not self.config.parallel_config.enable_expert_parallel:
            return Experts(config, self, hidden_size)
        return VllmExperts(config, hidden_size, **self._quantised(prefix))

    def attention(self, heads: int, scale: float, spec: PagedState, prefix: str) -> nn.Module:
        return VllmAttention(heads, scale, spec, self.config, prefix)

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> VllmStateModule:
        assert self._layout is not None
        name = decoder_layer(prefix)
        if name not in self._state_layers:
            self._state_layers[name] = StateLayer(self._layout, self._spare_rows, f"{name}.state")
        return VllmStateModule(specs, self._state_layers[name], prefix)

    def caller(self, stochastic: nn.Module, prefix: str) -> Chooser | None:
        assert isinstance(stochastic, Stochastic)
        return Chooser(stochastic, prefix) if len(stochastic.mixers) > 1 else None

    def _common(self, prefix: str) -> dict[str, Any]:
        return {"return_bias": False, **self._quantised(prefix)}

    def _quantised(self, prefix: str) -> dict[str, Any]:
        # A quantization config lists unquantised modules by their names in the file, and by patterns of these names.
        return {"quant_config": self.config.quant_config, "prefix": rename(prefix, self._names)}
