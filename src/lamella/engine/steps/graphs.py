"""Decode steps as CUDA graphs: the whole forward and the choice of tokens, one launch for the host."""

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

_BUFFERS = 2  # of the host: a step is written while the one before it may still be on its way
_WARM_UPS = 2  # forwards before a capture: kernels are compiled and workspaces made in them


def bucket_sizes(most: int) -> list[int]:
    """Rows for which a graph is captured, up to `most`; a step of fewer rows is padded to the next."""
    sizes = {1, 2, 3, 4, most} | set(range(8, min(most, 256), 8)) | set(range(256, most, 32))
    return sorted(size for size in sizes if size <= most)


@dataclass(frozen=True)
class _Graph:
    """One captured size.

    Attributes:
        layout, arrays: of its block, on the host once for each buffer.
        tensors: the same on the device.
        hidden: (rows, hidden_size), what the forward leaves.
    """

    graph: torch.cuda.CUDAGraph
    layout: Layout
    arrays: Sequence[Mapping[str, np.ndarray]]
    tensors: StepTensors
    hidden: Tensor


class DecodeGraphs:
    """Captured steps in which every request has one token, by the number of rows.

    Rows without a request have the dummy block and the dummy slot. The graphs serve steps of one form of each feature.
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
        """Capture nothing yet.

        Args:
            model: computes the steps.
            inputs: builds their tensors.
            tokens: (rows,) int64, the tokens that the latest step chose; a replay reads and replaces them.
            sizes: numbers of rows for which a graph is captured.
            forms: of the features of every step.
            pool: memory pool that graphs share; all of them must be replayed on one stream.
        """
        self.model, self.inputs, self._tokens, self._forms, self.pool = model, inputs, tokens, forms, pool
        size, pinned = self._layout(max(sizes)).spans()[1], inputs.device.type == "cuda"
        self._blocks = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(_BUFFERS)]
        self._device_block = torch.zeros(size, dtype=torch.uint8, device=inputs.device)
        self._turn = 0
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
        """Capture every size, the largest first, in whose memory the others find room."""
        for size in tqdm(
            sorted(self._sizes)[::-1], desc="capturing graphs", unit="graph", disable=not progress, dynamic_ncols=True
        ):
            self._graphs[size] = self._capture(size)

    def release(self) -> None:
        """Destroy the graphs, when no replay is wanted any more."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs = {}

    @torch.inference_mode()
    def _capture(self, rows: int) -> _Graph:
        """Steps may be in flight: what is launched here runs behind them, and changes nothing but the dummies."""
        layout = self._layout(rows)
        arrays = [layout.arrays(block.numpy()[: layout.spans()[1]]) for block in self._blocks]
        self._device_block.zero_()
        fields = layout.tensors(self._device_block)
        fields["seq_lens"].fill_(1)
        fields["query_start_loc"].copy_(torch.arange(rows + 1))

        def step() -> StepTensors:
            # Context lengths are not known on the host during graph replay, so nothing may read them.
            state, space = self.inputs.state, self.inputs.attention
            context = self.inputs.features.context(self._forms, fields, None)
            return StepTensors.of(fields, state.groups, (1,) * rows, (), state.block_size, space, context)

        def forward() -> Tensor:
            tensors = step()
            with forward_batch(tensors.batch):
                hidden = self.model(placeholder_tokens(tensors.input_ids, self._tokens))
                draw(self.model.compute_logits(hidden), tensors.sampling, self._tokens[:rows])
            return hidden

        chosen = self._tokens.clone()
        for _ in range(_WARM_UPS):
            forward()
        graph, hidden = record(forward, self.pool)
        self._tokens.copy_(chosen)
        return _Graph(graph, layout, arrays, step(), hidden)

    def replay(
        self, rows: int, chunks: Sequence[Scheduled], latest: Mapping[Request, int]
    ) -> tuple[Tensor, StepTensors]:
        """Launch a step in which all requests decode, with padding up to `rows`, and capture it first if needed.

        Returns the hidden states of the chunks (R, hidden_size), and the step's tensors. The sampled tokens are in the
        constructor's `tokens`.
        """
        if rows not in self._graphs:
            start = time.perf_counter()
            self._graphs[rows] = self._capture(rows)
            logger.info("captured a step of %d rows (%.1f s)", rows, time.perf_counter() - start)
        graph = self._graphs[rows]
        self._turn = (self._turn + 1) % _BUFFERS
        self.inputs.fill(graph.arrays[self._turn], chunks, latest, self._forms)
        size = graph.layout.spans()[1]
        self._device_block[:size].copy_(self._blocks[self._turn][:size], non_blocking=True)
        graph.graph.replay()
        return graph.hidden[: len(chunks)], graph.tensors


def record(forward: Callable[[], Tensor], pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of a forward, and the tensor in which its replays leave the result."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on meanwhile: they may ask for memory, or whether a sum over ranks is through.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        hidden = forward()
    return graph, hidden
