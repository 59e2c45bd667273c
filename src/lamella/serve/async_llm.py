"""Asynchronous inference: the engine runs in its own thread, for callers in event loops such as a server's."""

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

_MAX_UNREAD = 16  # outputs of a request that its reader has not read


class _Command(NamedTuple):
    """Action for the engine thread to execute between steps.

    Attributes:
        run: the action.
        reject: called with the error if the action fails or cannot be executed.
    """

    run: Callable[[], None]
    reject: Callable[[Exception], None]


class _OutputQueue:
    """Queue of a request's outputs, from the engine thread to the caller's event loop.

    The engine thread adds views, which take constant time; the reader copies those that it reads.

    Attributes:
        is_closed: set by the reader when it stops reading.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Callable[[], RequestOutput] | Exception] = deque()
        self._lock = threading.Lock()
        self._ready = asyncio.Event()
        self.is_closed = False

    @property
    def is_abandoned(self) -> bool:
        """True if no further output will be read: the reader has stopped, or its event loop is closed."""
        return self.is_closed or self._loop.is_closed()

    def put(self, item: Callable[[], RequestOutput] | Exception) -> None:
        """Add a view of the output. If the queue is full, it replaces the latest unread one."""
        with self._lock:
            if len(self._items) >= _MAX_UNREAD:
                self._items.pop()  # each output contains all earlier ones, so no token is lost
            self._items.append(item)
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop has been closed
            self.is_closed = True

    async def get(self) -> RequestOutput:
        """Wait for the next output, or raise the error that was added in its place."""
        while not self._items:
            self._ready.clear()
            if not self._items:  # check again: an item may have been added just before the event was cleared
                await self._ready.wait()
        with self._lock:
            item = self._items.popleft()
        if isinstance(item, Exception):
            raise item
        return item()


class AsyncLLM:
    """Language model for concurrent callers in event loops. The engine runs steps in its own thread while it has work.

    Options: see docs/options.md. Other arguments of vLLM: see `lamella.serve.vllm_arguments`. Close it with `shutdown`,
    or use it as an async context manager.

    A step that fails ends all current requests with its error, and the engine continues. If the engine thread itself
    ends (for example by `SystemExit`), all current and later calls raise `ClosedError`.

    Raises:
        ConfigError: an option or the model's config is not supported.
        CheckpointError: the checkpoint's files or tensors do not fit.
        TypeError: an argument does not exist.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.engine = load_engine(EngineOptions(model=model, **engine_options(options)))
        self._ids = itertools.count()
        self._commands: deque[_Command] = deque()
        self._wake = threading.Condition()
        self._queues: dict[str, _OutputQueue] = {}  # used only by the engine thread
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
        """Generate completions of one prompt, and yield the output so far after each new token.

        A reader that is more than 16 outputs behind skips some of them. Leaving the iteration early, cancelling its
        task or closing its event loop cancels the request before the next step. `abort` ends it with its output so far.

        Args:
            prompt: see `LLM.generate`.
            sampling_params: default: `get_default_sampling_params()`.
            request_id: id of the request, unique among unfinished requests; default: a new one.
            lora_request: see `LLM.generate`.
            priority: see `LLM.generate`.
            tokenization_kwargs: see `LLM.generate`.

        Raises:
            ParameterError: the prompt, its sampling parameters or the id are invalid.
            ClosedError: the engine has been shut down, or its thread has ended.
        """
        prompt = with_tokenization(prompt, lora_request, priority, tokenization_kwargs)
        name = request_id if request_id is not None else f"request-{next(self._ids)}"
        params = sampling_params or self.get_default_sampling_params()
        reader = _OutputQueue()

        def start() -> None:
            if reader.is_abandoned:
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
                    reader.is_closed = True
                yield output
                if output.finished:
                    return
        finally:
            if not reader.is_closed:
                reader.is_closed = True
                with self._wake:
                    self._wake.notify()  # the engine thread then cancels the request

    def abort(self, request_id: str) -> None:
        """End a request. Its iterator yields the output so far, with finish reason "abort". Unknown ids are ignored."""
        self._order(lambda: self._end(request_id))

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        return get_tokenizer(self.engine)

    def stats(self) -> dict[str, Any]:
        """Return counters and current usage, see `LLM.stats`."""
        return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes before the next step. Running requests are not affected."""
        self._order(self.engine.reset_prefix_cache)

    def get_default_sampling_params(self) -> SamplingParams:
        """See `LLM.get_default_sampling_params`."""
        return self.engine.admission.default_params()

    def preprocess_chat(self, messages: Sequence[Any], **arguments: Any) -> list[dict[str, Any]]:
        """See `LLM.preprocess_chat`."""
        return chat_prompts(self.engine, messages, **arguments)

    async def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """Switch a supernet to another placement, see `LLM.set_placement`.

        Returns once the switch is accepted, which may be before it is made.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def settle(error: Exception | None) -> None:
            if not answer.done():
                answer.set_result(None) if error is None else answer.set_exception(error)

        def reply(error: Exception | None) -> None:
            try:
                loop.call_soon_threadsafe(settle, error)
            except RuntimeError:  # the loop has been closed
                logger.debug("the caller of set_placement no longer waits for the result")

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
        """Abort all requests, and stop the engine thread and the other ranks."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()
        self.engine.close()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.shutdown)

    def _order(self, run: Callable[[], None], reject: Callable[[Exception], None] = lambda error: None) -> None:
        """Queue a command for the engine thread.

        Raises:
            ClosedError: the engine has been shut down, or its thread has ended.
        """
        with self._wake:
            if self._failure is not None:
                raise ClosedError(self._failure)
            if self._closing:
                raise ClosedError("the engine has been shut down")
            self._commands.append(_Command(run, reject))
            self._wake.notify()

    def _run(self) -> None:
        """Main function of the engine thread."""
        try:
            self._serve()
        except BaseException as error:
            self._fail(error)
        finally:
            # Commands that were submitted while the thread was ending.
            self._reject_all(ClosedError(self._failure or "the engine has been shut down"))

    def _serve(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._closing or self.engine.has_work):
                    self._wake.wait()
                closing = self._closing
            for _ in range(len(self._commands)):
                command = self._commands.popleft()
                try:
                    command.run()
                except Exception as error:  # the engine has rolled back incomplete changes
                    logger.exception("a command of the engine thread failed")
                    command.reject(error)
                except BaseException as error:
                    command.reject(self._record_failure(error))
                    raise
            for name in [name for name, reader in self._queues.items() if reader.is_abandoned]:
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
                # The engine has rolled back the step and can continue; the current requests end.
                logger.exception("a step failed")
                self._end_all(error)

    def _record_failure(self, error: BaseException) -> ClosedError:
        """Record the error that ends the engine thread, and return the error of all further calls."""
        text = str(error).partition("\n")[0]
        self._failure = f"the engine has failed and must be made anew: {type(error).__name__}: {text}"
        closed = ClosedError(self._failure)
        closed.__cause__ = error
        return closed

    def _fail(self, error: BaseException) -> None:
        """End all calls with `ClosedError`, since the engine thread ends."""
        logger.critical("the engine thread ends", exc_info=error)
        closed = self._record_failure(error)
        self._reject_all(closed)
        readers, self._queues = self._queues, {}
        for reader in readers.values():
            reader.put(closed)
        self.engine.close()

    def _reject_all(self, error: ClosedError) -> None:
        with self._wake:
            self._closing = True  # no further command is accepted
            commands, self._commands = self._commands, deque()
        for command in commands:
            command.reject(error)

    def _end_all(self, error: Exception) -> None:
        readers, self._queues = self._queues, {}
        for name, reader in readers.items():
            reader.put(error)
            self.engine.cancel(name)

    def _deliver(self, job: Job) -> None:
        reader = self._queues.get(job.request_id)
        if reader is not None:
            reader.put(job.view())
            if job.finished:
                del self._queues[job.request_id]

    def _end(self, request_id: str) -> None:
        job = self.engine.cancel(request_id)
        if job is not None:
            self._deliver(job)
