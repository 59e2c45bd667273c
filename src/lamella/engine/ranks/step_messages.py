"""The steps of one rank on another: what a runner reads of requests and their state, told and retold.

Every rank runs the same `ModelRunner` over equal requests, so that all take part in the same sums, in the same order,
and choose the same tokens, each by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamella.engine.images.reader import PlacedImage
from lamella.engine.ranks.messages import NewRequest, Step
from lamella.engine.requests.request import Request
from lamella.engine.requests.variant import Variant
from lamella.engine.scheduler import Scheduled
from lamella.state.manager import Allocation, StateManager


@dataclass(slots=True)
class _Told:
    """What the others know of a request: its number, how much of its output, and how many blocks of each group."""

    id: int
    allocation: Allocation
    outputs: int
    blocks: list[int]


class Recorder:
    """Turns steps into messages that hold only what is new. Must see every step, just before it is run."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._told: dict[Request, _Told] = {}
        self._ids = itertools.count()

    def record(self, chunks: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> Step:
        allocations = self._state.allocations
        # Whoever was preempted and starts again holds something else, and is new.
        gone = [request for request, told in self._told.items() if allocations.get(request) is not told.allocation]
        ended = [self._told.pop(request).id for request in gone]
        new = [self._introduce(chunk.request) for chunk in chunks if chunk.request not in self._told]
        told = [self._told[chunk.request] for chunk in chunks]
        return Step(
            copies=list(copies),
            ended=ended,
            new=new,
            ids=[each.id for each in told],
            starts=[chunk.start for chunk in chunks],
            counts=[chunk.count for chunk in chunks],
            pending=[chunk.request.num_in_flight for chunk in chunks],
            tokens=[self._tokens(chunk.request, each) for chunk, each in zip(chunks, told, strict=True)],
            blocks=[entry for index, each in enumerate(told) for entry in self._blocks(index, each)],
            snapshots=[list(chunk.snapshots) for chunk in chunks] if any(s.snapshots for s in chunks) else [],
        )

    def _introduce(self, request: Request) -> NewRequest:
        allocation = self._state.allocations[request]
        told = self._told[request] = _Told(next(self._ids), allocation, 0, [0] * len(allocation.blocks))
        # The draws depend on the seed's low 64 bits, and a message holds no more.
        seed = request.seed & (1 << 64) - 1
        eos = list(request.eos_token_ids)
        images = [each.places.tolist() for each in request.attachments if isinstance(each, PlacedImage)]
        params = replace(request.params, placement=None)  # as the caller wrote it: any type, and not needed
        return NewRequest(
            told.id, request.prompt_token_ids, params, seed, eos, allocation.slot, request.variant, images
        )

    @staticmethod
    def _tokens(request: Request, told: _Told) -> list[int]:
        known, told.outputs = told.outputs, len(request.output_token_ids)
        return request.output_token_ids[known:]

    @staticmethod
    def _blocks(index: int, told: _Told) -> Iterator[tuple[int, int, list[int]]]:
        for group, blocks in enumerate(told.allocation.blocks):
            known = told.blocks[group]
            if len(blocks) > known:
                told.blocks[group] = len(blocks)
                yield index, group, blocks[known:]


class Replayer:
    """Turns messages back into chunks of requests that stand in for rank 0's, and hold what those hold."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._requests: dict[int, Request] = {}
        self._variants: dict[Variant, Variant] = {}  # so that equal variants are one object

    def end_all(self) -> None:
        """No request is any more, of which rank 0 would tell with its next step."""
        for request in self._requests.values():
            del self._state.allocations[request]
        self._requests.clear()

    def replay(self, step: Step) -> list[Scheduled]:
        allocations = self._state.allocations
        for number in step.ended:
            del allocations[self._requests.pop(number)]
        for new in step.new:
            request = Request(
                request_id=str(new.id),
                prompt_token_ids=new.prompt_token_ids,
                params=new.params,
                seed=new.seed,
                eos_token_ids=tuple(new.eos_token_ids),
                variant=self._variants.setdefault(new.variant, new.variant),
                attachments=tuple(PlacedImage(np.array(places)) for places in new.images),
            )
            self._requests[new.id] = request
            allocations[request] = Allocation(new.slot, [[] for _ in self._state.groups])
        requests = [self._requests[number] for number in step.ids]
        for request, tokens, pending in zip(requests, step.tokens, step.pending, strict=True):
            request.output_token_ids += tokens
            request.num_in_flight = pending
        for index, group, blocks in step.blocks:
            allocations[requests[index]].blocks[group] += blocks
        chunks = [
            Scheduled.of(request, start, count)
            for request, start, count in zip(requests, step.starts, step.counts, strict=True)
        ]
        for chunk, snapshots in zip(chunks, step.snapshots, strict=False):
            chunk.snapshots = tuple(snapshots)
        return chunks
