"""Modules that hold a layer's state: paged keys and values, or slots. They are what an engine binds memory to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.segments import segments, windows
from lamella.ops import attention
from lamella.ops.attention.paged import AttentionPlan
from lamella.ops.operands import ConvState, PagedCache, QKVSteps
from lamella.state.spec import PagedState, SlotState

# What reads and writes slot state: its inputs, then where its outputs go, or None where it makes them.
Computation: TypeAlias = Callable[..., Any]


class SlotRows(NamedTuple):
    """Slot state of a batch.

    Attributes:
        tensors: (slots, *shape), one for each spec.
        slots: (R,) int64, the slot of each request.
    """

    tensors: Sequence[Tensor]
    slots: Tensor


class PagedAttention(nn.Module):
    """Attention over blocks that an engine binds, or over the tokens of the step in a plain forward."""

    def __init__(self, heads: int, scale: float, spec: PagedState, prefix: str) -> None:
        super().__init__()
        self.heads, self.scale, self.spec, self.prefix = heads, scale, spec, prefix
        self.specs = (spec,)
        self.bound: tuple[Tensor, Tensor] | None = None

    def bind(self, *tensors: Tensor) -> None:
        """Use these caches (blocks, block_size, KV, D) for this layer's keys and values."""
        k_cache, v_cache = tensors
        self.bound = k_cache, v_cache

    @property
    def k_cache(self) -> Tensor:
        """The bound cache of keys."""
        return self._require_bound()[0]

    @property
    def v_cache(self) -> Tensor:
        """The bound cache of values."""
        return self._require_bound()[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v (T, KV, D) to the cache, and return attention of q (T, H, D) over all that it holds."""
        batch = require_batch()
        if batch.blocks is None:
            spec = self.spec
            return attention.causal_attention(q, k, v, batch.ragged, self.scale, spec.window, spec.chunk)
        attention.write_kv(k, v, self.cache())
        return self.read(q)

    def cache(self) -> PagedCache:
        """Return the cache with the current step's block table and slot mapping."""
        view = require_batch().blocks_of(self.spec)
        return PagedCache(*self._require_bound(), view.block_table, view.slot_mapping)

    def read(self, q: Tensor) -> Tensor:
        """Return attention of q (T, H, D) over the cache, the step's own keys and values included."""
        batch, spec = require_batch(), self.spec
        return attention.paged_attention(
            q, self.cache(), batch.ragged, self.scale, spec.window, spec.chunk, self._plan(batch)
        )

    def decode(self, qkv: Tensor, steps: QKVSteps) -> Tensor:
        """Return attention (T, H, D) of the projected qkv of few requests; see `decode_prepared`."""
        batch, spec = require_batch(), self.spec
        plan = self._plan(batch)
        assert plan is not None, "steps of few requests need the engine's AttentionSpace"
        return attention.decode_prepared(
            qkv, steps, self.cache(), batch.ragged, self.scale, spec.window, spec.chunk, plan
        )

    def _require_bound(self) -> tuple[Tensor, Tensor]:
        assert self.bound is not None, f"{self.prefix}: no blocks bound"
        return self.bound

    def _plan(self, batch: ForwardBatch) -> AttentionPlan | None:
        """Return the step's plan, made once for all layers like this one; None where the device needs none."""
        spec, space = self.spec, batch.attention
        if space is None:
            return None
        return batch.once(
            ("attention", spec, self.heads, self.scale),
            lambda: AttentionPlan(
                space, batch.ragged, batch.blocks_of(spec).block_list, self.heads, spec.kv_heads, spec.head_dim,
                self.k_cache.shape[1], spec.dtype, self.scale, spec.window, chunk=spec.chunk,
            ),
        )  # fmt: skip


class SlotStateModule(nn.Module):
    """Holds slot tensors, each (slots, *shape), and knows what reads and writes them; computes nothing itself.

    Attributes:
        parts: the computations over the state, by names that are the layer's own.
        channels: of parts that read and write only some channels of the first tensor, which.
        convolutions: parts that only keep their first input's latest rows, in the first tensor.
        inline: whether what is computed over the state may be a part of a larger kernel, in place of `run`.
    """

    inline = True

    def __init__(self, specs: Sequence[SlotState], prefix: str) -> None:
        super().__init__()
        self.specs, self.prefix = tuple(specs), prefix
        self.rows: tuple[Tensor, ...] = ()
        self.parts: dict[str, Computation] = {}
        self.channels: dict[str, slice] = {}
        self.convolutions: set[str] = set()

    def bind(self, *tensors: Tensor) -> None:
        """The slots (slots, *shape), a tensor for each spec."""
        self.rows = tensors

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """Return one of the `parts` of inputs (T, ...): (T, width)."""
        batch = require_batch()
        if not batch.snapshots:
            result: Tensor = self.parts[part](*inputs, None)
            return result
        kept = windows(batch, self.specs[0].shape[0]) if part in self.convolutions else None
        if kept is not None:
            result = self.parts[part](*inputs, None)
            tokens, targets = kept
            self.rows[0][..., self.channels[part]].index_copy_(0, targets, inputs[0][tokens])
            return result
        out = inputs[0].new_empty(inputs[0].shape[0], width)
        for segment in segments(batch):
            with forward_batch(segment.batch):
                out[segment.tokens] = self.parts[part](*(x[segment.tokens] for x in inputs), None)
            if segment.copies is not None:
                self._copy(part, *segment.copies)
        return out

    def _copy(self, part: str, sources: Tensor, targets: Tensor) -> None:
        """Copy slots, as far as a part reads and writes them: others of the layer stand at other tokens."""
        channels = self.channels.get(part)
        for rows in self.rows if channels is None else (self.rows[0][..., channels],):
            rows[targets] = rows[sources]

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return one of the `parts` of the weighted RMS norm of x + residual, all (T, C), and the sum.

        Only state_modules that are not `inline` have it.
        """
        raise NotImplementedError

    def current(self) -> SlotRows | None:
        """Return the slot state of the current batch; None in a plain forward."""
        slots = require_batch().slots
        if slots is None:
            return None
        assert self.rows, f"{self.prefix}: no slots bound"
        return SlotRows(self.rows, slots)

    def window(self, channels: slice, x: Tensor | None) -> ConvState | None:
        """Return the state of a convolution of these channels; None in a plain forward.

        The histories hold the inputs before x (T, channels); after the step they must hold those before the next
        step's.
        """
        current = self.current()
        return None if current is None else ConvState(current.tensors[0][:, :, channels], current.slots)


def find_state_modules(model: nn.Module) -> list[PagedAttention | SlotStateModule]:
    """Every module of `model` that keeps state, in layer order."""
    return [module for module in model.modules() if isinstance(module, PagedAttention | SlotStateModule)]
