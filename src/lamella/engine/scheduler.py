"""Continuous batching: which requests run in the next step, and how many tokens of each. No tensors, no model."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from lamella.engine.requests.request import Request
from lamella.state.manager import StateManager


@dataclass(slots=True)
class Scheduled:
    """Chunk of a request that is scheduled for a step: its tokens [start, start + count).

    Attributes:
        request: the request.
        start: position of the first token.
        count: number of tokens, at least 1.
        samples: True if the chunk ends with the request's last token, so that the step samples the next one.
        snapshots: (position, slot) of the snapshots of slot state inside the chunk, positions ascending.
    """

    request: Request
    start: int
    count: int
    samples: bool
    snapshots: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_request(cls, request: Request, start: int, count: int) -> Scheduled:
        """Make the chunk [start, start + count) of a request, without snapshots."""
        return cls(request, start, count, start + count == request.num_tokens)


class Scheduler:
    """Schedule requests first come, first served, under a token budget per step.

    Running requests come first, the oldest before younger ones. Each gets all of its uncomputed tokens, one while it
    decodes, up to the remaining budget. So a long prompt is computed in chunks while other requests decode. Then
    waiting requests start, as long as budget, slots and blocks last.

    If no block is free, the youngest running request is preempted: its blocks and slot are freed, and it is recomputed
    later. It keeps its generated tokens. The oldest request is never preempted for another, so it always advances.
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
        """Make a scheduler without requests.

        Args:
            state: allocates blocks and slots.
            max_num_seqs: most requests that run at the same time.
            max_num_batched_tokens: token budget of a step.
            snapshot_interval: in blocks, see `EngineOptions`.
            snapshot_prompts: "always", "never" or "busy", see `EngineOptions`.
            snapshots_inside: True if a step can take snapshots of slot state inside a chunk; else only at its end.
        """
        self.snapshots_inside = snapshots_inside
        self.state, self.max_num_seqs, self.max_num_batched_tokens = state, max_num_seqs, max_num_batched_tokens
        self.snapshot_interval, self.snapshot_prompts = snapshot_interval, snapshot_prompts
        self.waiting: deque[Request] = deque()  # in order of arrival
        self.running: list[Request] = []  # in order of arrival, all older than the waiting requests
        self.num_preemptions = 0
        self.num_started_tokens = 0  # prompt tokens of all requests that have started
        self.num_cached_tokens = 0  # prompt tokens that were found in the prefix cache

    def add(self, request: Request) -> None:
        """Add a request to the waiting queue. Its blocks must fit into empty pools, see `check_pools`."""
        self.waiting.append(request)

    def finish(self, request: Request) -> None:
        """Remove a running or waiting request, and free its blocks and slot."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.state.release(request)

    @property
    def has_work(self) -> bool:
        """True while requests are running or waiting."""
        return bool(self.running or self.waiting)

    def schedule(self) -> list[Scheduled]:
        """Schedule the next step, and allocate blocks and slots for it.

        Returns:
            The chunks of the step, the oldest request first. Empty only if there is no work, or if the last token of
            every running request is in flight.
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
            while not self.state.allocate(request, request.num_computed + count):
                preempted = True
                if self._preempt_youngest() is request:
                    break
            else:
                step.append(self._chunk(request, request.num_computed, count))
                budget -= count
        # After a preemption no waiting request starts: it would allocate the blocks that were just freed.
        while self.waiting and budget and not preempted and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            keys = self._lookup_keys(request)
            hit = self.state.match(keys)
            request.branch_position = hit.seen_length
            count = self._chunk_size(request, hit.length, budget)
            if not self.state.allocate(request, hit.length + count, hit, keys):
                break
            self.running.append(self.waiting.popleft())
            self._record_start(request, hit.length)
            step.append(self._chunk(request, hit.length, count))
            budget -= count
        assert step or not self.has_work or any(r.num_in_flight for r in self.running), (
            "a request does not fit into empty pools"
        )
        return step

    def mark_computed(self, step: Sequence[Scheduled]) -> None:
        """Record that the state of a step's tokens is in the pools.

        Full blocks are cached, and blocks that the next token cannot see are freed. Requests that have ended or were
        preempted since the step was scheduled are skipped.
        """
        for chunk in step:
            request = chunk.request
            if request not in self.state.allocations:
                continue
            request.num_computed += chunk.count
            tokens, size = request.num_computed, self.state.block_size
            # Hash the tokens only if the step has filled a block.
            keys = request.block_keys(size, tokens) if tokens // size > chunk.start // size else ()
            self.state.mark_computed(request, tokens, keys, tokens > len(request.prompt_token_ids))

    def _lookup_keys(self, request: Request) -> list[bytes]:
        """Return the keys of the blocks that a waiting request may take from the prefix cache.

        The last token must be computed, since it gives the logits of the next one. With prompt log-probabilities all
        tokens must be computed, so there are no keys.
        """
        if request.needs_prompt_logprobs:
            return []
        return request.block_keys(self.state.block_size, request.num_tokens - 1)

    def _chunk_size(self, request: Request, start: int, budget: int) -> int:
        """Return the number of tokens to schedule for a request, from `start` on.

        A chunk that does not reach the request's last token ends at a block end, so that a snapshot can be taken there.
        """
        stop, size = min(request.num_tokens, start + budget), self.state.block_size
        if stop < request.num_tokens and stop // size * size > start and self._has_snapshots(request):
            stop = stop // size * size
        return stop - start

    def _chunk(self, request: Request, start: int, count: int) -> Scheduled:
        """Return a request's chunk of the step, and allocate slots for the snapshots inside it."""
        chunk = Scheduled.from_request(request, start, count)
        if count == 1 or not (self.snapshots_inside and self._has_snapshots(request)):
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

    def _has_snapshots(self, request: Request) -> bool:
        return self.state.has_slot_state and request.prefix_root is not None

    def _snapshot_positions(self, request: Request, start: int, stop: int) -> Iterator[int]:
        """Yield positions for snapshots of a prompt's slot state: unordered, and not only from [start, stop].

        * The position where the prompt branches off from tokens that were computed before: a third request is likely to
          branch off there, too.
        * Every `snapshot_interval` blocks, if set.
        * Positions at growing distances (0, 3, 15, 63, ... blocks) from the end of the prompt, see `snapshot_prompts`.
          A prompt that differs from this one only in its last n tokens then hits at most 4 n tokens too early.
        """
        size, prompt = self.state.block_size, len(request.prompt_token_ids)
        if request.branch_position:
            yield request.branch_position
        if self.snapshot_interval is not None:
            step = self.snapshot_interval * size
            yield from range((start // step + 1) * step, min(stop, prompt), step)
        busy = len(self.running) + len(self.waiting) > 1
        if self.snapshot_prompts == "always" or (self.snapshot_prompts == "busy" and busy):
            last, distance = (prompt - 1) // size, 0
            while distance < last:
                yield (last - distance) * size
                distance = 4 * distance + 3

    def _record_start(self, request: Request, cached: int) -> None:
        """Set the counters of a request that starts with `cached` tokens from the prefix cache."""
        request.num_computed = request.num_reused = cached
        if not request.num_preemptions:
            request.num_cached_tokens = cached
            self.num_cached_tokens += cached
            self.num_started_tokens += len(request.prompt_token_ids)

    def preempt_all(self) -> None:
        """Preempt all running requests. They are recomputed from their first token."""
        while self.running:
            self._preempt_youngest()

    def restart(self, request: Request) -> None:
        """Recompute a request from its first token, and exclude it from the prefix cache from now on.

        The caller must drop results of the request from an in-flight step.
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
        """Recover from an exception inside a step: release all state, and queue every request for recomputation.

        Args:
            requests: all unfinished requests, in order of arrival. The queues themselves cannot be trusted, since the
                exception may have interrupted a change of them.
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
        """Preempt and return the youngest running request."""
        request = self.running.pop()
        self.state.release(request)
        request.num_computed = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
