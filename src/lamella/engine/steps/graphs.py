"""Decode steps as CUDA graphs: forward and sampling in one launch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lamella.engine.requests.request import Request
from lamella.engine.scheduler import Scheduled
from lamella.engine.steps.features import Forms
from lamella.engine.steps.step_inputs import Layout, StepInputs, StepTensors
from lamella.layers.context import forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.sampling import draw, placeholder_tokens

logger = logging.getLogger("lamella")

_BUFFERS = 2  # host buffers: one step is written while the previous one may still be copied to the device
_WARM_UPS = 2  # forwards before a capture, which compile kernels and allocate workspaces


def bucket_sizes(limit: int) -> list[int]:
    """Return the numbers of rows for which graphs are captured, up to `limit`. Steps are padded to the next size."""
    sizes = {1, 2, 3, 4, limit} | set(range(8, min(limit, 256), 8)) | set(range(256, limit, 32))
    return sorted(size for size in sizes if size <= limit)


@dataclass(frozen=True)
class _Graph:
    """Captured graph of one number of rows.

    Attributes:
        graph: the graph.
        layout: of its input buffer.
        arrays: fields of each host buffer.
        tensors: inputs on the device, which the graph reads.
        hidden: (rows, hidden_size) hidden states, which the graph writes.
    """

    graph: torch.cuda.CUDAGraph
    layout: Layout
    arrays: Sequence[Mapping[str, np.ndarray]]
    tensors: StepTensors
    hidden: Tensor


class DecodeGraphs:
    """CUDA graphs of decode steps, one per number of rows. All serve steps with the same forms of the features.

    Padding rows use the dummy block and the dummy slot.
    """

    def __init__(
        self,
        model: LanguageModel,
        inputs: StepInputs,
        tokens: Tensor,
        sizes: Sequence[int],
        forms: Forms,
        pool: Any,
    ) -> None:
        """Allocate the input buffers. Nothing is captured yet.

        Args:
            model: computes the steps.
            inputs: builds their input tensors.
            tokens: (rows,) int64, tokens sampled by the latest step. A replay reads and overwrites them.
            sizes: numbers of rows for which `capture` captures a graph.
            forms: forms of the features.
            pool: memory pool that graphs share. All graphs of a pool must be replayed on one stream.
        """
        self.model, self.inputs, self._tokens, self._forms, self.pool = model, inputs, tokens, forms, pool
        size, pinned = self._layout(max(sizes)).spans()[1], inputs.device.type == "cuda"
        self._host_buffers = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BUFFERS)]
        self._device_buffer = torch.zeros(size, dtype=torch.uint8, device=inputs.device)
        self._buffer = 0  # index of the host buffer of the latest step
        self._graphs: dict[int, _Graph] = {}
        self._sizes = sizes

    def _layout(self, rows: int) -> Layout:
        return Layout(
            requests=rows,
            tokens=rows,
            groups=len(self.inputs.state.groups),
            blocks=self.inputs.max_blocks,
            extra=self.inputs.extra(self._forms, rows),
        )

    def capture(self, progress: bool = True) -> None:
        """Capture every size. The largest comes first, so that the others reuse its memory."""
        for size in tqdm(
            sorted(self._sizes)[::-1], desc="capturing graphs", unit="graph", disable=not progress, dynamic_ncols=True
        ):
            self._graphs[size] = self._capture(size)

    def release(self) -> None:
        """Destroy the graphs and free their memory."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs = {}

    @torch.inference_mode()
    def _capture(self, rows: int) -> _Graph:
        """Capture a graph. Steps may be in flight: kernels run after them, and write only dummy blocks and slots."""
        layout = self._layout(rows)
        arrays = [layout.arrays(buffer.numpy()[: layout.spans()[1]]) for buffer in self._host_buffers]
        self._device_buffer.zero_()
        fields = layout.tensors(self._device_buffer)
        fields["seq_lens"].fill_(1)
        fields["query_start_loc"].copy_(torch.arange(rows + 1))

        def step() -> StepTensors:
            # Context lengths are not known on the host during graph replay, so nothing may read them.
            state, space = self.inputs.state, self.inputs.attention
            context = self.inputs.features.context(self._forms, fields, None)
            return StepTensors.from_fields(fields, state.groups, (1,) * rows, (), state.block_size, space, context)

        def forward() -> Tensor:
            tensors = step()
            with forward_batch(tensors.batch):
                hidden = self.model(placeholder_tokens(tensors.input_ids, self._tokens))
                draw(self.model.compute_logits(hidden), tensors.sampling, self._tokens[:rows])
            return hidden

        tokens = self._tokens.clone()
        for _ in range(_WARM_UPS):
            forward()
        graph, hidden = capture_graph(forward, self.pool)
        self._tokens.copy_(tokens)
        return _Graph(graph, layout, arrays, step(), hidden)

    def replay(
        self, rows: int, chunks: Sequence[Scheduled], latest_rows: Mapping[Request, int]
    ) -> tuple[Tensor, StepTensors]:
        """Launch a decode step, padded to `rows` rows. Capture the graph first if there is none.

        The sampled tokens are written to the `tokens` of the constructor.

        Args:
            rows: number of rows, at least the number of chunks.
            chunks: of the step, one token each.
            latest_rows: see `StepInputs.build`.

        Returns:
            Hidden states (num_chunks, hidden_size), and the inputs of the step.
        """
        if rows not in self._graphs:
            start = time.perf_counter()
            self._graphs[rows] = self._capture(rows)
            logger.info("captured a step of %d rows (%.1f s)", rows, time.perf_counter() - start)
        graph = self._graphs[rows]
        self._buffer = (self._buffer + 1) % _BUFFERS
        self.inputs.fill(graph.arrays[self._buffer], chunks, latest_rows, self._forms)
        size = graph.layout.spans()[1]
        self._device_buffer[:size].copy_(self._host_buffers[self._buffer][:size], non_blocking=True)
        graph.graph.replay()
        return graph.hidden[: len(chunks)], graph.tensors


def capture_graph(forward: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a forward; return the graph, and the tensor that its replays write the result to."""
    graph = torch.cuda.CUDAGraph()
    # "thread_local": other threads may allocate memory or query NCCL events during the capture.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = forward()
    return graph, hidden
