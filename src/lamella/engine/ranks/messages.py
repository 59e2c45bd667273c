"""Messages between rank 0 and its workers, and the socket that transfers them."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import suppress
from typing import Any

import msgspec

from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.variant import Variant


class Start(msgspec.Struct, tag=True):
    """First message to a worker: its rank, and the engine's options.

    Attributes:
        rank: of the worker.
        size: number of ranks.
        folder: rendezvous of the ranks, see `TensorParallelGroup.connect`.
        options: fields of `EngineOptions`, as plain values.
        architectures: architectures that are registered on rank 0, by name.
        threads: number of torch threads of rank 0.
        log_level: of rank 0.
    """

    rank: int
    size: int
    folder: str
    options: dict[str, Any]
    architectures: dict[str, str]
    threads: int
    log_level: int


class NewRequest(msgspec.Struct, array_like=True):
    """Request in its first step, or in its first step after a preemption.

    Attributes:
        id: number of the request in later messages.
        prompt_token_ids: tokens of the prompt.
        params: sampling parameters.
        seed: low 64 bits of the seed.
        eos_token_ids: tokens that end the output.
        slot: allocated slot.
        variant: variant of the model.
        images: positions of each image's tokens in the prompt. Rank 0 broadcasts the embeddings in the step.
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
    """Step to execute, with the changes of its requests since their previous step.

    Attributes:
        copies: slot copies (from, to) to execute before the step.
        ended: ids of requests that have ended or were preempted.
        new: requests that start, or start again.
        ids: request of each chunk.
        starts: first position of each chunk.
        counts: number of tokens of each chunk.
        in_flight: number of tokens in flight of each chunk's request.
        tokens: new output tokens of each chunk's request.
        blocks: (chunk, group, block ids) of newly allocated blocks.
        snapshots: (position, slot) of each snapshot inside each chunk; empty if the step has none.
    """

    copies: list[tuple[int, int]]
    ended: list[int]
    new: list[NewRequest]
    ids: list[int]
    starts: list[int]
    counts: list[int]
    in_flight: list[int]
    tokens: list[list[int]]
    blocks: list[tuple[int, int, list[int]]]
    snapshots: list[list[tuple[int, int]]]


class Switch(msgspec.Struct, tag=True):
    """Switch to another variant of the model. Unless variants share the pools, no request has state."""

    variant: Variant


class Ready(msgspec.Struct, tag=True):
    """Reply of a worker that has loaded its shard and waits for the other ranks."""


class Alive(msgspec.Struct, tag=True):
    """Sent by a worker every few seconds, whatever it is doing, so that rank 0 notices a process that has stopped."""


class Failed(msgspec.Struct, tag=True):
    """Last message of a worker that ends with an error.

    Attributes:
        reason: one line.
    """

    reason: str


_LENGTH = struct.Struct("<Q")
_LONGEST = 1 << 34  # bytes of a message; a longer one is garbage
Message = Start | Step | Switch | Ready | Failed | Alive


class Channel:
    """One end of a socket. Each message is its length in bytes (8 bytes, little-endian), then msgpack."""

    def __init__(self, end: socket.socket) -> None:
        self.socket, self.fd = end, end.fileno()
        self._sending = threading.Lock()
        self._received = bytearray()
        self._encoder, self._decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            OSError: the other end is closed.
        """
        with self._sending:
            frame = self._encoder.encode(message)
            self.socket.sendall(_LENGTH.pack(len(frame)) + frame)

    def receive_available(self) -> list[Message]:
        """Read what has arrived, and return the messages that are complete. For a reader that polls the socket.

        Raises:
            EOFError: the other end is closed.
            ValueError: what has arrived is not a message.
        """
        try:
            data = self.socket.recv(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            raise EOFError("the other end is closed")
        self._received += data
        messages: list[Message] = []
        while len(self._received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._received)
            if length > _LONGEST:
                raise ValueError(f"a message of {length} bytes")
            end = _LENGTH.size + length
            if len(self._received) < end:
                break
            messages.append(self._decoder.decode(self._received[_LENGTH.size : end]))
            del self._received[:end]
        return messages

    def receive(self) -> Message:
        """Wait for the next message, and return it.

        Raises:
            EOFError: the other end is closed.
        """
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
        """Close the socket. `shutdown` notifies the other end even if another process has a copy of the descriptor."""
        with suppress(OSError):  # already closed
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
