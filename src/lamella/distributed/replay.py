"""The steps of one rank on another: what a runner reads of requests and their state, told and retold.

Every rank runs the same `ModelRunner` over equal requests, so that all take part in the same sums, in the same order,
and choose the same tokens, each by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from lamella.distributed.messages import NewRequest, ShareOfStep, Step
from lamella.engine.request import Request
from lamella.engine.scheduler import Scheduled
from lamella.state.manager import Holding, StateManager


@dataclass
class _Told:
    """What the others know of a request: its number, and how much of its output and pages."""

    id: int
    holding: Holding
    outputs: int
    pages: list[int]


class Recorder:
    """Turns steps into messages that hold only what is new. Must see every step, just before it is run."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._told: dict[Request, _Told] = {}
        self._ids = itertools.count()

    def record(self, shares: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> Step:
        holdings = self._state.holdings
        # Whoever was preempted and starts again holds something else, and is new.
        gone = [request for request, told in self._told.items() if holdings.get(request) is not told.holding]
        ended = [self._told.pop(request).id for request in gone]
        new = [self._introduce(share.request) for share in shares if share.request not in self._told]
        return Step(list(copies), ended, new, [self._share(share) for share in shares])

    def _introduce(self, request: Request) -> NewRequest:
        holding = self._state.holdings[request]
        told = self._told[request] = _Told(next(self._ids), holding, 0, [0] * len(holding.pages))
        # The draws depend on the seed's low 64 bits, and a message holds no more.
        seed = request.seed & (1 << 64) - 1
        eos = list(request.eos_token_ids)
        return NewRequest(told.id, request.prompt_token_ids, request.params, seed, eos, holding.slot)

    def _share(self, share: Scheduled) -> ShareOfStep:
        request, told = share.request, self._told[share.request]
        outputs = request.output_token_ids[told.outputs :]
        pages = [pages[known:] for pages, known in zip(told.holding.pages, told.pages, strict=True)]
        told.outputs += len(outputs)
        told.pages = [known + len(more) for known, more in zip(told.pages, pages, strict=True)]
        return ShareOfStep(told.id, share.start, share.count, request.num_pending, outputs, pages)


class Replayer:
    """Turns messages back into shares of requests that stand in for rank 0's, and hold what those hold."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._requests: dict[int, Request] = {}

    def replay(self, step: Step) -> list[Scheduled]:
        for number in step.ended:
            del self._state.holdings[self._requests.pop(number)]
        for new in step.new:
            request = Request(
                request_id=str(new.id),
                prompt_token_ids=new.prompt_token_ids,
                params=new.params,
                seed=new.seed,
                eos_token_ids=tuple(new.eos_token_ids),
            )
            self._requests[new.id] = request
            self._state.holdings[request] = Holding(new.slot, [[] for _ in self._state.groups])
        return [self._share(share) for share in step.shares]

    def _share(self, share: ShareOfStep) -> Scheduled:
        request = self._requests[share.id]
        request.output_token_ids += share.output_token_ids
        request.num_pending = share.pending
        for pages, more in zip(self._state.holdings[request].pages, share.pages, strict=True):
            pages += more
        return Scheduled.of(request, share.start, share.count)
