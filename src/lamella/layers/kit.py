"""`Kit`: the interface by which an engine supplies layers with projections, embeddings, attention and state.

Layers never name an engine's classes. Sizes passed to a kit are those of the whole model, except in a `Split`. A layer
gets the sizes of its rank from the kit's `partition`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lamella.layers.linear import Biases
from lamella.layers.norm import RMSNorm
from lamella.layers.state_modules import SlotStateModule
from lamella.parallel.group import Group
from lamella.parallel.sharding import Partition, Split
from lamella.state.spec import PagedState, SlotState

if TYPE_CHECKING:
    from lamella.config import MoEConfig

# Output width of a checkpoint tensor, or the widths of its sections.
Widths: TypeAlias = int | Sequence[int]


class Kit(Protocol):
    """Factory for the engine-specific modules of a layer.

    The argument `prefix` of the methods is the module's dotted path; it is used for errors and per-layer lookups.

    Attributes:
        dtype: of weights and activations.
        device: where parameters are allocated.
        group: tensor-parallel process group.
        partition: position of this rank in `group`.
    """

    dtype: torch.dtype
    device: torch.device
    group: Group
    partition: Partition

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        """Return column-parallel projections of one input, computed as one matrix product.

        Args:
            in_size: input channels.
            parts: output widths by checkpoint name. A part with several widths is one checkpoint tensor whose sections
                are sharded separately.
            bias: whether the projections have a bias.
            prefix: dotted path of the module.
        """
        ...

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        """Return projections like `merged_linear`, but replicated on every rank; for narrow (low-rank) projections."""
        ...

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        """Return the query, key and value projections as one product with output [q | k | v]."""
        ...

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        """Return a row-parallel projection: column-parallel input, output of full width.

        Args:
            in_size: input channels over all ranks.
            out_size: output channels.
            bias: whether the projection has a bias; not supported with `reduce=False`.
            prefix: dotted path of the module.
            reduce: whether the module sums over the ranks. If False, the caller must.
        """
        ...

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        """Return the RMS norm of a column-parallel output over the channels of all ranks."""
        ...

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        """Return the token embedding; its forward is `ids (T,) -> (T, hidden_size)`."""
        ...

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        """Return the head; its forward is `(T, hidden_size) -> logits (T, vocab_size) fp32`.

        With `tied`, the head uses the weight of that embedding.
        """
        ...

    def attention(self, heads: int, scale: float, spec: PagedState, prefix: str) -> nn.Module:
        """Return causal attention of this rank's heads over paged state.

        Its forward is `(q (T, H, D), k (T, KV, D), v (T, KV, D)) -> (T, H, D)`; it writes k and v to the cache first.
        """
        ...

    def experts(self, config: MoEConfig, hidden_size: int, prefix: str) -> nn.Module:
        """Return the routed experts of this rank; the caller sums over the ranks.

        The forward is `(x (T, H), router logits (T, E), base (T, H) or None) -> (T, H)`; the result includes `base`.
        """
        ...

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> SlotStateModule:
        """Return the module for this rank's slot state of one mixer or layer; a convolution window must come first."""
        ...

    def caller(self, stochastic: nn.Module, prefix: str) -> Callable[..., Tensor] | None:
        """Return a function that calls the active mixer of a stochastic layer; None if the layer calls it itself."""
        ...


def sections(widths: Widths) -> Sequence[int]:
    """Return the widths of the sections of a checkpoint tensor."""
    return (widths,) if isinstance(widths, int) else widths
