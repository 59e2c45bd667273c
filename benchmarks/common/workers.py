"""Engines in processes of their own, which answer in lines of JSON."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


class WorkerEnded(RuntimeError):
    """A worker ended before it answered."""


class Worker:
    """A process that writes lines of JSON to stdout. It waits for a line on stdin while other workers are timed.

    The process calls `open_answers` before it starts an engine.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
        own_session: bool = False,
    ) -> None:
        """Start the process.

        Args:
            name: name of the worker in messages.
            command: program and arguments.
            environment: all environment variables; None for those of this process.
            log: file for what the process writes to stderr; None for stderr of this process.
            own_session: give the process a session of its own, so that `kill` also ends its children.
        """
        self.name, self._own_session = name, own_session
        errors = None if log is None else log.open("wb")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, stderr=errors, text=True, start_new_session=own_session
        )
        if errors is not None:
            errors.close()
        self._lines: queue.Queue[str | None] = queue.Queue()  # None after the last line
        threading.Thread(target=self._read_lines, daemon=True).start()

    def read(self, limit: float | None = None) -> Any:
        """Return the next answer.

        Args:
            limit: seconds to wait at most; None for no limit.

        Raises:
            TimeoutError: there is no answer after `limit` seconds.
            WorkerEnded: the process has ended.
        """
        try:
            line = self._lines.get(timeout=None if limit is None else max(0.0, limit))
        except queue.Empty:
            raise TimeoutError(f"{self.name}: no answer in time") from None
        if line is None:
            self._lines.put(None)  # for the next call
            raise WorkerEnded(f"{self.name} ended with status {self._process.wait()}")
        return json.loads(line)

    def send(self, request: Any = None) -> None:
        """Write a request to the process, without waiting for the answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; `read` raises the error
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def ask(self, request: Any = None) -> Any:
        """Send a request and return the answer. See `read` for the errors."""
        self.send(request)
        return self.read()

    def close(self, limit: float | None = None) -> int:
        """Close stdin of the process, which ends its loop, and return the exit status.

        Args:
            limit: seconds to wait at most; None for no limit.

        Raises:
            subprocess.TimeoutExpired: the process runs on after `limit` seconds.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        return self._process.wait(limit)

    def kill(self) -> None:
        """End the process now and, if it has a session of its own, its children."""
        with suppress(ProcessLookupError):
            if self._own_session:
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def _read_lines(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def open_answers(engine_output: str | None = None) -> Callable[[Any], None]:
    """Reserve stdout of this process for answers, and return the function that writes one.

    Engines print on stdout. From now on everything but answers goes elsewhere.

    Args:
        engine_output: file for everything else that is written to stdout; None for stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    if engine_output is None:
        os.dup2(2, 1)
    else:
        other = os.open(engine_output, os.O_WRONLY)
        os.dup2(other, 1)
        os.close(other)

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    return answer
