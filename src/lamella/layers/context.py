"""The batch of the current step: all that layers know of it beyond their input tensors."""

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
    """Block tables and cache rows of one state group in this step."""

    block_table: Tensor  # (R, P) int32; entries outside what a request can see are blocks that it does not hold
    slot_mapping: Tensor  # (T,) int64, flat cache row of each new token
    block_list: Tensor  # (N,) int32, the blocks of the requests after the decodes, one request's after the other's
    block_size: int  # tokens


@dataclass(frozen=True)
class GivenEmbeddings:
    """Embeddings of tokens that do not stand for themselves, such as those of an image."""

    tokens: Tensor  # (n,) int64, which of the batch's tokens
    rows: Tensor  # (n, hidden_size)


@dataclass(frozen=True)
class ForwardBatch:
    """One step: its requests, and where their state lies.

    Without `blocks` and `slots` it is a plain forward: every request starts from nothing and leaves nothing.
    """

    ragged: RaggedBatch
    blocks: Mapping[PagedState, BlockView] | None = None
    slots: Tensor | None = None  # (R,) int64
    attention: AttentionSpace | None = None  # on a GPU
    placements: Placements | None = None  # which mixers compute it; None: the active ones
    given: GivenEmbeddings | None = None  # where there are any
    # Of each request, tokens of the step after which its slot state is copied, and the slots that it is copied to.
    snapshots: tuple[tuple[tuple[int, int], ...], ...] = ()
    _shared: dict[Any, Any] = field(default_factory=dict)

    def blocks_of(self, spec: PagedState) -> BlockView:
        """Return where the blocks of a state group lie."""
        assert self.blocks is not None, "a plain forward has no blocks"
        return self.blocks[spec]

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Return what `compute` returned for this key in the first layer that asked."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def part(self, key: Any, make: Callable[[AttentionSpace | None], P]) -> P:
        """Return the share of one of several mixers in the batch, made once for all layers that divide it alike.

        `make` is given memory of its own for attention's plans.
        """
        parts = self.once("parts", dict)
        if key not in parts:
            parts[key] = make(None if self.attention is None else self.attention.part(len(parts)))
        return parts[key]


_current: ContextVar[ForwardBatch | None] = ContextVar("forward_batch", default=None)


@contextmanager
def forward_batch(batch: ForwardBatch) -> Iterator[ForwardBatch]:
    """Make `batch` the one that layers see inside the block."""
    before = _current.get()
    try:
        _current.set(batch)
        yield batch
    finally:
        _current.set(before)


def leave_batch() -> None:
    """Leave any batch that an interrupted `forward_batch` has left behind."""
    _current.set(None)


def current_batch() -> ForwardBatch | None:
    """Return the current batch of this thread, if any."""
    return _current.get()


def require_batch() -> ForwardBatch:
    """Return the current batch; layers are only called inside one."""
    batch = _current.get()
    assert batch is not None, "a layer was called outside forward_batch()"
    return batch
