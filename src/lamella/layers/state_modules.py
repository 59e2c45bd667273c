"""State modules: the modules to which an engine binds paged key/value memory or slot memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from lamella.layers.context import ForwardBatch, forward_batch, require_batch
from lamella.layers.segments import segments, snapshot_windows
from lamella.ops import attention
from lamella.ops.attention.paged import AttentionPlan
from lamella.ops.operands import ConvState, PagedCache, QKVSteps
from lamella.state.spec import PagedState, SlotState

# Reads and writes slot state: (*inputs, out) -> output; `out` is None if the function allocates the output.
Computation: TypeAlias = Callable[..., Any]


class SlotRows(NamedTuple):
    """Slot tensors and the slots of the current batch.

    Attributes:
        tensors: (num_slots, *shape), one tensor per spec.
        slots: (R,) int64, slot of each request.
    """

    tensors: Sequence[Tensor]
    slots: Tensor


class PagedAttention(nn.Module):
    """Causal attention over a paged KV cache; in a plain forward, over the tokens of the step only.

    Attributes:
        heads: query heads of this rank.
        scale: factor of the scores.
        spec: paged state of the layer.
        prefix: dotted path of the module.
        bound: key and value cache (blocks, block_size, KV, D) each; None before `bind`.
    """

    def __init__(self, heads: int, scale: float, spec: PagedState, prefix: str) -> None:
        super().__init__()
        self.heads, self.scale, self.spec, self.prefix = heads, scale, spec, prefix
        self.specs = (spec,)
        self.bound: tuple[Tensor, Tensor] | None = None

    def bind(self, *tensors: Tensor) -> None:
        """Bind the key cache and the value cache, (blocks, block_size, KV, D) each."""
        k_cache, v_cache = tensors
        self.bound = k_cache, v_cache

    @property
    def k_cache(self) -> Tensor:
        """The bound key cache (blocks, block_size, KV, D)."""
        return self._require_bound()[0]

    @property
    def v_cache(self) -> Tensor:
        """The bound value cache (blocks, block_size, KV, D)."""
        return self._require_bound()[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write k and v (T, KV, D) to the cache; return the attention (T, H, D) of q (T, H, D) over the cache."""
        batch = require_batch()
        if batch.blocks is None:
            spec = self.spec
            return attention.causal_attention(q, k, v, batch.ragged, self.scale, spec.window, spec.chunk)
        attention.write_kv(k, v, self.cache())
        return self.read(q)

    def cache(self) -> PagedCache:
        """Return the bound caches with the block table and slot mapping of the current step."""
        view = require_batch().blocks_of(self.spec)
        return PagedCache(*self._require_bound(), view.block_table, view.slot_mapping)

    def read(self, q: Tensor) -> Tensor:
        """Return the attention (T, H, D) of q (T, H, D) over the cache, which already includes the step's tokens."""
        batch, spec = require_batch(), self.spec
        return attention.paged_attention(
            q, self.cache(), batch.ragged, self.scale, spec.window, spec.chunk, self._plan(batch)
        )

    def decode(self, qkv: Tensor, steps: QKVSteps) -> Tensor:
        """Return the attention (T, H, D) of projected qkv for a few decoding requests; see `decode_prepared`."""
        batch, spec = require_batch(), self.spec
        plan = self._plan(batch)
        assert plan is not None, "decode() needs the engine's AttentionSpace in the batch"
        return attention.decode_prepared(
            qkv, steps, self.cache(), batch.ragged, self.scale, spec.window, spec.chunk, plan
        )

    def _require_bound(self) -> tuple[Tensor, Tensor]:
        assert self.bound is not None, f"{self.prefix}: no blocks bound"
        return self.bound

    def _plan(self, batch: ForwardBatch) -> AttentionPlan | None:
        """Return the attention plan of the step, shared by layers with the same shape; None on a CPU."""
        spec, space = self.spec, batch.attention
        if space is None:
            return None
        return batch.compute_once(
            ("attention", spec, self.heads, self.scale),
            lambda: AttentionPlan(
                space, batch.ragged, batch.blocks_of(spec).block_list, self.heads, spec.kv_heads, spec.head_dim,
                self.k_cache.shape[1], spec.dtype, self.scale, spec.window, chunk=spec.chunk,
            ),
        )  # fmt: skip


class SlotStateModule(nn.Module):
    """Slot tensors of a layer or mixer, and the computations that read and write them.

    Attributes:
        specs: one spec per slot tensor.
        rows: bound slot tensors, (num_slots, *shape) each; empty before `bind`.
        parts: computations over the state, by names that the layer chooses.
        channels: channels of the first tensor, for parts that use only some of them.
        convolutions: parts whose only state is the latest rows of their first input, in the first tensor.
        inline: True if a layer may compute on the state directly, in a larger kernel, instead of calling `run`.
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
        """Bind the slot tensors, (num_slots, *shape) for each spec."""
        self.rows = tensors

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """Run one of the `parts` over the current batch, and store the batch's snapshots.

        Args:
            part: name of the computation.
            inputs: its inputs, (T, ...) each.
            width: channels of its output.

        Returns:
            (T, width).
        """
        batch = require_batch()
        if not batch.snapshots:
            result: Tensor = self.parts[part](*inputs, None)
            return result
        window_copies = snapshot_windows(batch, self.specs[0].shape[0]) if part in self.convolutions else None
        if window_copies is not None:
            result = self.parts[part](*inputs, None)
            tokens, targets = window_copies
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
        """Copy slots, but only the channels of `part`: other parts of the layer have processed other tokens."""
        channels = self.channels.get(part)
        for rows in self.rows if channels is None else (self.rows[0][..., channels],):
            rows[targets] = rows[sources]

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Run one of the `parts` on the weighted RMS norm of `x + residual`.

        Implemented only by state modules that are not `inline`.

        Args:
            part: name of the computation.
            x: (T, C).
            residual: (T, C).
            weight: (C,) fp32.
            eps: added to the mean square.

        Returns:
            The output and the sum `x + residual`, (T, C) each.
        """
        raise NotImplementedError

    def current(self) -> SlotRows | None:
        """Return the slot tensors and slots of the current batch; None in a plain forward."""
        slots = require_batch().slots
        if slots is None:
            return None
        assert self.rows, f"{self.prefix}: no slots bound"
        return SlotRows(self.rows, slots)

    def window(self, channels: slice, x: Tensor | None) -> ConvState | None:
        """Return the convolution state of some channels; None in a plain forward.

        Args:
            channels: channels of the first slot tensor.
            x: input of the convolution (T, channels); unused here, needed by subclasses that are not `inline`.

        Returns:
            The inputs before `x`. The convolution must update them to the latest inputs, including `x`.
        """
        current = self.current()
        return None if current is None else ConvState(current.tensors[0][:, :, channels], current.slots)


def find_state_modules(model: nn.Module) -> list[PagedAttention | SlotStateModule]:
    """Return the state modules of `model` in layer order."""
    return [module for module in model.modules() if isinstance(module, PagedAttention | SlotStateModule)]
