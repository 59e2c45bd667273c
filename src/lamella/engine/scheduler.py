"""Who computes how many tokens in the next step. Pure Python: no tensors, no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lamella.engine.requests.request import Request
from lamella.state.manager import StateManager


@dataclass(slots=True)
class Scheduled:
    """A request's share of a step: its tokens [start, start + count).

    Attributes:
        samples: whether the share ends with the request's last token, so that the next one can be sampled.
        snapshots: positions inside the share whose slot state is kept, ascending, and the slots for it.
    """

    request: Request
    start: int
    count: int
    samples: bool
    snapshots: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, request: Request, start: int, count: int) -> Scheduled:
        return cls(request, start, count, start + count == request.num_tokens)


class Scheduler:
    """Continuous batching, first come first served, under a budget of tokens a step.

    Every request in the batch gets the tokens that it still lacks, one when it is decoding, up to the budget's rest: a
    long prompt is computed in chunks between other requests' decodes. When blocks run out, the youngest request gives
    its state back and is computed again later (tokens it has generated are kept), so that the oldest always moves on.
    """

    def __init__(
        self,
        state: StateManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        snapshot_interval: int | None,
        snapshot_prompts: str,
        snapshots_inside: bool = True,
    ) -> None:
        """`snapshot_interval` in blocks, and `snapshot_prompts` ("always", "never" or "busy"): see `EngineOptions`.

        Without `snapshots_inside` slot state can be kept at the ends of chunks only.
        """
        self.snapshots_inside = snapshots_inside
        self.state, self.max_num_seqs, self.max_num_batched_tokens = state, max_num_seqs, max_num_batched_tokens
        self.snapshot_interval, self.snapshot_prompts = snapshot_interval, snapshot_prompts
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: list[Request] = []  # likewise, and all older than those waiting
        self.num_preemptions = 0
        self.num_started_tokens = 0  # of the prompts of all requests that have started
        self.num_cached_tokens = 0  # of these, found in the prefix cache

    def add(self, request: Request) -> None:
        """Queue a request. Its blocks must fit into empty pools."""
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
        """The next step's chunks; the blocks that they need are held already.

        There is at least one while there is work, except where all requests wait for their last token, which is
        pending.
        """
        budget = self.max_num_batched_tokens
        step: list[Scheduled] = []
        preempted = False
        for request in list(self.running):
            if budget == 0 or (preempted and request not in self.running):
                break
            if request.num_sampled >= request.max_tokens:
                continue
            count = self._chunk_size(request, request.num_computed, budget)
            while not self.state.grow(request, request.num_computed + count):
                preempted = True
                if self._preempt_youngest() is request:
                    break
            else:
                step.append(self._chunk(request, request.num_computed, count))
                budget -= count
        # Whoever was just preempted would only take the blocks back.
        while self.waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            keys = self._readable_keys(request)
            hit = self.state.match(keys)
            request.branch = hit.known
            count = self._chunk_size(request, hit.length, budget)
            if not self.state.grow(request, hit.length + count, hit, keys):
                break
            self.running.append(self.waiting.popleft())
            self._started(request, hit.length)
            step.append(self._chunk(request, hit.length, count))
            budget -= count
        assert step or not self.has_work or any(r.num_in_flight for r in self.running), (
            "a request does not fit into empty pools"
        )
        return step

    def computed(self, step: Sequence[Scheduled]) -> None:
        """The step's tokens are in the pools now; blocks that nobody can see any more are given back.

        The requests that have ended or were preempted since are passed over.
        """
        for chunk in step:
            request = chunk.request
            if request not in self.state.allocations:
                continue
            request.num_computed += chunk.count
            tokens, size = request.num_computed, self.state.block_size
            # Keys are needed only where a block has become full.
            keys = request.block_keys(size, tokens) if tokens // size > chunk.start // size else ()
            self.state.computed(request, tokens, keys, tokens > len(request.prompt_token_ids))

    def _readable_keys(self, request: Request) -> list[bytes]:
        """Keys of what the request may start with: not its last token, which must give logits, and nothing at all where
        the logits of the whole prompt are wanted.
        """
        if request.needs_prompt_logprobs:
            return []
        return request.block_keys(self.state.block_size, request.num_tokens - 1)

    def _chunk_size(self, request: Request, start: int, budget: int) -> int:
        """Return how many tokens a request gets of the budget, from `start` on.

        A chunk that does not reach the request's last token ends with a block, where its slot state can be kept.
        """
        stop, size = min(request.num_tokens, start + budget), self.state.block_size
        if stop < request.num_tokens and stop // size * size > start and self._keeps_snapshots(request):
            stop = stop // size * size
        return stop - start

    def _chunk(self, request: Request, start: int, count: int) -> Scheduled:
        """Return a request's chunk of the step, with the snapshots of slot state that are taken in the middle of it."""
        chunk = Scheduled.of(request, start, count)
        if count == 1 or not (self.snapshots_inside and self._keeps_snapshots(request)):
            return chunk
        positions = sorted(
            {p for p in self._snapshot_positions(request, start, start + count) if start < p < start + count}
        )
        if positions:
            keys = request.block_keys(self.state.block_size, positions[-1])
            wanted = [keys[position // self.state.block_size - 1] for position in positions]
            slots = self.state.plan_snapshots(request, wanted, self.max_num_seqs - len(self.running))
            chunk.snapshots = tuple(
                (position, slot) for position, slot in zip(positions, slots, strict=True) if slot is not None
            )
        return chunk

    def _keeps_snapshots(self, request: Request) -> bool:
        return self.state.has_slot_state and request.prefix_root is not None

    def _snapshot_positions(self, request: Request, start: int, stop: int) -> Iterator[int]:
        """Yield block ends at which to snapshot a prompt's slot state, in any order, maybe outside [start, stop].

        They are: where it branches off from tokens that were there before, since a third request is likely to branch
        off there, too; every so many blocks, if asked; and some at growing distances from the prompt's end. Of these, a
        prompt with the same beginning and an end of its own of n tokens finds one that is at most 4 n tokens too short.
        """
        size, prompt = self.state.block_size, len(request.prompt_token_ids)
        if request.branch:
            yield request.branch
        if self.snapshot_interval is not None:
            step = self.snapshot_interval * size
            yield from range((start // step + 1) * step, min(stop, prompt), step)
        busy = len(self.running) + len(self.waiting) > 1
        if self.snapshot_prompts == "always" or (self.snapshot_prompts == "busy" and busy):
            last, distance = (prompt - 1) // size, 0
            while distance < last:
                yield (last - distance) * size
                distance = 4 * distance + 3

    def _started(self, request: Request, cached: int) -> None:
        request.num_computed = request.num_reused = cached
        if not request.num_preemptions:
            request.num_cached_tokens = cached
            self.num_cached_tokens += cached
            self.num_started_tokens += len(request.prompt_token_ids)

    def preempt_all(self) -> None:
        """All running requests give their state back, and are computed again from their first token."""
        while self.running:
            self._preempt_youngest()

    def restart(self, request: Request) -> None:
        """Compute a request again by itself: without state of others, and out of the prefix cache from now on.

        What a step in flight computes of it must be dropped.
        """
        if request in self.running:
            self.running.remove(request)
            self.waiting.appendleft(request)
        self.state.release(request)
        request.num_computed = request.num_in_flight = 0
        request.leave_prefix_cache()
        request.num_preemptions += 1
        self.num_preemptions += 1

    def roll_back(self, requests: Iterable[Request]) -> None:
        """Recover from an exception inside a step: all state is released, and every request is computed again.

        Args:
            requests: all requests that have not ended, in order of arrival. Given anew, since the exception may have
                interrupted a change of the queues.
        """
        started = [request for request in self.running if request in self.state.allocations]
        self.state.roll_back()
        self.running, self.waiting = [], deque(requests)
        for request in self.waiting:
            request.num_computed = request.num_in_flight = 0
        for request in started:
            request.num_preemptions += 1
            self.num_preemptions += 1

    def _preempt_youngest(self) -> Request:
        request = self.running.pop()
        self.state.release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
