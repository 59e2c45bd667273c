"""One engine for several threads: whoever has the lock steps it, for everybody's requests."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from lamella.engine.engine import Engine
from lamella.errors import EngineError

# After its turn a thread waits so long if others want theirs: locks are not fair by themselves.
_PAUSE_SECONDS = 5e-5


class SharedEngine:
    """Guards an engine by a lock that is held for one step at a time, so that threads share batches.

    Attributes:
        engine: use it inside `exclusive` only.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.RLock()  # which knows its owner; nobody takes it twice
        self._waiting: set[int] = set()
        self._left: deque[str] = deque()  # requests that their callers have left, to be cancelled

    @property
    def is_mine(self) -> bool:
        """True while this thread is inside `exclusive`."""
        return self._lock._is_owned()  # type: ignore[attr-defined]

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Use the engine alone inside the block.

        Raises `EngineError` where this thread is inside already: from a callback in the middle of a step, say.
        """
        if self.is_mine:
            raise EngineError("the engine is in the middle of a step of this thread; call it after the step")
        me = threading.get_ident()
        try:
            try:
                self._waiting.add(me)
                self._lock.acquire()
                self._waiting.discard(me)
                self._cancel_left()
                yield
            finally:
                self._release()
        finally:
            self._release()  # again: an interrupt may have come in the middle of the first
            self._waiting.discard(me)
        if self._left:
            self.leave(())
        if self._waiting:
            time.sleep(_PAUSE_SECONDS)

    def leave(self, request_ids: Iterable[str]) -> None:
        """Cancel requests, those that have ended excepted: at once, or, if the engine is in use, after this use.

        Never waits: the garbage collector may call it, for an iterator that was dropped, in the middle of a step.
        """
        self._left.extend(request_ids)
        if self.is_mine:
            return
        try:
            try:
                if self._lock.acquire(blocking=False):
                    self._cancel_left()
            finally:
                self._release()
        finally:
            self._release()

    def _release(self) -> None:
        if self.is_mine:
            self._lock.release()

    def _cancel_left(self) -> None:
        while self._left:
            self.engine.cancel(self._left[0])
            self._left.popleft()  # after: an interrupted cancellation is made again
