"""A batch whose requests have several placements: the mixers that a layer needs, and what each of them computes.

There are two forms. The batch is *cut*: each mixer computes the tokens of its own requests. Or, where all requests
decode, rows are *selected*: each mixer computes every row, and each row is taken from its own. The second is the same
operations whoever stands in which row, which is what a CUDA graph needs.
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


class BatchPart(ABC):
    """What one mixer computes of a batch.

    Attributes:
        batch: as the mixer is to see it.
    """

    batch: ForwardBatch

    @abstractmethod
    def positions(self, whole: Positions) -> Positions:
        """Those of the part's tokens."""

    @abstractmethod
    def take(self, x: Tensor) -> Tensor:
        """The part's tokens (n, C) of x (T, C)."""

    @abstractmethod
    def put(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        """What the mixer made of them, (n, C), among what others made of theirs, (T, C); None for the first."""


class Placements(ABC):
    """Which mixers compute which requests of a batch."""

    @abstractmethod
    def names(self, layer: int) -> Sequence[str]:
        """The mixers that a layer needs."""

    @abstractmethod
    def part(self, batch: ForwardBatch, layer: int, name: str) -> BatchPart:
        """What one of them computes, where there are several."""


@dataclass(frozen=True)
class CutPart(BatchPart):
    """Some of a batch's requests, as a batch of their own. Their state lies where it lies."""

    batch: ForwardBatch
    tokens: Tensor  # (n,) int64, which of the whole batch's tokens are theirs
    whole: int  # tokens of the whole batch

    @classmethod
    def of(cls, batch: ForwardBatch, requests: Sequence[int], space: AttentionSpace | None) -> CutPart:
        """These requests, in their order in the batch."""
        whole, device = batch.ragged, batch.ragged.positions.device
        bounds = [0, *accumulate(whole.query_lens)]
        index = torch.tensor(requests).to(device, non_blocking=True)
        tokens = torch.tensor([t for r in requests for t in range(bounds[r], bounds[r + 1])]).to(device)
        ragged = RaggedBatch.from_lengths(
            [whole.query_lens[r] for r in requests], [whole.context_lens[r] for r in requests], device
        )

        def cut(view: BlockView) -> BlockView:
            size, prefills = view.block_size, requests[ragged.num_decodes :]
            rows = [view.block_table[r, : -(-whole.context_lens[r] // size)] for r in prefills]
            listed = torch.cat(rows) if rows and space is not None else view.block_list[:0]
            return BlockView(view.block_table[index], view.slot_mapping[tokens], listed, size)

        blocks = None if batch.blocks is None else {spec: cut(view) for spec, view in batch.blocks.items()}
        slots = None if batch.slots is None else batch.slots[index]
        snapshots = tuple(batch.snapshots[r] for r in requests) if batch.snapshots else ()
        return cls(ForwardBatch(ragged, blocks, slots, space, snapshots=snapshots), tokens, whole.num_tokens)

    def positions(self, whole: Positions) -> Positions:
        # One object for all layers that share the part, so that each kind of angles is computed once.
        return self.batch.once("positions", lambda: whole.rows(self.tokens))

    def take(self, x: Tensor) -> Tensor:
        return x[self.tokens]

    def put(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        out = mixed.new_empty(self.whole, mixed.shape[1]) if out is None else out
        out[self.tokens] = mixed
        return out


@dataclass(frozen=True)
class CutPlacements(Placements):
    """The placement of each request, by which the batch is cut."""

    by_request: tuple[Placement, ...]

    def names(self, layer: int) -> Sequence[str]:
        return _names(self.by_request, layer)

    def part(self, batch: ForwardBatch, layer: int, name: str) -> BatchPart:
        requests = tuple(r for r, placement in enumerate(self.by_request) if placement[layer] == name)
        return batch.part(requests, lambda space: CutPart.of(batch, requests, space))


@dataclass(frozen=True)
class SelectedPart(BatchPart):
    """All rows of a batch that only decodes, of which the `others` stand on the dummies with one token of context, so
    that they read and write next to nothing. What comes of them may be anything, NaN too, and goes nowhere: no mixer
    lets one row see another's.
    """

    batch: ForwardBatch
    others: Tensor  # (R,) bool

    @classmethod
    def of(cls, batch: ForwardBatch, others: Tensor, space: AttentionSpace | None) -> SelectedPart:
        whole = batch.ragged
        assert whole.num_decodes == whole.num_requests
        # The host's lengths stay those of the whole batch, which bound these, or unknown.
        ragged = replace(
            whole, positions=whole.positions.masked_fill(others, 0), seq_lens=whole.seq_lens.masked_fill(others, 1)
        )
        blocks = batch.blocks
        if blocks is not None:
            # A place in the dummy block is all that a row of others may write to. The one block that it reads need not
            # be the dummy, so that block tables, which are large, stay as they are.
            blocks = {
                spec: replace(view, slot_mapping=view.slot_mapping.masked_fill(others, DUMMY * view.block_size))
                for spec, view in blocks.items()
            }
        slots = None if batch.slots is None else batch.slots.masked_fill(others, DUMMY)
        return cls(ForwardBatch(ragged, blocks, slots, space), others)

    def positions(self, whole: Positions) -> Positions:
        return whole  # whose angles are computed once for all mixers

    def take(self, x: Tensor) -> Tensor:
        return x

    def put(self, mixed: Tensor, out: Tensor | None) -> Tensor:
        return mixed if out is None else torch.where(self.others[:, None], out, mixed)


@dataclass(frozen=True)
class MixerUnion:
    """The mixers that some placements need together, layer by layer, whoever needs which.

    Attributes:
        names: of each layer, in order; one where all placements agree, and none where the layer has no choice.
        tables: of each layer, which of a step's tables says by which of its names a row is computed; -1 where that is
            clear. Layers that divide the placements alike have one table.
    """

    names: tuple[tuple[str, ...], ...]
    tables: tuple[int, ...]

    @property
    def num_tables(self) -> int:
        return max(self.tables, default=-1) + 1


@lru_cache(maxsize=256)
def unite(placements: frozenset[Placement]) -> tuple[MixerUnion, Mapping[Placement, tuple[int, ...]]]:
    """What placements need together, and of each of them, what the tables say of its rows."""
    names, tables = [], []
    known: dict[tuple[int, ...], int] = {}  # tables, by what they say of each placement
    for layer in range(len(next(iter(placements)))):
        names.append(_names(placements, layer))
        if len(names[-1]) > 1:
            said = tuple(names[-1].index(name) for placement in placements if (name := placement[layer]) is not None)
            tables.append(known.setdefault(said, len(known)))
        else:
            tables.append(-1)
    by_placement = {placement: tuple(said[index] for said in known) for index, placement in enumerate(placements)}
    return MixerUnion(tuple(names), tuple(tables)), by_placement


@dataclass(frozen=True)
class SelectedPlacements(Placements):
    """The mixers of a union, and by which of them each row of a batch that only decodes is computed."""

    union: MixerUnion
    tables: Tensor  # (union.num_tables, R) int32, on the device

    def names(self, layer: int) -> Sequence[str]:
        return self.union.names[layer]

    def part(self, batch: ForwardBatch, layer: int, name: str) -> BatchPart:
        table, index = self.union.tables[layer], self.union.names[layer].index(name)
        return batch.part((table, index), lambda space: SelectedPart.of(batch, self.tables[table] != index, space))


def _names(placements: Sequence[Placement] | frozenset[Placement], layer: int) -> tuple[str, ...]:
    """The mixers of a layer under any of the placements, each once, in one order whatever that of the placements."""
    return tuple(sorted({name for placement in placements if (name := placement[layer]) is not None}))
