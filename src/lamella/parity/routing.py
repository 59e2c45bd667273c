"""Experts held: in bfloat16 a path may send a token to another expert where two are as good, and be none the worse.

So where a path is compared with the full forward, its tokens go to the experts that the full forward chose, and what
the path's own routers say is compared like a state: a decision by rounding is no difference, a wrong router is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import torch
from torch import Tensor, nn

from lamella.layers.moe import MoE
from lamella.parity.forcing import in_flight


class PinnedRouting:
    """The routing of one sequence of tokens by one model.

    Attributes:
        truth: by router, its logits (n, E) of the sequence's positions in the full forward.
        seen: the same of a path, NaN where it computed none.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(token_ids)
        self._routers = {name: part.router for name, part in model.named_modules() if isinstance(part, MoE)}
        self.truth: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Whether the model has routers at all."""
        return bool(self._routers)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """The block computes the full forward."""
        self.seen = {}
        with self._hooked(hold=False):
            yield
        self.truth, self.seen = self.seen, {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """The block computes the sequence in another way, beginnings that others have in common with it included."""
        self.seen = {}
        with self._hooked(hold=True):
            yield

    @contextmanager
    def _hooked(self, hold: bool) -> Iterator[None]:
        handles = [
            router.register_forward_hook(lambda _, args, logits, name=name: self._route(name, logits, hold))
            for name, router in self._routers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _route(self, name: str, logits: Tensor, hold: bool) -> Tensor:
        rows, positions = self._ours()
        every = self.seen.setdefault(name, torch.full((len(self.token_ids), logits.shape[1]), torch.nan))
        if rows:
            every[positions] = logits[rows].float().cpu()
        if not hold or not rows:
            return logits
        return logits.index_copy(0, torch.tensor(rows, device=logits.device), self.truth[name][positions].to(logits))

    def _ours(self) -> tuple[list[int], list[int]]:
        """Of the batch in flight, the rows that are the sequence's or a beginning of it, and their positions."""
        rows: list[int] = []
        positions: list[int] = []
        row = 0
        for token_ids, start, count in in_flight():
            pairs = zip(token_ids, self.token_ids, strict=False)
            common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            stop = min(start + count, common)
            rows += range(row, row + max(0, stop - start))
            positions += range(start, max(start, stop))
            row += count
        return rows, positions
