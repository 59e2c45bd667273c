"""The seam between layers and engines: who supplies projections, embeddings, attention and state.

Layers name no engine's classes; they ask their kit. `LocalKit` is plain torch on one device, or one of several.

Widths are those of the whole model, unless a kit is given a `Split`; what a layer needs to know of its rank's own sizes
it learns from the kit's `share`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lamella.layers.context import ForwardBatch, require_batch
from lamella.layers.linear import Biases, Embedding, Head, Linear, MergedLinear, RowLinear, SplitEmbedding, SplitHead
from lamella.layers.norm import RMSNorm, SplitRMSNorm
from lamella.ops import attention, opaque
from lamella.ops.attention.paged import AttentionPlan
from lamella.parallel.group import Group
from lamella.parallel.sharding import Share, Split
from lamella.state.spec import PagedState, SlotState

if TYPE_CHECKING:
    from lamella.config import MoEConfig

# What reads and writes slot state: its inputs, then where its outputs go, or None where it makes them.
Computation: TypeAlias = Callable[..., Any]

# Of a checkpoint's tensor with several sections, or of one without.
Widths: TypeAlias = int | Sequence[int]


class Kit(Protocol):
    """What a layer may ask for. `prefix` is the module's dotted path, for error messages and per-layer lookups."""

    dtype: torch.dtype
    device: torch.device
    group: Group  # the tensor-parallel one
    share: Share  # of it

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        """Column-parallel projections of one input as one product; `parts` maps checkpoint names to widths, several
        where one tensor of the file has sections that are divided each by itself.
        """
        ...

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        """The same where every rank holds all of it: narrow projections in front of wide ones."""
        ...

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        """The query, key and value projections as one product with output [q | k | v]."""
        ...

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        """A projection back to the full width, whose input is what a column-parallel one left. Without `reduce`, which
        takes no bias, it is left to the caller to sum over the ranks.
        """
        ...

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        """RMS norm of what column-parallel projections left, over all ranks' channels."""
        ...

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        """Token embedding, ids (T,) -> (T, hidden)."""
        ...

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        """Logits (T, vocab), fp32, of hidden states; with `tied`, over that embedding's weight."""
        ...

    def attention(self, heads: int, scale: float, spec: PagedState, prefix: str) -> nn.Module:
        """Causal attention `(q (T, H, D), k (T, KV, D), v) -> (T, H, D)` of the rank's heads, that keeps its keys and
        values.
        """
        ...

    def experts(self, config: MoEConfig, hidden_size: int, prefix: str) -> nn.Module:
        """Routed experts, `(x (T, H), the router's logits (T, E), base (T, H) or None) -> (T, H)`: the rank's part of a
        sum over the ranks, which is left to the caller, added to base.
        """
        ...

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> SlotHolder:
        """Fixed-size states for each request that belong together, the rank's part; a convolution's window first."""
        ...

    def caller(self, stochastic: nn.Module, prefix: str) -> Callable[..., Tensor] | None:
        """Who calls the active mixer of a stochastic layer, as the layer is called; None: the layer itself."""
        ...


