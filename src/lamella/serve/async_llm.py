"""The engine behind an event loop: what a server sits on."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lamella.config import PlacementLike
from lamella.engine.loading import load_engine
from lamella.engine.options import EngineOptions, with_options
from lamella.engine.requests.completion import Job
from lamella.engine.requests.outputs import RequestOutput
from lamella.engine.requests.prompt import Prompt
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.errors import ClosedError, LamellaError
from lamella.serve.chat import chat_prompts
from lamella.serve.llm import get_tokenizer, with_tokenization
from lamella.serve.vllm_arguments import engine_options

logger = logging.getLogger("lamella")

_MOST_UNREAD = 16  # outputs of a request that wait for its reader


class _Order(NamedTuple):
    """Something that the engine's thread does between steps; if it cannot, `refuse` tells the caller why."""

    run: Callable[[], None]
    refuse: Callable[[Exception], None]


class _OutputQueue:
    """Passes a request's outputs from the engine's thread to the event loop of its caller.

    Attributes:
        has_left: set by the reader's side: nobody reads any more.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[RequestOutput | Exception] = deque()
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self.has_left = False

    @property
    def is_gone(self) -> bool:
        """True if nobody can read any more: the reader has left, or its event loop is closed."""
        return self.has_left or self._loop.is_closed()

    def put(self, item: RequestOutput | Exception) -> None:
        """Pass an output on; if the reader is far behind, it takes the place of the latest unread one."""
        with self._lock:
            if len(self._items) >= _MOST_UNREAD:
                self._items.pop()  # an output holds all that those before it hold
            self._items.append(item)
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has been closed
            self.has_left = True

    async def get(self) -> RequestOutput:
        """Wait for the next output. Raises the error that was put in its place."""
        while not self._items:
            self._ready.clear()
            if not self._items:  # it may have come just before the event was cleared
                await self._ready.wait()
        with self._lock:
            item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item


class AsyncLLM:
    """Many callers of event loops share one engine, which steps in a thread of its own while there is work.

    Options: see docs/options.md, and `lamella.serve.vllm_arguments` for other arguments of vLLM. Close it with
    `shutdown`, or use it as an async context manager.

    A step that fails ends the requests of that time with its error, and the engine goes on. What ends the engine's
    thread (a `SystemExit`, say) ends every call with `ClosedError`, and so every later one.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = load_engine(EngineOptions(model=model, **engine_options(options)))
        self._ids = itertools.count()
        self._orders: deque[_Order] = deque()
        self._wake = threading.Condition()
        self._queues: dict[str, _OutputQueue] = {}  # used by the engine's thread only
        self._closing = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="lamella-engine", daemon=True)
        self._thread.start()

    __init__.__signature__ = with_options(("model",), "vllm_arguments")  # type: ignore[attr-defined]

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

        A reader that falls behind by more than 16 outputs gets the newest in place of some. Raises `ParameterError` for
        a bad request. Leaving the iteration early, cancelling its task or closing its event loop drops the request
        before the next step; `abort` ends it with what it has.
        """
        prompt = with_tokenization(prompt, lora_request, priority, tokenization_kwargs)
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        params = sampling_params or self.get_default_sampling_params()
        reader = _OutputQueue()

        def start() -> None:
            if reader.is_gone:
                return
            try:
                job = self.engine.make_job(name, prompt, params)
                self.engine.add(job)
            except Exception as error:
                reader.put(error)
                return
            self._queues[name] = reader

        self._order(start, reader.put)
        try:
            while True:
                output = await reader.get()
                if output.finished:
                    reader.has_left = True
                yield output
                if output.finished:
                    return
        finally:
            if not reader.has_left:
                reader.has_left = True
                with self._wake:
                    self._wake.notify()  # the engine's thread looks who has left

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

    def get_default_sampling_params(self) -> SamplingParams:
        """See `LLM.get_default_sampling_params`."""
        return self.engine.admission.default_params()

    def preprocess_chat(self, messages: Sequence[Any], **arguments: Any) -> list[dict[str, Any]]:
        """See `LLM.preprocess_chat`."""
        return chat_prompts(self.engine, messages, **arguments)

    async def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """See `LLM.set_placement`; returns once it is accepted, which may be before it is in force."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if not answer.done():
                answer.set_result(None) if error is None else answer.set_exception(error)

        def reply(error: Exception | None) -> None:
            try:
                loop.call_soon_threadsafe(settle, error)
            except RuntimeError:  # the loop has been closed
                logger.debug("nobody waits for the change of placement")

        def change() -> None:
            try:
                self.engine.switch(placement, running)
            except LamellaError as error:
                reply(error)
            else:
                reply(None)

        self._order(change, reply)
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

    def _order(self, run: Callable[[], None], refuse: Callable[[Exception], None] = lambda error: None) -> None:
        with self._wake:
            if self._failure is not None:
                raise ClosedError(self._failure)
            if self._closing:
                raise ClosedError("the engine has been shut down")
            self._orders.append(_Order(run, refuse))
            self._wake.notify()

    def _run(self) -> None:
        """The engine's thread."""
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
        finally:
            # Whoever ordered something while the thread was ending.
            self._refuse_all(ClosedError(self._failure or "the engine has been shut down"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._orders or self._closing or self.engine.has_work):
                    self._wake.wait()
                closing = self._closing
            for _ in range(len(self._orders)):
                order = self._orders.popleft()
                try:
                    order.run()
                except Exception as error:  # the engine has rolled back whatever was not done whole
                    logger.exception("an order failed")
                    order.refuse(error)
                except BaseException as error:
                    order.refuse(self._closed_by(error))
                    raise
            for name in [name for name, reader in self._queues.items() if reader.is_gone]:
                del self._queues[name]
                self.engine.cancel(name)
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
                self._end_all(error)

    def _closed_by(self, error: BaseException) -> ClosedError:
        text = str(error).partition("\n")[0]
        self._failure = f"the engine has failed and must be made anew: {type(error).__name__}: {text}"
        closed = ClosedError(self._failure)
        closed.__cause__ = error
        return closed

    def _fail(self, error: BaseException) -> None:
        """End every call; nothing is computed any more."""
        logger.critical("the engine's thread ends", exc_info=error)
        closed = self._closed_by(error)
        self._refuse_all(closed)
        readers, self._queues = self._queues, {}
        for reader in readers.values():
            reader.put(closed)
        self.engine.close()

    def _refuse_all(self, error: ClosedError) -> None:
        with self._wake:
            self._closing = True  # no order comes after
            orders, self._orders = self._orders, deque()
        for order in orders:
            order.refuse(error)

    def _end_all(self, error: Exception) -> None:
        readers, self._queues = self._queues, {}
        for name, reader in readers.items():
            reader.put(error)
            self.engine.cancel(name)

    def _deliver(self, job: Job) -> None:
        reader = self._queues.get(job.request_id)
        if reader is not None:
            reader.put(job.output())
            if job.finished:
                del self._queues[job.request_id]

    def _end(self, request_id: str) -> None:
        job = self.engine.cancel(request_id)
        if job is not None:
            self._deliver(job)
