"""Modules that hold a layer's state: paged keys and values, or slots. They are what an engine binds memory to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lamella.layers.context import ForwardBatch, require_batch
from lamella.ops import attention, opaque
from lamella.ops.attention.paged import AttentionPlan
from lamella.state.spec import PagedState, SlotState

# What reads and writes slot state: its inputs, then where its outputs go, or None where it makes them.
Computation: TypeAlias = Callable[..., Any]


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
        """Write k and v (T, KV, D) to the cache, and return attention of q (T, H, D) over all that it holds."""
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
        """Return one of the `parts` of the weighted RMS norm of x + residual, all (T, C), and the sum.

        Only holders that are not `inline` have it.
        """
        raise NotImplementedError

    def current(self) -> tuple[Sequence[Tensor], Tensor] | tuple[Sequence[None], None]:
        """Return the slots, a tensor for each spec, and the slot ids (R,) of the batch; Nones in a plain forward."""
        batch = require_batch()
        if batch.slots is None:
            return (None,) * len(self.specs), None
        assert self.rows, f"{self.prefix}: no slots bound"
        return self.rows, batch.slots

    def window(self, channels: slice, x: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return a convolution's history (slots, W-1, channels) and the slot ids (R,); Nones in a plain forward.

        The rows hold the inputs before x (T, channels); after the step they must hold those before the next step's.
        """
        (rows, *_), slots = self.current()
        return (None, None) if rows is None or slots is None else (rows[:, :, channels], slots)


def state_holders(model: nn.Module) -> list[PagedAttention | SlotHolder]:
    """Every module of `model` that keeps state, in layer order."""
    return [module for module in model.modules() if isinstance(module, PagedAttention | SlotHolder)]