class PagedAttention(nn.Module):
    """Attention over pages that an engine binds, or over the tokens at hand in a plain forward."""

    def __init__(self, heads: int, scale: float, spec: PagedState, prefix: str) -> None:
        super().__init__()
        self.heads, self.scale, self.spec, self.prefix = heads, scale, spec, prefix
        self.specs = (spec,)
        self.k_cache: Tensor | None = None
        self.v_cache: Tensor | None = None
        self.handle: Tensor | None = None  # of a compiling engine, see ops.opaque

    def bind(self, *tensors: Tensor) -> None:
        """Caches (pages, page_size, KV, D) of this layer's keys and values."""
        self.k_cache, self.v_cache = tensors

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.handle is not None and torch.compiler.is_compiling():
            return opaque.call(self.handle, "attention", (q, k, v), self.spec.head_dim)
        batch = require_batch()
        if batch.pages is None:
            spec = self.spec
            return attention.causal_attention(q, k, v, batch.ragged, self.scale, spec.window, spec.chunk)
        attention.write_kv(k, v, *self.target())
        return self.read(q)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """The same of [q, k, v], untraced."""
        return self(*inputs)

    def target(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the step's keys and values go: both caches, and the flat rows (T,) in them."""
        pages = require_batch().pages
        assert pages is not None
        assert self.k_cache is not None and self.v_cache is not None, f"{self.prefix}: no pages bound"
        return self.k_cache, self.v_cache, pages[self.spec].new_rows

    def read(self, q: Tensor) -> Tensor:
        """Attention of q (T, H, D) over the pages, the step's own keys and values included."""
        batch, spec = require_batch(), self.spec
        k_cache, v_cache, _ = self.target()
        assert batch.pages is not None
        table = batch.pages[spec].page_table
        return attention.paged_attention(
            q, k_cache, v_cache, table, batch.ragged, self.scale, spec.window, self._plan(batch), spec.chunk
        )

    def decode(self, qkv: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Attention (T, H, D) of the projected qkv of few requests, made ready by `options`, see `decode_prepared`."""
        batch, plan = require_batch(), self._plan(require_batch())
        assert batch.pages is not None and plan is not None
        table = batch.pages[self.spec].page_table
        return attention.decode_prepared(qkv, self.heads, table, self.scale, self.spec.window, plan, options)

    def _plan(self, batch: ForwardBatch) -> AttentionPlan | None:
        """The step's plan, once for all layers like this one; None where the device needs none."""
        spec, space = self.spec, batch.attention
        if space is None or batch.pages is None or self.k_cache is None:
            return None
        view, page_size = batch.pages[spec], self.k_cache.shape[1]
        return batch.once(
            ("attention", spec, self.heads, self.scale),
            lambda: AttentionPlan(
                space, batch.ragged, view.page_list, self.heads, spec.kv_heads, spec.head_dim, page_size, spec.dtype,
                self.scale, spec.window, chunk=spec.chunk,
            ),
        )  # fmt: skip


class SlotHolder(nn.Module):
    """Holds slot tensors, each (slots, *shape), and knows what reads and writes them; computes nothing itself.

    Attributes:
        parts: the computations over the state, by names that are the layer's own.
        inline: whether what is computed over the state may be a part of a larger kernel, in place of `run`.
    """

    inline = True

    def __init__(self, specs: Sequence[SlotState], prefix: str) -> None:
        super().__init__()
        self.specs, self.prefix = tuple(specs), prefix
        self.rows: tuple[Tensor, ...] = ()
        self.handle: Tensor | None = None  # of a compiling engine, see ops.opaque
        self.parts: dict[str, Computation] = {}

    def bind(self, *tensors: Tensor) -> None:
        """The slots (slots, *shape), a tensor for each spec."""
        self.rows = tensors

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """One of the `parts` of inputs (T, ...): (T, width)."""
        if self.handle is not None and torch.compiler.is_compiling():
            return opaque.call(self.handle, part, inputs, width)
        return self.compute(part, inputs)

    def compute(self, part: str, inputs: Sequence[Tensor]) -> Tensor:
        """The same, untraced."""
        result: Tensor = self.parts[part](*inputs, None)
        return result

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """One of the `parts` of the weighted RMS norm of x + residual, all (T, C), where the holder is not `inline`;
        and the sum.
        """
        raise NotImplementedError

    def current(self) -> tuple[Sequence[Tensor], Tensor] | tuple[Sequence[None], None]:
        """The slots, a tensor for each spec, and the slot ids (R,) of the requests in flight; Nones in a plain
        forward.
        """
        batch = require_batch()
        if batch.slots is None:
            return (None,) * len(self.specs), None
        assert self.rows, f"{self.prefix}: no slots bound"
        return self.rows, batch.slots

    def window(self, channels: slice, x: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of a convolution's state, (slots, W-1, channels): what stood before its input x (T, channels) is in the rows
        of the slot ids (R,), and what stands before the next step's must be there afterwards.
        """
        (rows, *_), slots = self.current()
        return (None, None) if rows is None or slots is None else (rows[:, :, channels], slots)


class LocalKit:
    """Plain torch modules on the device of one rank, their parameters allocated but not initialised."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        group: Group | None = None,
        expert_parallel: bool = False,
    ) -> None:
        """With `expert_parallel` a rank has some experts whole, in place of a part of each."""
        self.dtype, self.device = dtype, torch.device(device)
        self.group = group or Group()
        self.share, self.expert_parallel = self.group.share, expert_parallel

    @property
    def _is_split(self) -> bool:
        return self.share.size > 1

    def merged_linear(self, in_size: int, parts: Mapping[str, Widths], bias: bool, prefix: str) -> nn.Module:
        splits = {
            name: Split.join(self.share.even(width, f"{prefix}.{name}") for width in sections(widths))
            for name, widths in parts.items()
        }
        return MergedLinear(Split.whole(in_size), splits, bias, self.dtype, self.device)

    def replicated_linear(self, in_size: int, parts: Mapping[str, int], bias: bool, prefix: str) -> nn.Module:
        splits = {name: Split.whole(width) for name, width in parts.items()}
        return MergedLinear(Split.whole(in_size), splits, bias, self.dtype, self.device)

    def qkv_linear(
        self, in_size: int, heads: int, kv_heads: int, head_dim: int, bias: Biases, prefix: str
    ) -> nn.Module:
        queries, keys = self.share.heads(heads).times(head_dim), self.share.kv_heads(kv_heads).times(head_dim)
        parts = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return MergedLinear(Split.whole(in_size), parts, bias, self.dtype, self.device)

    def row_linear(self, in_size: int, out_size: int, bias: bool, prefix: str, reduce: bool = True) -> nn.Module:
        assert reduce or not bias
        inputs, outputs = self.share.even(in_size, prefix), Split.whole(out_size)
        if self._is_split and reduce:
            return RowLinear(inputs, outputs, bias, self.dtype, self.device, self.group)
        return Linear(inputs, outputs, bias, self.dtype, self.device)

    def column_norm(self, channels: Split, eps: float) -> RMSNorm:
        if self._is_split:
            return SplitRMSNorm(channels, eps, self.device, self.group)
        return RMSNorm(channels.size, eps, self.device)

    def embedding(self, vocab_size: int, hidden_size: int, prefix: str) -> nn.Module:
        tokens = self.share.vocabulary(vocab_size)
        if self._is_split:
            return SplitEmbedding(tokens, hidden_size, self.dtype, self.device, self.group)
        return Embedding(tokens, hidden_size, self.dtype, self.device)

    def lm_head(self, vocab_size: int, hidden_size: int, tied: nn.Module | None, prefix: str) -> nn.Module:
        inputs, outputs = Split.whole(hidden_size), self.share.vocabulary(vocab_size)
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
        from lamella.layers.moe import Experts

        return Experts(config, self, hidden_size, self.expert_parallel)

    def slot_state(self, specs: Sequence[SlotState], prefix: str) -> SlotHolder:
        return SlotHolder(specs, prefix)

    def caller(self, stochastic: nn.Module, prefix: str) -> None:
        return None


def sections(widths: Widths) -> Sequence[int]:
    """The widths of a part's sections."""
    return (widths,) if isinstance(widths, int) else widths


def state_holders(model: nn.Module) -> list[PagedAttention | SlotHolder]:
    """Every module of `model` that keeps state, in layer order."""
    return [module for module in model.modules() if isinstance(module, PagedAttention | SlotHolder)]
