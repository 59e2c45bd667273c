"""Batches whose requests use different placements: the mixers that each layer runs, and the batch that each mixer gets.

There are two forms:

* Gathered: each mixer computes only the tokens of its own requests. Works for any batch.
* Masked: each mixer computes every row, and each row's result is selected from its own mixer. Works if all requests
  decode. The operations do not depend on which request is in which row, as a CUDA graph requires.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from lamella.config import Placement
from lamella.layers.context import BlockView, ForwardBatch
from lamella.layers.rotary import Positions
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.ragged import RaggedBatch
from lamella.state.manager import DUMMY


class MixerBatch(ABC):
    """Batch that one mixer of a layer computes.

    Attributes:
        batch: current batch while the mixer runs.
    """

    batch: ForwardBatch

    @abstractmethod
    def positions(self, whole: Positions) -> Positions:
        """Return the positions of this mixer's tokens, given the positions of the whole batch."""

    @abstractmethod
    def gather(self, x: Tensor) -> Tensor:
        """Return this mixer's tokens (n, C) of x (T, C)."""

    @abstractmethod
    def scatter(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        """Insert this mixer's output into the output of the layer.

        Args:
            mixed: (n, C) output of the mixer.
            out: (T, C) output of the mixers that ran before; None for the first.

        Returns:
            (T, C).
        """


class Placements(ABC):
    """Assignment of a batch's requests to the mixers of each layer."""

    @abstractmethod
    def names(self, layer: int) -> Sequence[str]:
        """Return the names of the mixers that a layer must run."""

    @abstractmethod
    def mixer_batch(self, batch: ForwardBatch, layer: int, name: str) -> MixerBatch:
        """Return the batch of one mixer, for layers that run several."""


@dataclass(frozen=True)
class GatheredBatch(MixerBatch):
    """Batch of some of the requests; blocks and slots are not copied.

    Attributes:
        batch: the gathered requests.
        tokens: (n,) int64, indices of their tokens in the whole batch.
        whole: number of tokens of the whole batch.
    """

    batch: ForwardBatch
    tokens: Tensor
    whole: int

    @classmethod
    def from_requests(cls, batch: ForwardBatch, requests: Sequence[int], space: AttentionSpace | None) -> GatheredBatch:
        """Gather requests of a batch.

        Args:
            batch: the whole batch.
            requests: indices of the requests, in the order of the batch.
            space: workspace of attention kernels; None on a CPU.
        """
        whole, device = batch.ragged, batch.ragged.positions.device
        bounds = [0, *accumulate(whole.query_lens)]
        index = torch.tensor(requests).to(device, non_blocking=True)
        tokens = torch.tensor([t for r in requests for t in range(bounds[r], bounds[r + 1])]).to(device)
        ragged = RaggedBatch.from_lengths(
            [whole.query_lens[r] for r in requests], [whole.context_lens[r] for r in requests], device
        )

        def gather_view(view: BlockView) -> BlockView:
            size, prefills = view.block_size, requests[ragged.num_decodes :]
            rows = [view.block_table[r, : -(-whole.context_lens[r] // size)] for r in prefills]
            listed = torch.cat(rows) if rows and space is not None else view.block_list[:0]
            return BlockView(view.block_table[index], view.slot_mapping[tokens], listed, size)

        blocks = None if batch.blocks is None else {spec: gather_view(view) for spec, view in batch.blocks.items()}
        slots = None if batch.slots is None else batch.slots[index]
        snapshots = tuple(batch.snapshots[r] for r in requests) if batch.snapshots else ()
        return cls(ForwardBatch(ragged, blocks, slots, space, snapshots=snapshots), tokens, whole.num_tokens)

    def positions(self, whole: Positions) -> Positions:
        """Return the positions of this mixer's tokens."""
        # One object for all layers that use this batch, so that cos and sin are computed once.
        return self.batch.compute_once("positions", lambda: whole.rows(self.tokens))

    def gather(self, x: Tensor) -> Tensor:
        """Return this mixer's tokens of x."""
        return x[self.tokens]

    def scatter(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        """Insert this mixer's output into the output of the layer."""
        out = mixed.new_empty(self.whole, mixed.shape[1]) if out is None else out
        out[self.tokens] = mixed
        return out


@dataclass(frozen=True)
class GatheredPlacements(Placements):
    """Assignment by gathering.

    Attributes:
        by_request: placement of each request.
    """

    by_request: tuple[Placement, ...]

    def names(self, layer: int) -> Sequence[str]:
        """Return the names of the mixers that a layer must run."""
        return _names(self.by_request, layer)

    def mixer_batch(self, batch: ForwardBatch, layer: int, name: str) -> MixerBatch:
        """Return the batch of one mixer."""
        requests = tuple(r for r, placement in enumerate(self.by_request) if placement[layer] == name)
        return batch.mixer_batch(requests, lambda space: GatheredBatch.from_requests(batch, requests, space))


@dataclass(frozen=True)
class MaskedBatch(MixerBatch):
    """All rows of a batch that only decodes, with the rows of other mixers masked.

    A masked row uses the dummy block and the dummy slot with one token of context, so that it reads and writes very
    little. Its result is discarded and may be NaN; no mixer mixes values of different rows.

    Attributes:
        batch: the batch with masked rows.
        others: (R,) bool, rows that other mixers compute.
    """

    batch: ForwardBatch
    others: Tensor

    @classmethod
    def from_mask(cls, batch: ForwardBatch, others: Tensor, space: AttentionSpace | None) -> MaskedBatch:
        """Mask the rows `others` (R,) bool of a batch in which every request decodes."""
        whole = batch.ragged
        assert whole.num_decodes == whole.num_requests
        # Keep the host's lengths of the whole batch: they are upper bounds of the masked lengths, or unknown.
        ragged = replace(
            whole, positions=whole.positions.masked_fill(others, 0), seq_lens=whole.seq_lens.masked_fill(others, 1)
        )
        blocks = batch.blocks
        if blocks is not None:
            # A masked row may write only to the dummy block. It may read its first block, so the large block tables
            # need no change.
            blocks = {
                spec: replace(view, slot_mapping=view.slot_mapping.masked_fill(others, DUMMY * view.block_size))
                for spec, view in blocks.items()
            }
        slots = None if batch.slots is None else batch.slots.masked_fill(others, DUMMY)
        return cls(ForwardBatch(ragged, blocks, slots, space), others)

    def positions(self, whole: Positions) -> Positions:
        """Return the positions of this mixer's tokens."""
        return whole  # the same object for all mixers, so that cos and sin are computed once

    def gather(self, x: Tensor) -> Tensor:
        """Return this mixer's tokens of x."""
        return x

    def scatter(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        """Insert this mixer's output into the output of the layer."""
        return mixed if out is None else torch.where(self.others[:, None], out, mixed)


@dataclass(frozen=True)
class MixerUnion:
    """Mixers that a set of placements needs in each layer.

    Attributes:
        names: mixer names of each layer, in order; one name if all placements agree, none if the layer has one mixer.
        tables: for each layer, index of the table that maps rows to an index into `names`; -1 if the layer needs no
            table. Layers that divide the placements in the same way share a table.
    """

    names: tuple[tuple[str, ...], ...]
    tables: tuple[int, ...]

    @property
    def num_tables(self) -> int:
        """Number of distinct tables."""
        return max(self.tables, default=-1) + 1


@lru_cache(maxsize=256)
def build_mixer_union(placements: frozenset[Placement]) -> tuple[MixerUnion, Mapping[Placement, tuple[int, ...]]]:
    """Return the union of the mixers that placements need, and the table values of each placement.

    Returns:
        The union, and for each placement the value of its rows in each of the union's tables.
    """
    names, tables = [], []
    known: dict[tuple[int, ...], int] = {}  # table indices, by the values for all placements
    for layer in range(len(next(iter(placements)))):
        names.append(_names(placements, layer))
        if len(names[-1]) > 1:
            chosen = tuple(names[-1].index(name) for placement in placements if (name := placement[layer]) is not None)
            tables.append(known.setdefault(chosen, len(known)))
        else:
            tables.append(-1)
    by_placement = {placement: tuple(chosen[index] for chosen in known) for index, placement in enumerate(placements)}
    return MixerUnion(tuple(names), tuple(tables)), by_placement


@dataclass(frozen=True)
class MaskedPlacements(Placements):
    """Assignment by masking, for a batch that only decodes.

    Attributes:
        union: mixers that the layers run.
        tables: (union.num_tables, R) int32 on the device; entry (t, r) selects the mixer of row r.
    """

    union: MixerUnion
    tables: Tensor

    def names(self, layer: int) -> Sequence[str]:
        """Return the names of the mixers that a layer must run."""
        return self.union.names[layer]

    def mixer_batch(self, batch: ForwardBatch, layer: int, name: str) -> MixerBatch:
        """Return the batch of one mixer."""
        table, index = self.union.tables[layer], self.union.names[layer].index(name)
        return batch.mixer_batch(
            (table, index), lambda space: MaskedBatch.from_mask(batch, self.tables[table] != index, space)
        )


def _names(placements: Sequence[Placement] | frozenset[Placement], layer: int) -> tuple[str, ...]:
    """Return the distinct mixer names of a layer over all placements, sorted."""
    return tuple(sorted({name for placement in placements if (name := placement[layer]) is not None}))
