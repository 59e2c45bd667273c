"""Sharing of one engine among threads: the thread that holds the lock runs a step for the requests of all threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lamella.engine.engine import Engine
from lamella.errors import EngineError

# A thread that releases the lock sleeps this long if others wait for it, since locks are not fair.
_PAUSE_SECONDS = 5e-5


class SharedEngine:
    """Engine with a lock that is held for one step at a time, so that threads share batches.

    Attributes:
        engine: must be used only inside `exclusive`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()  # RLock for its owner check; it is never acquired twice by a thread
        self._waiting: set[int] = set()
        self._abandoned: deque[str] = deque()  # requests to cancel

    @property
    def is_owner(self) -> bool:
        """True while this thread is inside `exclusive`."""
        return self._lock._is_owned()  # type: ignore[attr-defined]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Context in which this thread has exclusive use of the engine.

        Raises:
            EngineError: this thread is already inside, for example in a callback in the middle of a step.
        """
        if self.is_owner:
            raise EngineError("the engine is in the middle of a step of this thread; call it after the step")
        me = threading.get_ident()
        try:
            try:
                self._waiting.add(me)
                self._lock.acquire()
                self._waiting.discard(me)
                self._cancel_abandoned()
                yield
            finally:
                self._release()
        finally:
            self._release()  # again: an interrupt may have hit the first call
            self._waiting.discard(me)
        if self._abandoned:
            self.abandon(())
        if self._waiting:
            time.sleep(_PAUSE_SECONDS)

    def abandon(self, request_ids: Iterable[str]) -> None:
        """Cancel unfinished requests: at once, or after the current use if the engine is in use.

        Never blocks: the garbage collector may call it in the middle of a step, for an iterator that was dropped.
        """
        self._abandoned.extend(request_ids)
        if self.is_owner:
            return
        try:
            try:
                if self._lock.acquire(blocking=False):
                    self._cancel_abandoned()
            finally:
                self._release()
        finally:
            self._release()

    def _release(self) -> None:
        if self.is_owner:
            self._lock.release()

    def _cancel_abandoned(self) -> None:
        while self._abandoned:
            self.engine.cancel(self._abandoned[0])
            self._abandoned.popleft()  # last: an interrupted cancellation is repeated
