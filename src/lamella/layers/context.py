"""The batch in flight: what layers may know of the step beyond their input tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lamella.config import Placement
from lamella.ops.attention.paged import AttentionSpace
from lamella.ops.ragged import RaggedBatch
from lamella.state.spec import PagedState


@dataclass(frozen=True)
class PageView:
    """Where the pages of one state group lie in this step."""

    page_table: Tensor  # (R, P) int32; entries outside what a request can see are pages that it does not hold
    new_rows: Tensor  # (T,) int64, flat cache row of each new token
    page_list: Tensor  # (N,) int32, the pages of the requests after the decodes, one request's after the other's
    page_size: int  # tokens


@dataclass(frozen=True)
class GivenEmbeddings:
    """Embeddings of tokens that do not stand for themselves, such as those of an image."""

    tokens: Tensor  # (n,) int64, which of the batch's tokens
    rows: Tensor  # (n, hidden_size)


@dataclass(frozen=True)
class ForwardBatch:
    """One step: its requests, and where their state lies.

    Without `pages` and `slots` it is a plain forward: every request starts from nothing and leaves nothing.
    """

    ragged: RaggedBatch
    pages: Mapping[PagedState, PageView] | None = None
    slots: Tensor | None = None  # (R,) int64
    attention: AttentionSpace | None = None  # on a GPU
    placements: RequestPlacements | None = None  # where requests have several
    given: GivenEmbeddings | None = None  # where there are any
    _shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What many layers need and one can compute, such as the cos/sin of the positions."""
        if key not in self._shared:
            self._shared[key] = compute()
        return self._shared[key]

    def part(self, requests: tuple[int, ...]) -> BatchPart:
        """The batch of some of the requests, in their order here. Their state lies where it lies."""
        return self.once(("part", requests), lambda: self._cut(requests))

    def _cut(self, requests: tuple[int, ...]) -> BatchPart:
        whole, device = self.ragged, self.ragged.positions.device
        bounds = [0, *accumulate(whole.query_lens)]
        index = torch.tensor(requests).to(device, non_blocking=True)
        tokens = torch.tensor([t for r in requests for t in range(bounds[r], bounds[r + 1])]).to(device)
        ragged = RaggedBatch.from_lengths(
            [whole.query_lens[r] for r in requests], [whole.context_lens[r] for r in requests], device
        )
        pages = None
        if self.pages is not None:
            prefills = requests[ragged.num_decodes :]
            pages = {spec: self._cut_pages(view, index, tokens, prefills) for spec, view in self.pages.items()}
        slots = None if self.slots is None else self.slots[index]
        space = None if self.attention is None else self.attention.another()
        return BatchPart(tokens, ForwardBatch(ragged, pages, slots, space))

    def _cut_pages(self, view: PageView, index: Tensor, tokens: Tensor, prefills: Sequence[int]) -> PageView:
        rows = [view.page_table[r, : -(-self.ragged.context_lens[r] // view.page_size)] for r in prefills]
        listed = torch.cat(rows) if rows and self.attention is not None else view.page_list[:0]
        return PageView(view.page_table[index], view.new_rows[tokens], listed, view.page_size)


@dataclass(frozen=True)
class BatchPart:
    """Some of a batch's requests."""

    tokens: Tensor  # (n,) int64, which of the whole batch's tokens are theirs
    batch: ForwardBatch


@dataclass(frozen=True)
class RequestPlacements:
    """The placement of each request of a batch."""

    by_request: tuple[Placement, ...]

    def by_mixer(self, layer: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """For each mixer that a layer needs, the requests that need it."""
        wanted: dict[str, list[int]] = {}
        for request, placement in enumerate(self.by_request):
            name = placement[layer]
            assert name is not None
            wanted.setdefault(name, []).append(request)
        return tuple((name, tuple(requests)) for name, requests in wanted.items())


_current: ContextVar[ForwardBatch | None] = ContextVar("forward_batch", default=None)


@contextmanager
def forward_batch(batch: ForwardBatch) -> Iterator[ForwardBatch]:
    """Make `batch` the one that layers see inside the block."""
    token = _current.set(batch)
    try:
        yield batch
    finally:
        _current.reset(token)


def current_batch() -> ForwardBatch | None:
    """The batch in flight in this thread, if any."""
    return _current.get()


def require_batch() -> ForwardBatch:
    """The batch in flight; layers are only called inside one."""
    batch = _current.get()
    assert batch is not None, "a layer was called outside forward_batch()"
    return batch
