"""What rank 0 and its workers say to each other, and how it crosses the socket between them."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.variant import Variant


class Start(msgspec.Struct, tag=True):
    """The first message: who the worker is, and the engine's options.

    Attributes:
        folder: where the ranks meet, see `TensorParallelGroup.connect`.
        options: of `EngineOptions`, as plain values.
        architectures: those of rank 0, for the registry.
        threads, log_level: those of rank 0.
    """

    rank: int
    size: int
    folder: str
    options: dict[str, Any]
    architectures: dict[str, str]
    threads: int
    log_level: int


class NewRequest(msgspec.Struct, array_like=True):
    """A request, or one that lost its state, from its first step on.

    Attributes:
        images: of each, the prompt's tokens in whose place its rows stand; the rows come from rank 0 with the step.
    """

    id: int
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    eos_token_ids: list[int]
    slot: int
    variant: Variant
    images: list[list[int]]


class Step(msgspec.Struct, tag=True):
    """A step to compute, and what has been added to its requests since their last.

    Attributes:
        copies: slots to copy before it, (from, to).
        ended: requests that are no more.
        new: requests that there have not been.
        ids, starts, counts: by chunk, its request and its tokens [start, start + count).
        pending: by chunk, tokens that the devices have chosen, or are about to, and no host has seen.
        tokens: by chunk, the request's new output.
        blocks: (chunk, group, blocks), for the chunks that have new ones.
        snapshots: by chunk, positions inside it whose slot state is kept, and the slots for it; empty without any.
    """

    copies: list[tuple[int, int]]
    ended: list[int]
    new: list[NewRequest]
    ids: list[int]
    starts: list[int]
    counts: list[int]
    pending: list[int]
    tokens: list[list[int]]
    blocks: list[tuple[int, int, list[int]]]
    snapshots: list[list[tuple[int, int]]]


class Switch(msgspec.Struct, tag=True):
    """Run this variant of the model from now on. Unless variants share the pools, no request holds state."""

    variant: Variant


class Ready(msgspec.Struct, tag=True):
    """The worker has its part of the model, and waits for the other ranks."""


class Failed(msgspec.Struct, tag=True):
    """The worker ends, for this reason, in one line."""

    reason: str


_LENGTH = struct.Struct("<Q")
Message = Start | Step | Switch | Ready | Failed


class Channel:
    """One end of a socket: messages in msgpack, each after its length in bytes."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self.fd = end, end.fileno()
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        """Raises `OSError` where the other end is closed."""
        frame = self._encoder.encode(message)
        self.socket.sendall(_LENGTH.pack(len(frame)) + frame)

    def receive(self) -> Message:
        """The next message, waited for. Raises `EOFError` where the other end is closed."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        return self._decoder.decode(self._read(length))

    def _read(self, size: int) -> bytearray:
        data, done = bytearray(size), 0
        while done < size:
            try:
                count = self.socket.recv_into(memoryview(data)[done:])
            except ConnectionError:
                count = 0
            if not count:
                raise EOFError("the other end is closed")
            done += count
        return data

    def close(self) -> None:
        """Let the other end know at once, whoever else holds this one."""
        with suppress(OSError):  # it may be closed already
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def wait_for_hang_up(channels: Sequence[Channel]) -> int:
    """Sleep until one of the channels is closed, by either end, and tell its file descriptor; nothing is read."""
    poll = select.poll()
    for channel in channels:
        poll.register(channel.fd, 0)  # no event is asked for: a closed end is told of in any case
    return poll.poll()[0][0]
