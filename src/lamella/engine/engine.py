"""Engine loop: schedules and executes steps, and returns jobs with new tokens."""

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
    """Runs steps of the added requests. Not thread-safe: a single caller adds requests and calls `step`.

    `lamella.engine.loading` builds an engine from a checkpoint or a model.
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
        """Connect the parts of an engine: `model` is the shard of this rank, `workers` are the other ranks."""
        self.model, self.options, self.device = model, options, device
        self.admission, self.variants, self.scheduler = admission, variants, scheduler
        self.runner, self.workers = runner, workers
        self._in_flight: InFlightStep | None = None
        self._restarted: set[Request] = set()  # requests whose results in `_in_flight` must be dropped
        self._is_changing = False  # True inside `_transaction`, and after one whose roll-back was interrupted
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0, "requests": 0, "errors": 0}

    @property
    def state(self) -> StateManager:
        """Block and slot allocation of the current pools."""
        return self.variants.state

    @property
    def memory(self) -> StateMemory:
        """State tensors of the current pools."""
        return self.variants.memory

    @property
    def cost(self) -> StateCost:
        """Size of the state."""
        return self.variants.cost

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer of prompts and outputs; None if the model has none."""
        return self.admission.tokenizer

    def close(self) -> None:
        """End the processes of the other ranks, if there are any. They also end when the engine is destroyed."""
        self.workers.close()

    def make_job(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Job:
        """Validate a request and turn it into a job, without queueing it. See `Admission.make_job`.

        Raises:
            ParameterError: the request cannot run.
        """
        return self.admission.make_job(request_id, prompt, params)

    def add(self, job: Job) -> None:
        """Queue a job, and decide which variant of the model it runs.

        Args:
            job: returned by `make_job`.

        Raises:
            ParameterError: the job can no longer run, see `Admission.admit`. Nothing is queued.
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
        """Complete a change of requests and their state, or roll it back.

        An exception inside, including KeyboardInterrupt, may leave any state of the step half written. So all
        unfinished requests are recomputed, and prefix keys of the interrupted step are dropped.
        """
        if self._is_changing:
            self._roll_back()  # the previous roll-back was interrupted
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
        self.scheduler.roll_back(self.admission.jobs.requests(without=self.variants.held_jobs))
        self._is_changing = False

    def cancel(self, request_id: str) -> Job | None:
        """End a job. Its unfinished completions get finish reason "abort".

        Returns:
            The job; None if no unfinished job has this id.
        """
        if request_id not in self.admission.jobs:
            return None
        with self._transaction():
            job = self.admission.jobs.remove(request_id)
            if job is None:
                return None  # rolling back an interrupted change has removed it
            self.variants.release(job)  # a held job is queued first, so that all jobs are dropped from the queue
            for completion in job.completions:
                if completion.finish_reason is None:
                    completion.end("abort")
                    self._drop(completion)
        return job

    @property
    def has_work(self) -> bool:
        """True while `step` has work: unfinished requests, an in-flight step, or a pending switch."""
        return self.scheduler.has_work or self._in_flight is not None or self.variants.is_switching

    def switch(self, target: Any, running: str = "finish") -> None:
        """Switch the default variant of the model to `target`, see `Variants.request_switch`.

        Raises:
            ConfigError: the switch is impossible. Nothing has changed.
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
        """Launch one step and collect one.

        With asynchronous scheduling, the launched step is the one after the collected step, so the device computes
        while the host processes results. A request that ends in the collected step is part of one more step, whose
        token is dropped.

        If an exception occurs, the step is rolled back before the exception is raised: no request is lost, and all are
        recomputed and keep their tokens. An error in the output of a single request ends only that request, with finish
        reason "error".

        Returns:
            Jobs with new output, each once.

        Raises:
            WorkerError: the process of another rank has ended. Every later step raises it, too.
        """
        with self.workers.guard(), self._transaction():
            return self._step()

    def _step(self) -> list[Job]:
        before, self._in_flight = self._in_flight, None
        if self.variants.can_switch:
            changed = [] if before is None else self._collect(before)
            self.variants.complete_switch()
            return changed
        if before is not None and any(request.needs_previous_tokens for request in self.scheduler.running):
            return self._collect(before)
        launched = self._launch()
        if launched is None:
            return [] if before is None else self._collect(before)
        if not self.runner.async_scheduling:
            assert before is None
            self.scheduler.mark_computed(launched.chunks)
            return self._collect(launched)
        self._in_flight = launched
        changed = [] if before is None else self._collect(before)
        # After the collection, since the collected tokens are part of the keys of blocks that the launched step fills.
        self.scheduler.mark_computed(launched.chunks)
        return changed

    def _launch(self) -> InFlightStep | None:
        """Schedule and launch a step on all ranks; None if nothing can be scheduled."""
        chunks = self.scheduler.schedule()
        if not chunks:
            return None
        copies = self.state.pop_copies()
        self.workers.launch(chunks, copies)
        self.memory.copy_slots(copies)
        self.state.confirm_copies()
        launched = self.runner.launch(chunks)
        self._counts["steps"] += 1
        for chunk in chunks:
            chunk.request.num_in_flight += chunk.samples
            prompt = len(chunk.request.prompt_token_ids)
            if chunk.start < prompt:
                self._counts["prompt_tokens"] += min(chunk.start + chunk.count, prompt) - chunk.start
        return launched

    def _collect(self, step: InFlightStep) -> list[Job]:
        """Wait for a step, append its results to the completions, and return the jobs with new output."""
        changed: dict[str, Job] = {}
        for chunk, result in zip(step.chunks, self.runner.collect(step), strict=True):
            if result.request in self._restarted:
                self._restarted.discard(result.request)
                continue
            result.request.num_in_flight -= chunk.samples
            entry = self.admission.jobs.find(result.request)
            if entry is None:
                continue  # the request has ended since the launch
            job, completion = entry
            revision = completion.revision
            try:
                completion.receive(chunk.start + 1, result.prompt_logprobs, result.token_id, result.logprobs)
            except NotFiniteError as error:
                if self._restart_alone(result.request):
                    continue
                completion.fail(str(error))
            except MemoryError:  # concerns the whole process, not only this request
                raise
            except Exception as error:  # in the text or log-probabilities of this request
                logger.exception("request %s failed", job.request_id)
                completion.fail(f"{type(error).__name__}: {error}")
            if completion.revision == revision:
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
        """Recompute a request whose logits had NaN or Inf, without the prefix cache, since cached state may be wrong.

        The request's own keys are dropped from the cache in any case.

        Returns:
            False if the request did not use cached state; it is then not recomputed.
        """
        tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self.state.drop_keys(request.block_keys(self.state.block_size, tokens))
        if not request.num_reused:
            return False
        if self._in_flight is not None and any(chunk.request is request for chunk in self._in_flight.chunks):
            self._restarted.add(request)
        self.scheduler.restart(request)
        return True

    def stats(self) -> dict[str, Any]:
        """Return counters since the start (recomputed tokens count again), and current usage."""
        return {**self._counts, **usage(self)}

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes. Running requests are not affected."""
        self.state.reset_prefix_cache()

    def _drop(self, completion: Completion) -> None:
        """Remove an ended completion from the index and the scheduler, and free its state."""
        self.admission.jobs.drop(completion)
        self.scheduler.finish(completion.request)
        completion.request.attachments = ()  # freed with the last request that uses them
