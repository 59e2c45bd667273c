"""Encoding of steps on rank 0, and decoding on the other ranks.

Every rank runs the same `ModelRunner` with equal requests. So all ranks take part in the same collective operations in
the same order, and each samples the same tokens by itself. A message contains only what changed since the request's
previous step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamella.engine.images.reader import PromptImage
from lamella.engine.ranks.messages import NewRequest, Step
from lamella.engine.requests.request import Request
from lamella.engine.requests.variant import Variant
from lamella.engine.scheduler import Scheduled
from lamella.state.manager import Allocation, StateManager


@dataclass(slots=True)
class _SentRequest:
    """Part of a request that was sent to the other ranks.

    Attributes:
        id: number of the request in messages.
        allocation: its allocation at that time; another one after a preemption.
        num_outputs: number of output tokens that were sent.
        num_blocks: number of blocks of each group that were sent.
    """

    id: int
    allocation: Allocation
    num_outputs: int
    num_blocks: list[int]


class StepEncoder:
    """Encodes steps as messages. Must encode every step, just before it is executed."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._sent: dict[Request, _SentRequest] = {}
        self._ids = itertools.count()

    def encode(self, chunks: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> Step:
        """Return the message of a step.

        Args:
            chunks: of the step.
            copies: slot copies (from, to) to execute before the step.
        """
        allocations = self._state.allocations
        # A request that was preempted and starts again has another allocation, so it ends and is sent as a new request.
        lost = [request for request, sent in self._sent.items() if allocations.get(request) is not sent.allocation]
        ended = [self._sent.pop(request).id for request in lost]
        new = [self._encode_request(chunk.request) for chunk in chunks if chunk.request not in self._sent]
        requests = [self._sent[chunk.request] for chunk in chunks]
        return Step(
            copies=list(copies),
            ended=ended,
            new=new,
            ids=[sent.id for sent in requests],
            starts=[chunk.start for chunk in chunks],
            counts=[chunk.count for chunk in chunks],
            in_flight=[chunk.request.num_in_flight for chunk in chunks],
            tokens=[self._new_tokens(chunk.request, sent) for chunk, sent in zip(chunks, requests, strict=True)],
            blocks=[entry for index, sent in enumerate(requests) for entry in self._new_blocks(index, sent)],
            snapshots=[list(chunk.snapshots) for chunk in chunks] if any(s.snapshots for s in chunks) else [],
        )

    def _encode_request(self, request: Request) -> NewRequest:
        allocation = self._state.allocations[request]
        sent = self._sent[request] = _SentRequest(next(self._ids), allocation, 0, [0] * len(allocation.blocks))
        # Draws depend only on the low 64 bits of the seed, and msgpack integers have at most 64 bits.
        seed = request.seed & (1 << 64) - 1
        eos = list(request.eos_token_ids)
        images = [each.positions.tolist() for each in request.attachments if isinstance(each, PromptImage)]
        params = replace(request.params, placement=None)  # may be of any type, and workers use `variant` instead
        return NewRequest(
            sent.id, request.prompt_token_ids, params, seed, eos, allocation.slot, request.variant, images
        )

    @staticmethod
    def _new_tokens(request: Request, sent: _SentRequest) -> list[int]:
        start, sent.num_outputs = sent.num_outputs, len(request.output_token_ids)
        return request.output_token_ids[start:]

    @staticmethod
    def _new_blocks(index: int, sent: _SentRequest) -> Iterator[tuple[int, int, list[int]]]:
        for group, blocks in enumerate(sent.allocation.blocks):
            start = sent.num_blocks[group]
            if len(blocks) > start:
                sent.num_blocks[group] = len(blocks)
                yield index, group, blocks[start:]


class StepDecoder:
    """Decodes messages into chunks of local requests, and sets the allocations of these requests as on rank 0."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._requests: dict[int, Request] = {}
        self._variants: dict[Variant, Variant] = {}  # so that equal variants are one object

    def end_all(self) -> None:
        """Remove all requests. Called before a switch, which preempts all requests on rank 0."""
        for request in self._requests.values():
            del self._state.allocations[request]
        self._requests.clear()

    def decode(self, step: Step) -> list[Scheduled]:
        """Return the chunks of a step, in the order of rank 0."""
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
                attachments=tuple(PromptImage(np.array(positions)) for positions in new.images),
            )
            self._requests[new.id] = request
            allocations[request] = Allocation(new.slot, [[] for _ in self._state.groups])
        requests = [self._requests[number] for number in step.ids]
        for request, tokens, in_flight in zip(requests, step.tokens, step.in_flight, strict=True):
            request.output_token_ids += tokens
            request.num_in_flight = in_flight
        for index, group, blocks in step.blocks:
            allocations[requests[index]].blocks[group] += blocks
        chunks = [
            Scheduled.from_request(request, start, count)
            for request, start, count in zip(requests, step.starts, step.counts, strict=True)
        ]
        for chunk, snapshots in zip(chunks, step.snapshots, strict=False):
            chunk.snapshots = tuple(snapshots)
        return chunks
