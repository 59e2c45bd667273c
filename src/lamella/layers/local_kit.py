"""`LocalKit`: the kit of lamella's own engine, with plain torch modules for one rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lamella.layers.kit import Widths, sections
from lamella.layers.linear import (
    DENSE,
    Biases,
    Embedding,
    Head,
    Linear,
    LinearMethod,
    MergedLinear,
    RowLinear,
    SplitEmbedding,
    SplitHead,
)
from lamella.layers.moe import Experts
from lamella.layers.norm import RMSNorm, SplitRMSNorm
from lamella.layers.state_modules import PagedAttention, SlotStateModule
from lamella.parallel.group import Group
from lamella.parallel.sharding import Split
from lamella.state.spec import PagedState, SlotState

if TYPE_CHECKING:
    from lamella.config import MoEConfig


class LocalKit:
    """Kit of the local engine: plain torch modules on the device of one rank, with uninitialized parameters."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Group | None = None,
        expert_parallel: bool = False,
        linear_method: Callable[[Sequence[str]], LinearMethod] = lambda projections: DENSE,
    ) -> None:
        """Set where and how modules are built.

        Args:
            dtype: dtype of weights and activations.
            device: device of the weights; "meta" allocates no memory.
            group: tensor-parallel group; by default a group of one rank.
            expert_parallel: whether a rank holds some whole experts, instead of a shard of every expert.
            linear_method: returns the method of a module, given the dotted paths of the projections that it contains.
        """
        self.dtype, self.device = dtype, torch.device(device)
        self.group = group or Group()
        self.partition, self.expert_parallel = self.group.partition, expert_parallel
        self._linear_method = linear_method

    @property
    def _is_split(self) -> bool:
        return self.partition.size > 1

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        splits = {
            name: Split.join(self.partition.even(width, f"{prefix}.{name}") for width in sections(widths))
            for name, widths in parts.items()
        }
        return self._merged(in_size, splits, bias, prefix)

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        return self._merged(in_size, {name: Split.whole(width) for name, width in parts.items()}, bias, prefix)

    def _merged(self, in_size: int, parts: Mapping[str, Split], bias: Biases, prefix: str) -> MergedLinear:
        parent = prefix.rpartition(".")[0]
        method = self._linear_method([f"{parent}.{part}" for part in parts])
        return MergedLinear(Split.whole(in_size), parts, bias, self.dtype, self.device, method)

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        queries, keys = self.partition.heads(heads).times(head_dim), self.partition.kv_heads(kv_heads).times(head_dim)
        return self._merged(in_size, {"q_proj": queries, "k_proj": keys, "v_proj": keys}, bias, prefix)

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        assert reduce or not bias
        inputs, outputs, method = (
            self.partition.even(in_size, prefix),
            Split.whole(out_size),
            self._linear_method([prefix]),
        )
        if self._is_split and reduce:
            return RowLinear(inputs, outputs, bias, self.dtype, self.device, self.group, method)
        return Linear(inputs, outputs, bias, self.dtype, self.device, method)

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        if self._is_split:
            return SplitRMSNorm(channels, eps, self.device, self.group)
        return RMSNorm(channels.size, eps, self.device)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        tokens = self.partition.vocabulary(vocab_size)
        if self._is_split:
            return SplitEmbedding(tokens, hidden_size, self.dtype, self.device, self.group)
        return Embedding(tokens, hidden_size, self.dtype, self.device)

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        inputs, outputs = Split.whole(hidden_size), self.partition.vocabulary(vocab_size)
        device = self.device if tied is None else torch.device("meta")
        head = (
            SplitHead(inputs, outputs, self.dtype, device, self.group)
            if self._is_split
            else Head(inputs, outputs, False, self.dtype, device)
        )
        if tied is not None:
            head.weight = tied.weight  # type: ignore[assignment]
        return head

    def attention(self, heads: int, scale: float, spec: PagedState, prefix: str) -> nn.Module:
        return PagedAttention(heads, scale, spec, prefix)

    def experts(self, config: MoEConfig, hidden_size: int, prefix: str) -> nn.Module:
        return Experts(config, self, hidden_size, self.expert_parallel)

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> SlotStateModule:
        return SlotStateModule(specs, prefix)

    def caller(self, stochastic: nn.Module, prefix: str) -> None:
        return None
