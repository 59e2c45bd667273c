"""Pinned routing of experts for the path matrix.

In 16-bit dtypes rounding decides between experts with nearly equal scores, so that two correct paths may choose
different experts. Every path therefore uses the experts that the full forward chose. The router logits of the path are
recorded and compared like a state, so that a wrong router is still found.
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
    """Routing of one sequence by one model.

    Attributes:
        reference: by router, the logits (n, E) of the full forward.
        seen: by router, the logits (n, E) of the current path; NaN at positions that were not computed.
    """

    def __init__(self, model: nn.Module, token_ids: Sequence[int]) -> None:
        self.token_ids = tuple(token_ids)
        self._routers = {name: part.router for name, part in model.named_modules() if isinstance(part, MoE)}
        self.reference: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        """Return True if the model has routers."""
        return bool(self._routers)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the router logits of the full forward, which runs inside the `with` block."""
        self.seen = {}
        with self._hooked(pin=False):
            yield
        self.reference, self.seen = self.seen, {}

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """Pin the experts inside a `with` block, for the sequence and for prefixes shared by other requests."""
        self.seen = {}
        with self._hooked(pin=True):
            yield

    @contextmanager
    def _hooked(self, pin: bool) -> Iterator[None]:
        handles = [
            router.register_forward_hook(lambda _, args, logits, name=name: self._route(name, logits, pin))
            for name, router in self._routers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _route(self, name: str, logits: Tensor, pin: bool) -> Tensor:
        rows, positions = self._matching_rows()
        every = self.seen.setdefault(name, torch.full((len(self.token_ids), logits.shape[1]), torch.nan))
        if rows:
            every[positions] = logits[rows].float().cpu()
        if not pin or not rows:
            return logits
        return logits.index_copy(
            0, torch.tensor(rows, device=logits.device), self.reference[name][positions].to(logits)
        )

    def _matching_rows(self) -> tuple[list[int], list[int]]:
        """Return the rows of the current batch that belong to the sequence or a shared prefix, and their positions."""
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
