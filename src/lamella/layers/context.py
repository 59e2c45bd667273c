"""The batch of the current step: everything that layers read besides their input tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.ragged import RaggedBatch
from lamella.state.spec import PagedState

if TYPE_CHECKING:
    from lamella.layers.supernet.batches import Placements

P = TypeVar("P")


@dataclass(frozen=True)
class BlockView:
    """Block tables and slot mapping of one paged state group in this step.

    Attributes:
        block_table: (R, P) int32. Entries outside a request's visible range may name blocks of other requests.
        slot_mapping: (T,) int64, flat cache row of each new token.
        block_list: (N,) int32, concatenated block ids of the requests that are not decodes.
        block_size: tokens per block.
    """

    block_table: Tensor
    slot_mapping: Tensor
    block_list: Tensor
    block_size: int


@dataclass(frozen=True)
class GivenEmbeddings:
    """Embeddings that replace those of placeholder tokens, such as the embeddings of an image.

    Attributes:
        tokens: (n,) int64, indices of the placeholder tokens in the batch.
        rows: (n, hidden_size), their embeddings.
    """

    tokens: Tensor
    rows: Tensor


@dataclass(frozen=True)
class ForwardBatch:
    """Requests of one step and the location of their state.

    Without `blocks` and `slots` the step is a plain forward: no request has earlier state, and none is stored.

    Attributes:
        ragged: lengths and positions of the requests' new tokens.
        blocks: block view of each paged state group; None in a plain forward.
        slots: (R,) int64, slot of each request; None in a plain forward.
        attention: workspace of attention kernels; None on a CPU.
        placements: mixers that compute each request; None if all requests use the active mixers.
        given: embeddings of placeholder tokens; None if there are none.
        snapshots: for each request, pairs (offset, slot): after `offset` tokens of its chunk, its slot state is copied
            to `slot`. Empty if no slot state is copied in this step.
    """

    ragged: RaggedBatch
    blocks: Mapping[PagedState, BlockView] | None = None
    slots: Tensor | None = None
    attention: AttentionSpace | None = None
    placements: Placements | None = None
    given: GivenEmbeddings | None = None
    snapshots: tuple[tuple[tuple[int, int], ...], ...] = ()
    _shared: dict[Any, Any] = field(default_factory=dict)

    def blocks_of(self, spec: PagedState) -> BlockView:
        """Return the block view of a paged state group. Needs `blocks`."""
        assert self.blocks is not None, "a plain forward has no blocks"
        return self.blocks[spec]

    def compute_once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return the value for `key`; call `compute` the first time, and reuse its result in later layers."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def mixer_batch(self, key: Any, make: Callable[[AttentionSpace | None], P]) -> P:
        """Return the batch as one of several mixers computes it; build it once for all layers with the same division.

        Args:
            key: identifies the division of the batch and the mixer.
            make: builds the mixer's batch, given a workspace for its attention plans (None on a CPU).
        """
        batches = self.compute_once("mixer_batches", dict)
        if key not in batches:
            batches[key] = make(None if self.attention is None else self.attention.subspace(len(batches)))
        return batches[key]


_current: ContextVar[ForwardBatch | None] = ContextVar("forward_batch", default=None)


@contextmanager
def forward_batch(batch: ForwardBatch) -> Iterator[ForwardBatch]:
    """Make `batch` the current batch of this thread inside a `with` block."""
    before = _current.get()
    try:
        _current.set(batch)
        yield batch
    finally:
        _current.set(before)


def leave_batch() -> None:
    """Reset the current batch, in case an interrupt prevented `forward_batch` from doing so."""
    _current.set(None)


def current_batch() -> ForwardBatch | None:
    """Return the current batch of this thread, or None outside `forward_batch`."""
    return _current.get()


def require_batch() -> ForwardBatch:
    """Return the current batch of this thread; fail outside `forward_batch`."""
    batch = _current.get()
    assert batch is not None, "a layer was called outside forward_batch()"
    return batch
