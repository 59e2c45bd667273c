"""Rank 0's side of a tensor-parallel engine: start, supervision and end of the worker processes."""

from __future__ import annotations

import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import torch

from lamella.engine.ranks.messages import Channel, Failed, Ready, Start, Step, Switch
from lamella.engine.ranks.step_messages import StepEncoder
from lamella.engine.requests.variant import Variant
from lamella.engine.scheduler import Scheduled
from lamella.errors import WorkerError
from lamella.models.registry import registered
from lamella.parallel.group import Group, TensorParallelGroup
from lamella.parallel.sharding import Partition
from lamella.processes import module_command
from lamella.state.manager import StateManager

if TYPE_CHECKING:
    from lamella.engine.options import EngineOptions

logger = logging.getLogger("lamella")

_NOTICE_SECONDS = 2.0  # wait after an error on rank 0 for news that a worker's exit was the cause
_POLL_SECONDS = 1.0
_EXIT_SECONDS = 5.0  # wait for a worker to exit by itself before it is killed


class Workers:
    """Other ranks of an engine. This base class does nothing: for an engine with one rank, or on a worker.

    Attributes:
        group: tensor-parallel group of the ranks.
    """

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()

    def connect(self, device: torch.device) -> None:
        """Wait until every rank has loaded its shard, then connect the group."""

    def set_state(self, state: StateManager) -> None:
        """Set the pools of the steps that are launched from now on."""

    def switch(self, variant: Variant) -> None:
        """Switch every rank to a variant of the model. Call `set_state` afterwards if the pools change."""

    def call_before_stop(self, release: Callable[[], None]) -> None:
        """Register a method to call before the group is destroyed.

        NCCL waits until no CUDA graph contains its operations, so graphs must be released first.
        """

    def launch(self, chunks: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> None:
        """Send a step to every worker, just before rank 0 launches it.

        Args:
            chunks: of the step.
            copies: slot copies (from, to) to execute before the step.
        """

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Context of all work that the ranks do together.

        Any error inside stops all ranks, since they may have executed different steps.

        Raises:
            WorkerError: a worker has ended.
        """
        yield

    def close(self) -> None:
        """End the worker processes."""


class WorkerProcesses(Workers):
    """Ranks 1 and up, each a process. They end with this object, or with the process of rank 0."""

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        """Start the processes. They load their shards in the background; `connect` waits for them."""
        size = options.tensor_parallel_size
        super().__init__(TensorParallelGroup(Partition(0, size)))
        self._folder = Path(tempfile.mkdtemp(prefix="lamella-"))
        self._watch = _Watch(self.group)
        self._ranks: list[_Rank] = []
        self._releases: list[weakref.WeakMethod[Callable[[], None]]] = []
        self._process = os.getpid()
        self._finalizer = weakref.finalize(
            self, _stop, self._ranks, self._watch, self._folder, self._releases, self._process
        )
        self._why = "closed"
        self._encoder: StepEncoder | None = None
        values = {
            **asdict(options),
            "model": str(options.model),
            "tokenizer": None,  # only rank 0 needs it
            "dtype": str(options.dtype).removeprefix("torch."),
            "device": device.type,
        }
        for rank in range(1, size):
            self._ranks.append(_Rank(rank))
        self._watch.start(self._ranks)
        with self.guard():
            for each in self._ranks:
                each.channel.send(
                    Start(
                        rank=each.rank,
                        size=size,
                        folder=str(self._folder),
                        options=values,
                        architectures=registered(),
                        threads=torch.get_num_threads(),
                        log_level=logger.getEffectiveLevel(),
                    )
                )

    def connect(self, device: torch.device) -> None:
        """See `Workers`."""
        for rank in self._ranks:
            self._watch.wait_until_ready(rank)
        assert isinstance(self.group, TensorParallelGroup)
        self.group.connect(self._folder, device)

    def set_state(self, state: StateManager) -> None:
        """See `Workers`."""
        self._encoder = StepEncoder(state)

    def switch(self, variant: Variant) -> None:
        """See `Workers`."""
        self._send(Switch(variant))

    def call_before_stop(self, release: Callable[[], None]) -> None:
        """See `Workers`."""
        self._releases.append(weakref.WeakMethod(release))  # weak: must not keep the engine alive

    def launch(self, chunks: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> None:
        """See `Workers`."""
        assert self._encoder is not None
        step = self._encoder.encode(chunks, copies)
        self._send(step)

    def _send(self, message: Step | Switch) -> None:
        for rank in self._ranks:
            try:
                rank.channel.send(message)
            except TimeoutError as error:
                why = f"tensor-parallel rank {rank.rank} does not read its messages; make a new engine"
                raise WorkerError(why) from error

    @contextmanager
    def guard(self) -> Iterator[None]:
        """See `Workers`."""
        self._check()
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError | OSError):
                self._watch.seen.wait(_NOTICE_SECONDS)
            if self._watch.ended is not None:
                self._check(error)
            self._stop(f"{type(error).__name__} on rank 0")
            raise
        self._check()

    def _check(self, cause: BaseException | None = None) -> None:
        """Raise `WorkerError` if the workers cannot be used any more."""
        if os.getpid() != self._process:
            raise WorkerError(
                "the tensor-parallel ranks belong to the process that was forked; make an engine in this one"
            )
        if not self._finalizer.alive:
            raise WorkerError(f"the tensor-parallel ranks have been stopped: {self._why}; make a new engine")
        if self._watch.ended is not None:
            why = self._watch.ended.exit_reason
            self._stop(why)
            raise WorkerError(why) from cause

    def _stop(self, why: str) -> None:
        self._why = why
        self.close()

    def close(self) -> None:
        """See `Workers`."""
        self._finalizer()


class _Rank:
    """Process of one worker, and the channel to it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                module_command("lamella.engine.ranks.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # to standard error, since programs read rank 0's standard output
                # The same import path as rank 0, and no progress bars: rank 0 shows its own.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TQDM_DISABLE": "1"},
            )
        # A worker that does not read is ended by the watch; the limit here is for the case that the watch has ended.
        ours.settimeout(4 * _silence_limit())
        self.channel = Channel(ours)
        self.is_ready = False
        self.exit_reason = f"tensor-parallel rank {rank} has ended"

    def note_exit(self, why: str | None) -> None:
        """Write down in one line why the worker has ended; without a reason, its exit code says it."""
        try:
            code = f"ended with exit code {self.process.wait(_EXIT_SECONDS)}"
        except subprocess.TimeoutExpired:
            code = "closed its socket"
        self.exit_reason = f"tensor-parallel rank {self.rank} {code}" + (f": {why}" if why else "")


class _Watch:
    """Thread that reads what the workers send, and notices a worker that has ended or has stopped.

    Workers send `Alive` every few seconds. One that is silent for too long (stopped by a signal, swapped out, stuck) is
    killed. When a worker ends, the group is aborted, so that rank 0 does not wait for it forever.

    Attributes:
        group: tensor-parallel group.
        ended: the worker that has ended; None before.
        seen: set once a worker has ended.
        closing: True if rank 0 is ending the workers itself.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ended: _Rank | None = None
        self.seen = threading.Event()
        self.closing = False
        self._changed = threading.Condition()

    def start(self, ranks: Sequence[_Rank]) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, args=(list(ranks),), name="lamella-watch", daemon=True).start()

    def wait_until_ready(self, rank: _Rank) -> None:
        """Return when a worker has loaded its shard.

        Raises:
            WorkerError: a worker has ended instead.
        """
        with self._changed:
            self._changed.wait_for(lambda: rank.is_ready or self.ended is not None)
        if self.ended is not None:
            raise WorkerError(self.ended.exit_reason)

    def _run(self, ranks: Sequence[_Rank]) -> None:
        found = self._find_end(ranks)
        if found is None or self.closing:
            return
        rank, why = found
        rank.note_exit(why)
        with self._changed:
            self.ended = rank
            self._changed.notify_all()
        self.seen.set()
        self.group.abort()

    def _find_end(self, ranks: Sequence[_Rank]) -> tuple[_Rank, str | None] | None:
        """Return the first worker that has ended, and why; None if rank 0 ends them."""
        poll, by_fd = select.poll(), {rank.channel.fd: rank for rank in ranks}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        silent, limit, before = dict.fromkeys(by_fd, 0.0), _silence_limit(), time.monotonic()
        while not self.closing:
            ready = {fd for fd, _ in poll.poll(1000 * _POLL_SECONDS)}
            now = time.monotonic()
            # If this process was stopped too, a long time has passed in which no worker was late.
            passed, before = min(now - before, 2 * _POLL_SECONDS), now
            for fd, rank in by_fd.items():
                if fd not in ready:
                    silent[fd] += passed
                    if silent[fd] > limit:
                        rank.process.kill()
                        return rank, f"it did not respond for {limit:g} s (stopped or stuck), and was killed"
                    continue
                silent[fd] = 0
                try:
                    messages = rank.channel.receive_available()
                except EOFError:
                    return rank, None
                except (OSError, ValueError, msgspec.MsgspecError) as error:
                    if self.closing:
                        return None
                    rank.process.kill()
                    return rank, f"sent something that is not a message ({type(error).__name__})"
                for message in messages:
                    if isinstance(message, Failed):
                        return rank, message.reason
                    if isinstance(message, Ready):
                        with self._changed:
                            rank.is_ready = True
                            self._changed.notify_all()
        return None


def _silence_limit() -> float:
    """Return for how many seconds a worker may be silent: LAMELLA_WORKER_TIMEOUT, by default 60."""
    try:
        return max(1.0, float(os.environ.get("LAMELLA_WORKER_TIMEOUT") or 60))
    except ValueError:
        return 60.0


def _stop(
    ranks: Sequence[_Rank],
    watch: _Watch,
    folder: Path,
    releases: Sequence[weakref.WeakMethod[Callable[[], None]]],
    process: int,
) -> None:
    """End the workers by closing their sockets. Does nothing except in the process that started them."""
    if os.getpid() != process:
        return  # a forked child that exits has copies of the sockets
    watch.closing = True
    for rank in ranks:
        rank.channel.close()
    for rank in ranks:
        try:
            rank.process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            rank.process.kill()
            rank.process.wait()
    for release in (reference() for reference in releases):
        if release is not None:
            release()
    watch.group.abort()
    shutil.rmtree(folder, ignore_errors=True)
