"""The engine loop: requests go in, tokens come out, one step at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lamella.engine.options import EngineOptions
from lamella.engine.ranks.workers import Workers
from lamella.engine.requests.admission import Admission
from lamella.engine.requests.completion import Completion, Job, NotFiniteError
from lamella.engine.requests.prompt import Prompt
from lamella.engine.requests.request import Request
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.engine.scheduler import Scheduler
from lamella.engine.stats import usage
from lamella.engine.steps.runner import InFlightStep, ModelRunner
from lamella.engine.variants import Variants
from lamella.layers.decoder import LanguageModel
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory

logger = logging.getLogger("lamella")


class Engine:
    """Runs steps over the requests that were added. Not thread-safe: one caller adds requests and steps.

    `lamella.engine.loading` makes one from a checkpoint or a model.
    """

    def __init__(
        self,
        model: LanguageModel,
        options: EngineOptions,
        device: torch.device,
        admission: Admission,
        variants: Variants,
        scheduler: Scheduler,
        runner: ModelRunner,
        workers: Workers,
    ) -> None:
        """`model` is this rank's shard; `workers` are the other ranks."""
        self.model, self.options, self.device = model, options, device
        self.admission, self.variants, self.scheduler = admission, variants, scheduler
        self.runner, self.workers = runner, workers
        self._in_flight: InFlightStep | None = None  # launched, and not collected yet
        self._restarted: set[Request] = set()  # their results in `_in_flight` are to be dropped
        self._is_changing = False  # a step or a change of the requests is under way, or was interrupted
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0, "requests": 0, "errors": 0}

    @property
    def state(self) -> StateManager:
        """Bookkeeping of the state of the requests."""
        return self.variants.state

    @property
    def memory(self) -> StateMemory:
        """Tensors of the state."""
        return self.variants.memory

    @property
    def cost(self) -> StateCost:
        """Bytes of the state."""
        return self.variants.cost

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of prompts and outputs."""
        return self.admission.tokenizer

    def close(self) -> None:
        """End the processes of other ranks, if there are any. They end with the engine, too."""
        self.workers.close()

    def make_job(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Job:
        """Check a request and make it ready, without queueing it.

        Raises:
            ParameterError: the request cannot run.
        """
        return self.admission.make_job(request_id, prompt, params)

    def add(self, job: Job) -> None:
        """Queue a job that `make_job` made. Its variant of the model is decided now.

        Raises:
            ParameterError: the job cannot run any more, see `Admission.admit`. Nothing is queued.
        """
        variant = self.admission.admit(job)
        with self._transaction():
            self._counts["requests"] += 1
            is_held = self.variants.hold(job)
            self.variants.assign(job, variant)
            self.admission.jobs.add(job)
            if not is_held:
                for completion in job.completions:
                    self.scheduler.add(completion.request)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Make a change of the requests and their state complete, or roll it back.

        An exception inside, an interrupt included, may leave any part of the step's state half written. So all
        requests that have not ended are computed again, and nothing that was written last can be found.
        """
        if self._is_changing:
            self._roll_back()  # the last roll-back was interrupted itself
        self._is_changing = True
        try:
            yield
        except BaseException:
            self._roll_back()
            raise
        self._is_changing = False

    def _roll_back(self) -> None:
        self._in_flight = None
        self._restarted.clear()
        self.admission.jobs.roll_back()
        self.runner.reset()
        self.scheduler.state = self.state
        self.scheduler.roll_back(self.admission.jobs.requests(without=self.variants.held))
        self._is_changing = False

    def cancel(self, request_id: str) -> Job | None:
        """End a job now; its unfinished completions end with "abort". None if no such job is running."""
        if request_id not in self.admission.jobs:
            return None
        with self._transaction():
            job = self.admission.jobs.remove(request_id)
            if job is None:
                return None  # it went with an interrupted change
            self.variants.release(job)  # into the queue, from which it is dropped like any other
            for completion in job.completions:
                if completion.finish_reason is None:
                    completion.end("abort")
                    self._drop(completion)
        return job

    @property
    def has_work(self) -> bool:
        """True while a step would do something."""
        return self.scheduler.has_work or self._in_flight is not None or self.variants.is_switching

    def switch(self, target: Any, running: str = "finish") -> None:
        """Have requests that name no variant of the model run as `target`, see `Variants.request_switch`.

        Raises:
            ConfigError: the switch is impossible; nothing has changed.
        """
        self.variants.request_switch(target, running)
        if self._in_flight is None and self.variants.can_switch:
            try:
                with self.workers.guard(), self._transaction():
                    self.variants.complete_switch()
            except BaseException:
                self.variants.abandon_switch()
                raise

    def step(self) -> list[Job]:
        """Launch a step and collect one; return the jobs with new output, each once.

        With asynchronous scheduling the launched step is the one after the collected step: the device computes while
        the host reads. A request that turns out to have ended was given one step too many, whose token is dropped.

        An exception is raised after the step has been rolled back: no request is lost, all are computed again and keep
        their tokens. An error in a single request's output ends that request alone, with finish reason "error".

        Raises:
            WorkerError: another rank's process has ended; every later step raises it, too.
        """
        with self.workers.guard(), self._transaction():
            return self._step()

    def _step(self) -> list[Job]:
        before, self._in_flight = self._in_flight, None
        if self.variants.can_switch:
            changed = [] if before is None else self._collect(before)
            self.variants.complete_switch()
            return changed
        if before is not None and any(request.looks_back for request in self.scheduler.running):
            return self._collect(before)
        launched = self._launch()
        if launched is None:
            return [] if before is None else self._collect(before)
        if not self.runner.runs_ahead:
            assert before is None
            self.scheduler.computed(launched.chunks)
            return self._collect(launched)
        self._in_flight = launched
        changed = [] if before is None else self._collect(before)
        # Only now are the tokens known that name the blocks that the launched step fills.
        self.scheduler.computed(launched.chunks)
        return changed

    def _launch(self) -> InFlightStep | None:
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        copies = self.state.take_copies()
        self.workers.launch(chunks, copies)
        self.memory.copy_slots(copies)
        self.state.copied()
        launched = self.runner.launch(chunks)
        self._counts["steps"] += 1
        for chunk in chunks:
            chunk.request.num_in_flight += chunk.samples
            prompt = len(chunk.request.prompt_token_ids)
            if chunk.start < prompt:
                self._counts["prompt_tokens"] += min(chunk.start + chunk.count, prompt) - chunk.start
        return launched

    def _collect(self, step: InFlightStep) -> list[Job]:
        changed: dict[str, Job] = {}
        for chunk, result in zip(step.chunks, self.runner.collect(step), strict=True):
            if result.request in self._restarted:
                self._restarted.discard(result.request)
                continue
            result.request.num_in_flight -= chunk.samples
            entry = self.admission.jobs.find(result.request)
            if entry is None:
                continue  # it has ended since
            job, completion = entry
            had = completion.revision
            try:
                completion.receive(chunk.start + 1, result.prompt_logprobs, result.token_id, result.logprobs)
            except NotFiniteError as error:
                if self._restart_alone(result.request):
                    continue
                completion.fail(str(error))
            except MemoryError:  # of the process, not of this request
                raise
            except Exception as error:  # in the request's own text or log-probabilities
                logger.exception("request %s failed", job.request_id)
                completion.fail(f"{type(error).__name__}: {error}")
            if completion.revision == had:
                continue
            changed[job.request_id] = job
            self._counts["generated_tokens" if completion.error is None else "errors"] += 1
            if completion.finish_reason is not None:
                self._drop(completion)
        self.state.commit()
        if not self.has_work:
            self.state.check_at_rest()
        return list(changed.values())

    def _restart_alone(self, request: Request) -> bool:
        """Compute a request with NaN or Inf again, without the prefix cache; False if it did not use the cache.

        State that it took from the cache may be the cause. What it has left in the cache is forgotten in any case.
        """
        tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self.state.forget(request.block_keys(self.state.block_size, tokens))
        if not request.num_reused:
            return False
        if self._in_flight is not None and any(chunk.request is request for chunk in self._in_flight.chunks):
            self._restarted.add(request)
        self.scheduler.restart(request)
        return True

    def stats(self) -> dict[str, Any]:
        """Return counts since the start (recomputed tokens count again), and what is in use now."""
        return {**self._counts, **usage(self)}

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix. Running requests are not affected."""
        self.state.reset_prefix_cache()

    def _drop(self, completion: Completion) -> None:
        self.admission.jobs.drop(completion)
        self.scheduler.finish(completion.request)
        completion.request.attachments = ()  # their memory goes with the last request that needs them
