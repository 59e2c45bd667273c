"""Who computes how many tokens in the next step. Pure Python: no tensors, no model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lamella.engine.request import Request
from lamella.state.manager import StateManager


@dataclass(frozen=True)
class Scheduled:
    """A request's share of a step: its tokens [start, start + count)."""

    request: Request
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """Whether the share ends with the request's last token, so that the next one can be sampled."""
        return self.start + self.count == self.request.num_tokens


class Scheduler:
    """Continuous batching, first come first served, under a budget of tokens a step.

    Every request in the batch gets the tokens that it still lacks, one when it is decoding, up to the budget's rest: a
    long prompt is computed in chunks between other requests' decodes. When pages run out, the youngest request gives
    its state back and is computed again later (tokens it has generated are kept), so that the oldest always moves on.
    """

    def __init__(self, state: StateManager, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.state, self.max_num_seqs, self.max_num_batched_tokens = state, max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: list[Request] = []  # likewise, and all older than those waiting
        self.num_preemptions = 0

    def add(self, request: Request) -> None:
        """Queue a request. Its pages must fit into empty pools."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Forget a request, wherever it is, and give back its state."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.state.release(request)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> list[Scheduled]:
        """The next step's shares, at least one while there is work; the pages that they need are held already."""
        budget = self.max_num_batched_tokens
        step: list[Scheduled] = []
        preempted = False
        for request in list(self.running):
            if budget == 0 or request not in self.running:
                break
            count = min(request.num_tokens - request.num_computed, budget)
            while not self.state.grow(request, request.num_computed + count):
                preempted = True
                if self._preempt_youngest() is request:
                    break
            else:
                step.append(Scheduled(request, request.num_computed, count))
                budget -= count
        # Whoever was just preempted would only take the pages back.
        while self.waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            count = min(request.num_tokens, budget)
            if not self.state.grow(request, count):
                break
            self.running.append(self.waiting.popleft())
            step.append(Scheduled(request, 0, count))
            budget -= count
        assert step or not self.has_work, "a request does not fit into empty pools"
        return step

    def computed(self, step: list[Scheduled]) -> None:
        """The step's tokens are in the pools now; pages that nobody can see any more are given back."""
        for share in step:
            share.request.num_computed += share.count
            self.state.trim(share.request, share.request.num_computed)

    def _preempt_youngest(self) -> Request:
        request = self.running.pop()
        self.state.release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
