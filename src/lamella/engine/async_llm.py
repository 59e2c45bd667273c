"""The engine behind an event loop: what a server sits on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from lamella.config import PlacementLike
from lamella.engine.completion import Job
from lamella.engine.engine import Engine
from lamella.engine.llm import get_tokenizer, with_tokenization
from lamella.engine.options import EngineOptions
from lamella.engine.outputs import RequestOutput
from lamella.engine.prompt import Prompt
from lamella.engine.sampling_params import SamplingParams
from lamella.engine.tokenizer import Tokenizer
from lamella.engine.vllm_arguments import engine_options
from lamella.errors import ClosedError

logger = logging.getLogger("lamella")


class AsyncLLM:
    """Many callers of one event loop share one engine, which steps in a thread of its own while there is work.

    Settings: see `EngineOptions`, and `engine.vllm_arguments` for vLLM's others. Close it with `shutdown`, or use it as
    an async context manager.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = Engine.load(EngineOptions(model=model, **engine_options(options)))
        self._ids = itertools.count()
        self._orders: deque[Callable[[], None]] = deque()  # what the engine's thread has to do between steps
        self._wake = threading.Condition()
        self._queues: dict[str, Callable[[RequestOutput | Exception], None]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="lamella-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        lora_request: None = None,
        priority: int = 0,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """The whole output so far after each new token, until the request is finished.

        `lora_request`, `priority` and `tokenization_kwargs` are as in `LLM.generate`.

        Raises `ParameterError` for a bad request. Leaving the iteration early, or cancelling its task, cancels the
        request; `abort` ends it with what it has.
        """
        prompt = with_tokenization(prompt, lora_request, priority, tokenization_kwargs)
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        params = sampling_params or SamplingParams()
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        mine = False

        def deliver(item: RequestOutput | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def start() -> None:
            nonlocal mine
            try:
                job = self.engine.make_job(name, prompt, params)
            except Exception as error:
                deliver(error)
                return
            mine = True
            self._queues[name] = deliver
            self.engine.add(job)

        self._order(start)
        finished = False
        try:
            while not finished:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                finished = item.finished
                yield item
        finally:
            if mine and not finished:
                self._order(lambda: self._end(name))

    def abort(self, request_id: str) -> None:
        """End a request; its iterator gives what there is, with finish reason "abort". Unknown ids are ignored."""
        self._order(lambda: self._end(request_id))

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raises `ConfigError` where there is none."""
        return get_tokenizer(self.engine)

    def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`; done between two steps."""
        self._order(self.engine.reset_prefix_cache)

    async def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """See `Engine.set_placement`; returns once it is accepted, which may be before it is in force."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def reply(error: Exception | None) -> None:
            if not answer.done():
                answer.set_result(None) if error is None else answer.set_exception(error)

        def change() -> None:
            error: Exception | None = None
            try:
                self.engine.set_placement(placement, running)
            except Exception as raised:
                error = raised
            if not loop.is_closed():
                loop.call_soon_threadsafe(reply, error)

        self._order(change)
        await answer

    def shutdown(self) -> None:
        """Abort what is running, and stop the thread and other ranks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self.engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.shutdown)

    def _order(self, what: Callable[[], None]) -> None:
        with self._wake:
            if self._closing:
                raise ClosedError("the engine has been shut down")
            self._orders.append(what)
            self._wake.notify()

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._orders or self._closing or self.engine.has_work):
                    self._wake.wait()
                orders, self._orders = self._orders, deque()
                closing = self._closing
            for order in orders:
                order()
            if closing:
                for name in list(self._queues):
                    self._end(name)
                return
            try:
                for job in self.engine.step():
                    self._deliver(job)
            except Exception as error:
                # The step's requests cannot go on; the engine can.
                logger.exception("a step failed")
                for name, deliver in list(self._queues.items()):
                    self.engine.cancel(name)
                    deliver(error)
                self._queues.clear()

    def _deliver(self, job: Job) -> None:
        deliver = self._queues.get(job.request_id)
        if deliver is not None:
            deliver(job.output())
            if job.finished:
                del self._queues[job.request_id]

    def _end(self, request_id: str) -> None:
        job = self.engine.cancel(request_id)
        if job is not None:
            self._deliver(job)
