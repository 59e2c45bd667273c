"""State module for mixers and convolutions whose slot state is in vLLM's blocks.

Each computation over state is one custom operation, which torch.compile and piecewise CUDA graphs do not look into.
Inside the operation, layers compute as in lamella's own engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lamella.layers.context import require_batch
from lamella.layers.state_modules import SlotRows, SlotStateModule
from lamella.ops.operands import ConvState, ResidualNorm
from lamella.ops.rms_norm import add_rms_norm
from lamella.state.spec import SlotState
from lamella.vllm_plugin import operations  # noqa: F401 - registers torch.ops.lamella
from lamella.vllm_plugin.state.layer import StateLayer
from lamella.vllm_plugin.state.layout import padded_bytes
from lamella.vllm_plugin.state.windows import advance_window


class VllmStateModule(SlotStateModule):
    """Slot state in a region of the blocks of a `StateLayer`. The mixers of a stochastic layer share a region."""

    inline = False

    def __init__(self, specs: Sequence[SlotState], layer: StateLayer, prefix: str) -> None:
        """Register the state module with the layer.

        Args:
            specs: its slot states.
            layer: state layer with the blocks.
            prefix: dotted path of the state module.
        """
        super().__init__(specs, prefix)
        self.layer = layer
        layer.state_modules[prefix] = self

    def run(self, part: str, inputs: Sequence[Tensor], width: int) -> Tensor:
        """Run one of the `parts` in a custom operation; see `SlotStateModule.run`."""
        out = inputs[0].new_empty(inputs[0].shape[0], width)
        torch.ops.lamella.stateful(list(inputs), out, self.layer.prefix, self.prefix, part)
        return out

    def run_after_norm(
        self, part: str, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """Run one of the `parts` on the norm of x + residual; see `SlotStateModule.run_after_norm`."""
        if self.layer.spare_rows:  # speculation stores the normed rows, so they must be computed separately
            normed, total = add_rms_norm(x, ResidualNorm(residual, weight, eps))
            return self.run(part, (normed,), x.shape[1]), total
        out, total = torch.empty_like(x), torch.empty_like(x)
        torch.ops.lamella.stateful_after_norm(
            x, residual, weight, eps, out, total, self.layer.prefix, self.prefix, f"{part}.after_norm"
        )
        return out, total

    def current(self) -> SlotRows | None:
        """Return the slot tensors as views of vLLM's blocks; see `SlotStateModule.current`."""
        slots = require_batch().slots
        if slots is None:
            return None
        rows = self.layer.slots(slots)
        if self.layer.layout.offsets is None:
            return SlotRows((rows,), slots)
        views, start = [], self.layer.layout.offsets[self.prefix]
        for spec in self.specs:
            part = rows[:, start : start + spec.bytes_per_request]
            views.append(part.view(spec.dtype).unflatten(1, spec.shape))
            start += padded_bytes(spec)
        return SlotRows(views, slots)

    def window(self, channels: slice, x: Tensor | None) -> ConvState | None:
        """Return the convolution state of some channels; see `SlotStateModule.window`."""
        current = self.current()
        if current is None:
            return None
        rows, slots, size = current.tensors[0][:, :, channels], current.slots, self.specs[0].shape[0]
        if not self.layer.spare_rows:
            return ConvState(rows[:, :size], slots)
        assert x is not None
        ragged, metadata = require_batch().ragged, self.layer.metadata()
        return advance_window(ConvState(rows, slots), size, x, ragged.query_start_loc, ragged.positions, metadata)
