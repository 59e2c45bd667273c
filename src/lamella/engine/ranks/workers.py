"""Rank 0's side of a tensor-parallel engine: the processes of the other ranks, from their start to their end."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lamella.engine.ranks.messages import Channel, Failed, Ready, Start, Switch, wait_for_hang_up
from lamella.engine.ranks.step_messages import Recorder
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

_NOTICE_SECONDS = 2.0  # after an error of rank 0: it may have come of a worker's end, of which word is on its way
_EXIT_SECONDS = 5.0  # that a worker has to end by itself


class Workers:
    """The other ranks of an engine that has none, or is a worker's own."""

    def __init__(self, group: Group | None = None) -> None:
        self.group = group or Group()

    def connect(self, device: torch.device) -> None:
        """Wait until every rank has its part of the model, and join them to the group."""

    def follow(self, state: StateManager) -> None:
        """Run the steps of this state's requests from now on."""

    def apply(self, variant: Variant) -> None:
        """Switch every rank to a variant of the model; `follow` the state that it has then."""

    def before_stop(self, release: Callable[[], None]) -> None:
        """Have a method called before the group is given up: NCCL waits until no graph holds its operations."""

    def launch(self, shares: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> None:
        """Give every rank a step, with the slots to copy before, that this one is about to run too."""

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Around whatever the ranks do together.

        Raises `WorkerError` where one has ended. Any error stops all of them: ranks that have not computed the same are
        of no use to each other.
        """
        yield

    def close(self) -> None:
        """End the workers' processes."""


class WorkerProcesses(Workers):
    """Ranks 1 and up, each a process that ends with this object, or with its process."""

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        """Start them; they load their parts of the model until `connect`."""
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
        self._recorder: Recorder | None = None
        values = {
            **asdict(options),
            "model": str(options.model),
            "tokenizer": None,  # rank 0's
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
        for rank in self._ranks:
            if not rank.becomes_ready():
                raise WorkerError(rank.epitaph())
        assert isinstance(self.group, TensorParallelGroup)
        self.group.connect(self._folder, device)

    def follow(self, state: StateManager) -> None:
        self._recorder = Recorder(state)

    def apply(self, variant: Variant) -> None:
        for rank in self._ranks:
            rank.channel.send(Switch(variant))

    def before_stop(self, release: Callable[[], None]) -> None:
        self._releases.append(weakref.WeakMethod(release))  # which must not keep the engine alive

    def launch(self, shares: Sequence[Scheduled], copies: Sequence[tuple[int, int]]) -> None:
        assert self._recorder is not None
        step = self._recorder.record(shares, copies)
        for rank in self._ranks:
            rank.channel.send(step)

    @contextmanager
    def guard(self) -> Iterator[None]:
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
        if os.getpid() != self._process:
            raise WorkerError(
                "the tensor-parallel ranks belong to the process that was forked; make an engine in this one"
            )
        if not self._finalizer.alive:
            raise WorkerError(f"the tensor-parallel ranks have been stopped: {self._why}; make a new engine")
        if self._watch.ended is not None:
            why = self._watch.ended.epitaph()
            self._stop(why)
            raise WorkerError(why) from cause

    def _stop(self, why: str) -> None:
        self._why = why
        self.close()

    def close(self) -> None:
        self._finalizer()


class _Rank:
    """One worker's process, and the channel to it."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self._reason: str | None = None
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                module_command("lamella.engine.ranks.worker", str(theirs.fileno())),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what is on rank 0's standard output is rank 0's own
                # Its imports are rank 0's; its progress is rank 0's, too, which shows it.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TQDM_DISABLE": "1"},
            )
        self.channel = Channel(ours)

    def becomes_ready(self) -> bool:
        """Wait until the worker says that it is, or ends."""
        try:
            message = self.channel.receive()
        except EOFError:
            return False
        self._reason = message.reason if isinstance(message, Failed) else None
        return isinstance(message, Ready)

    def epitaph(self) -> str:
        """Of a worker that has ended: why, in one line."""
        try:
            while self._reason is None:
                message = self.channel.receive()
                self._reason = message.reason if isinstance(message, Failed) else None
        except (EOFError, OSError):
            pass
        try:
            code = f"ended with exit code {self.process.wait(_EXIT_SECONDS)}"
        except subprocess.TimeoutExpired:
            code = "closed its socket"
        return f"tensor-parallel rank {self.rank} {code}" + (f": {self._reason}" if self._reason else "")


class _Watch:
    """Notices a worker's end at once, from a thread that sleeps until then, and wakes whoever waits for the worker."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.ended: _Rank | None = None
        self.seen = threading.Event()
        self.closing = False

    def start(self, ranks: Sequence[_Rank]) -> None:
        threading.Thread(target=self._run, args=(list(ranks),), name="lamella-watch", daemon=True).start()

    def _run(self, ranks: Sequence[_Rank]) -> None:
        fd = wait_for_hang_up([rank.channel for rank in ranks])
        if not self.closing:
            self.ended = next(rank for rank in ranks if rank.channel.fd == fd)
            self.seen.set()
            self.group.abort()


def _stop(
    ranks: Sequence[_Rank],
    watch: _Watch,
    folder: Path,
    releases: Sequence[weakref.WeakMethod[Callable[[], None]]],
    process: int,
) -> None:
    """A worker ends when its socket closes, see `worker.main`. Only `process`, which started them, may end them."""
    if os.getpid() != process:
        return  # a forked child ends, and has the same sockets
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
