"""The seam between layers and engines: who supplies projections, embeddings, attention and state.

Layers name no engine's classes; they ask their kit. Widths are those of the whole model, unless a kit is given a
`Split`; a layer learns its rank's own sizes from the kit's `share`.
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

# Of a checkpoint's tensor with several sections, or of one without.
Widths: TypeAlias = int | Sequence[int]


class Kit(Protocol):
    """Parts that an engine supplies to layers.

    `prefix` is the module's dotted path, for errors and per-layer lookups.
    """

    dtype: torch.dtype
    device: torch.device
    group: Group  # the tensor-parallel one
    partition: Partition  # of it

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        """Column-parallel projections of one input, as one product.

        `parts` maps checkpoint names to output widths. A part with several widths is one tensor of the file whose
        sections are sharded separately.
        """
        ...

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        """Like `merged_linear`, but every rank holds all of it: narrow projections in front of wide ones."""
        ...

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        """The query, key and value projections as one product with output [q | k | v]."""
        ...

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        """Row-parallel projection: the input is a column-parallel output, the output has the full width.

        Without `reduce`, which takes no bias, the caller sums over the ranks.
        """
        ...

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        """RMS norm of a column-parallel output, over all ranks' channels."""
        ...

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        """Token embedding, ids (T,) -> (T, hidden)."""
        ...

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        """Logits (T, vocab), fp32, of hidden states; with `tied`, by that embedding's weight."""
        ...

    def attention(self, heads: int, scale: float, spec: PagedState, prefix: str) -> nn.Module:
        """Causal attention of the rank's heads over paged keys and values, which it also writes.

        Its forward is `(q (T, H, D), k (T, KV, D), v (T, KV, D)) -> (T, H, D)`.
        """
        ...

    def experts(self, config: MoEConfig, hidden_size: int, prefix: str) -> nn.Module:
        """Routed experts, the rank's part; the caller sums over the ranks.

        Its forward is `(x (T, H), router logits (T, E), base (T, H) or None) -> (T, H)`; the result includes `base`.
        """
        ...

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> SlotStateModule:
        """Fixed-size states of each request that belong together, the rank's shard; a convolution's window first."""
        ...

    def caller(self, stochastic: nn.Module, prefix: str) -> Callable[..., Tensor] | None:
        """Return the function that calls the active mixer of a stochastic layer; None: the layer does it itself."""
        ...


def sections(widths: Widths) -> Sequence[int]:
    """Return the widths of a part's sections."""
    return (widths,) if isinstance(widths, int) else widths
