"""Decode steps as CUDA graphs: the whole forward and the choice of tokens, one launch for the host."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lamella.engine.request import Request
from lamella.engine.scheduler import Scheduled
from lamella.engine.step_inputs import Layout, StepInputs, StepTensors
from lamella.layers.context import forward_batch
from lamella.layers.decoder import LanguageModel
from lamella.ops.sampling import draw, pending_tokens

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
    """Steps in which every request has one token, by the number of rows. Rows without a request have the dummy page and
    the dummy slot."""

    def __init__(self, model: LanguageModel, inputs: StepInputs, tokens: Tensor, sizes: Sequence[int]) -> None:
        """For steps of each of `sizes` rows.

        `tokens` (rows,) int64 holds what each row of the latest step has chosen; a replay reads and replaces it.
        """
        self.model, self.inputs, self._tokens = model, inputs, tokens
        size = self._layout(max(sizes)).spans()[1]
        self._blocks = [torch.zeros(size, dtype=torch.uint8, pin_memory=True) for _ in range(_BUFFERS)]
        self._device_block = torch.zeros(size, dtype=torch.uint8, device=inputs.device)
        self._turn = 0
        self._graphs: dict[int, _Graph] = {}
        self._sizes = sizes

    def _layout(self, rows: int) -> Layout:
        return Layout(requests=rows, tokens=rows, groups=len(self.inputs.state.groups), pages=self.inputs.max_pages)

    def capture(self, progress: bool = True) -> None:
        """Capture every size, the largest first, in whose memory the others find room."""
        pool = torch.cuda.graph_pool_handle()
        for size in tqdm(
            sorted(self._sizes)[::-1], desc="capturing graphs", unit="graph", disable=not progress, dynamic_ncols=True
        ):
            self._graphs[size] = self._capture(size, pool)

    def release(self) -> None:
        """Destroy the graphs, when no replay is wanted any more."""
        for graph in self._graphs.values():
            graph.graph.reset()
        self._graphs = {}

    @torch.inference_mode()
    def _capture(self, rows: int, pool: Any) -> _Graph:
        layout = self._layout(rows)
        arrays = [layout.arrays(block.numpy()[: layout.spans()[1]]) for block in self._blocks]
        self._device_block.zero_()
        fields = layout.tensors(self._device_block)
        fields["seq_lens"].fill_(1)
        fields["query_start_loc"].copy_(torch.arange(rows + 1))

        def step() -> StepTensors:
            # How long the contexts are is unknown to the host at a replay: nothing may ask for it.
            state = self.inputs.state
            return StepTensors.of(fields, state.groups, (1,) * rows, (), state.page_size, self.inputs.attention)

        def forward() -> Tensor:
            tensors = step()
            with forward_batch(tensors.batch):
                hidden = self.model(pending_tokens(tensors.input_ids, self._tokens))
                draw(self.model.compute_logits(hidden), tensors.sampling, self._tokens[:rows])
            return hidden

        for _ in range(_WARM_UPS):
            forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            hidden = forward()
        return _Graph(graph, layout, arrays, step(), hidden)

    def replay(
        self, rows: int, shares: Sequence[Scheduled], latest: Mapping[Request, int]
    ) -> tuple[Tensor, StepTensors]:
        """Launch a step in which all requests decode, with padding up to `rows`.

        Returns the hidden states of the shares (R, hidden_size), and the step's tensors. The tokens are where the
        constructor was told.
        """
        graph = self._graphs[rows]
        self._turn = (self._turn + 1) % _BUFFERS
        self.inputs.fill(graph.arrays[self._turn], shares, latest)
        size = graph.layout.spans()[1]
        self._device_block[:size].copy_(self._blocks[self._turn][:size], non_blocking=True)
        graph.graph.replay()
        return graph.hidden[: len(shares)], graph.tensors
