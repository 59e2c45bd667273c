"""The engine: a model, its state, a scheduler; requests go in, tokens come out, one step at a time."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from lamella.checkpoint import open_checkpoint
from lamella.config import Placement, PlacementLike, read_placement
from lamella.engine.capacity import ShortPrompts, check_pools, longest_answer, memory_budget, say_what_cannot_hit
from lamella.engine.constructed import prepare_module
from lamella.engine.images.embeddings import ImageRows
from lamella.engine.images.reader import ImageReader, place_images
from lamella.engine.loading import check_split, load_images, load_part, round_norms_twice
from lamella.engine.options import EngineOptions
from lamella.engine.placements.pools import Residence, Residences, Switch
from lamella.engine.ranks.workers import WorkerProcesses, Workers
from lamella.engine.requests.completion import Completion, Job, NotFiniteError
from lamella.engine.requests.jobs import Jobs
from lamella.engine.requests.prompt import Prompt, read_prompt
from lamella.engine.requests.request import Request
from lamella.engine.requests.resolve_params import resolve_params, truncated
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer, load_tokenizer
from lamella.engine.scheduler import Scheduler
from lamella.engine.stats import usage
from lamella.engine.steps.runner import Flight, ModelRunner
from lamella.engine.warm_up import warm_up
from lamella.errors import ConfigError, ParameterError
from lamella.layers.compiled.model import CompiledModel
from lamella.layers.decoder import LanguageModel
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory
from lamella.state.prefix import root_key
from lamella.vision.image_model import ImageModel

logger = logging.getLogger("lamella")


class Engine:
    """Not thread-safe: one caller adds requests and steps."""

    def __init__(
        self,
        model: LanguageModel,
        options: EngineOptions,
        device: torch.device,
        tokenizer: Tokenizer | None = None,
        eos_token_ids: tuple[int, ...] = (),
        workers: Workers | None = None,
        make_runner: Callable[..., ModelRunner] = ModelRunner,
        images: ImageModel | None = None,
    ) -> None:
        """`model` is this rank's part, and `workers` are the other ranks, which make the same engine of theirs.

        `images` reads the images of prompts, on rank 0 alone; None takes none.
        """
        self.workers = workers or Workers()
        self.model, self.options, self.device, self.tokenizer = model, options, device, tokenizer
        self.eos_token_ids = eos_token_ids
        self.max_model_len = options.resolve_length(model.config)
        if options.placement is not None:
            model.set_placement(options.placement)
        if options.mixed_placements and not model.has_choice:
            raise ConfigError("mixed_placements=True: no layer of the model has a choice of mixers")
        self._images = None if images is None else ImageReader(images, options.max_images)
        dtype = model.get_parameter("model.embed_tokens.weight").dtype
        if options.round_norms_twice:
            round_norms_twice(model, dtype)
        rows = ImageRows(model.config.hidden_size, dtype, device, self.workers.group, images)
        reserved = warm_up(model, options, self.max_model_len, device, rows)
        budget = memory_budget(device, reserved, self.workers.group, options.gpu_memory_utilization)
        self._residences = Residences(model, options, self.max_model_len, device, budget)
        self._residence = self._residences.find(model.placement)
        self._residences.move_in(self._residence)
        say_what_cannot_hit(options, self.cost, self._residence.plan, self.max_model_len)
        self.scheduler = Scheduler(
            self.state,
            options.max_num_seqs,
            options.max_num_batched_tokens,
            options.snapshot_interval,
            options.snapshot_prompts,
        )
        compiled = CompiledModel(model) if options.enable_compile else None
        sizes = self.max_model_len, options.max_num_seqs
        self.runner = make_runner(model, self.state, device, *sizes, rows, compiled)
        if options.enforce_eager and device.type != "cuda":
            logger.info("enforce_eager: without effect, since there are no graphs on this device")
        self.runner.warm_up(graphs=not options.enforce_eager)
        self._switch: Switch | None = None
        self.workers.before_stop(self.runner.drop_graphs)
        self.workers.follow(self.state)
        self._ahead: Flight | None = None  # a step that has been launched, and not collected yet
        self._restarted: set[Request] = set()  # those whose results in `_ahead` are to be dropped
        self._is_changing = False  # a step or a change of the requests is under way, or was interrupted
        self._seeds = itertools.count()
        self._jobs = Jobs()
        self._short_prompts = ShortPrompts(options)
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0, "requests": 0, "errors": 0}

    @property
    def state(self) -> StateManager:
        return self._residence.state

    @property
    def cost(self) -> StateCost:
        """Of the state that is kept."""
        return self._residence.cost

    @property
    def memory(self) -> StateMemory:
        assert self._residence.memory is not None
        return self._residence.memory

    @property
    def placement(self) -> Placement:
        """Of a supernet, the mixer of each layer for requests that ask for no other; None where there is no choice."""
        return self._residence.placement

    @property
    def image_token_ids(self) -> frozenset[int]:
        """The tokens that a prompt without images must not have."""
        return frozenset() if self._images is None else self._images.token_ids

    @classmethod
    def load(cls, options: EngineOptions) -> Engine:
        """The engine of a checkpoint. Raises `ConfigError` or `CheckpointError` with one line."""
        device = options.resolve_device()
        if isinstance(options.model, LanguageModel):
            model, tokenizer, eos = prepare_module(options.model, options, device)
            return cls(model, options, device, tokenizer, eos)
        checkpoint = open_checkpoint(options.model, options.hf_overrides, options.revision)
        check_split(checkpoint, options)
        workers = WorkerProcesses(options, device) if options.tensor_parallel_size > 1 else Workers()
        with workers.guard():
            tokenizer = load_tokenizer(options, checkpoint.path)
            images = load_images(checkpoint, options, device, tokenizer)
            model = load_part(checkpoint, options, device, workers.group)
            workers.connect(device)
            eos = checkpoint.eos_token_ids(model.config, None if tokenizer is None else tokenizer.eos_token_id)
            return cls(model, options, device, tokenizer, eos, workers, images=images)

    def close(self) -> None:
        """End the processes of other ranks, if there are any. They end with the engine, too."""
        self.workers.close()

    def make_job(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Job:
        """Check a request and get it ready, without queueing it. Raises `ParameterError`."""
        if request_id in self._jobs:
            raise ParameterError(f"request_id={request_id!r}: a request of this id is running")
        if not isinstance(params, SamplingParams):
            raise ParameterError(f"sampling_params: must be a SamplingParams, not {type(params).__name__}")
        vocab_size = self.model.config.vocab_size
        # Checked again, and with lists of its own: the caller may have changed the lists.
        params = resolve_params(replace(params), self.tokenizer, vocab_size, self.options.max_logprobs)
        given = truncated(read_prompt(prompt, self.tokenizer, vocab_size), params, self.tokenizer, self.max_model_len)
        token_ids, images = place_images(self._images, given.token_ids, given.images, self.options.max_images)
        if params.stop_strings and self.tokenizer is None:
            raise ParameterError(f"stop={params.stop!r}: without tokenizer.json there is no text to stop at")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise ParameterError(
                f"prompt of {len(token_ids)} tokens: max_model_len={self.max_model_len} leaves no room for an answer"
            )
        max_tokens = min(params.max_tokens or room, room)
        if params.max_tokens is None:  # no limit, so what the pools hold is one
            max_tokens = longest_answer(self._next_residence.state, self.options, len(token_ids), max_tokens)
        self._resolve(params, len(token_ids) + max_tokens)
        # A prompt's log-probabilities are the same for all completions, so the first alone has them.
        others = params if params.n == 1 else replace(params, prompt_logprobs=None)
        seed = params.seed if params.seed is not None else self._next_seed()
        self._short_prompts.count(len(token_ids))
        completions = [
            Completion(
                Request(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    params=others if index else params,
                    seed=seed + index,
                    max_tokens=max_tokens,
                    eos_token_ids=self.eos_token_ids,
                    images=images,
                ),
                index,
                self.tokenizer,
            )
            for index in range(params.n)
        ]
        return Job(request_id, given.text, completions, given.salt)

    def add(self, job: Job) -> None:
        """Queue a job that `make_job` made.

        The job's placement is decided now: its own, or else the engine's, which may have changed since `make_job`.

        Raises:
            ParameterError: the engine no longer serves the job's own placement, or the job does not fit under the
                engine's present one, or a request of its id is running. Nothing is queued.
        """
        if job.request_id in self._jobs:
            raise ParameterError(f"request_id={job.request_id!r}: a request of this id is running")
        request = job.completions[0].request
        placement = self._resolve(request.params, len(request.prompt_token_ids) + request.max_tokens)
        root = self._prefix_root(placement, job.salt)
        with self._change():
            self._counts["requests"] += 1
            if self._switch is not None:
                self._switch.held.append(job)
            for completion in job.completions:
                completion.request.place(placement if self.options.mixed_placements else (), root)
            self._jobs.add(job)
            if self._switch is None:
                self._queue(job)

    @contextmanager
    def _change(self) -> Iterator[None]:
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
        self._ahead = None
        self._restarted.clear()
        self._jobs.roll_back()
        self.runner.reset()
        self.scheduler.state = self.state
        self.scheduler.roll_back(self._jobs.requests(without=self._switch.held if self._switch is not None else ()))
        self._is_changing = False

    def _queue(self, job: Job) -> None:
        for completion in job.completions:
            self.scheduler.add(completion.request)

    def cancel(self, request_id: str) -> Job | None:
        """End a job now; its unfinished completions end with "abort". None where no such job is running."""
        if request_id not in self._jobs:
            return None
        with self._change():
            job = self._jobs.remove(request_id)
            if job is None:
                return None  # it went with an interrupted change
            if self._switch is not None and job in self._switch.held:
                self._switch.held.remove(job)
                self._queue(job)  # from where it is dropped, like any other
            for completion in job.completions:
                if completion.finish_reason is None:
                    completion.end("abort")
                    self._drop(completion)
        return job

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or self._ahead is not None or self._switch is not None

    def check_placement(self, placement: PlacementLike | None) -> Residence:
        """What `set_placement` would move into. Raises `ConfigError` where a name is wrong or the state does not fit;
        changes nothing.
        """
        return self._residences.find(read_placement(placement, self.model.config))

    def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """Compute with another placement of a supernet, see `read_placement`: from the next step on where nothing is
        running; else what is queued or running finishes under the old one first, and what comes after waits for that,
        or, with `running="recompute"`, all of it is computed anew under the new placement, its output so far kept.

        With `mixed_placements` nothing waits: who is running goes on under its own placement.

        Raises `ConfigError`, and changes nothing, where a name is wrong, the state does not fit, or a request that
        would be computed under it does not fit or asked for another.
        """
        if running not in ("finish", "recompute"):
            raise ConfigError(f"running={running!r}: must be finish or recompute")
        residence = self.check_placement(placement)
        held, begun = ([], False) if self._switch is None else (self._switch.held, self._switch.begun)
        recompute = running == "recompute" or begun  # if begun, nothing has kept its state
        waiting = [(job, completion) for job in held for completion in job.completions]
        for job, completion in self._jobs if recompute else waiting:
            request = completion.request
            try:
                check_pools(len(request.prompt_token_ids) + request.max_tokens - 1, residence.state, self.options)
            except ParameterError as error:
                raise ConfigError(f"placement: request {job.request_id} would not fit: {error}") from error
            own = request.params.placement
            if own is None or self.options.mixed_placements:
                continue
            if read_placement(own, self.model.config) != residence.placement:
                raise ConfigError(f"placement: request {job.request_id} asked for {own!r}, and is not through yet")
        before = self.placement if self._switch is None else self._switch.residence.placement
        self._switch = Switch(residence, recompute, held, begun)
        if self._ahead is None and self._can_switch:
            try:
                with self.workers.guard(), self._change():
                    self._complete_switch()
            except BaseException:
                if self._switch is not None and self._switch.begun:  # the next step goes back
                    self._switch = Switch(self._residences.find(before), True, self._switch.held, begun=True)
                raise

    @property
    def _can_switch(self) -> bool:
        """Whether a change of placement that was asked for can be made once nothing is in flight."""
        if self._switch is None:
            return False
        switch = self._switch
        return switch.recompute or switch.begun or self.options.mixed_placements or not self.scheduler.has_work

    def _complete_switch(self) -> None:
        """Make the change that was asked for; nothing is in flight. If it is interrupted, it can be made again."""
        switch = self._switch
        assert switch is not None
        if switch.recompute:
            self.scheduler.preempt_all()
        if switch.begun or switch.residence.placement != self.placement:
            switch.begun = True
            before = self.state
            self.workers.move(switch.residence.placement)
            self.move(switch.residence.placement)
            if self.state is not before:
                self.workers.follow(self.state)
        # If all is recomputed, nothing is left but requests without state, queued or held.
        held = [(job, completion) for job in switch.held for completion in job.completions]
        for job, completion in self._jobs if switch.recompute else held:
            if completion.request.params.placement is None:
                own = self.placement if self.options.mixed_placements else ()
                completion.request.place(own, self._prefix_root(self.placement, job.salt))
        while switch.held:
            self._queue(switch.held[0])
            del switch.held[0]
        self._switch = None

    def move(self, placement: Placement) -> None:
        """Make this the placement of the engine's own part. No request may hold anything, unless all placements share
        one residence.
        """
        residence = self._residences.find(placement)
        self.model.activate(placement)
        if self.options.mixed_placements:
            self._residence.placement = placement
        else:
            assert not self.state.holdings
            for dropped in self._residences.move_in(residence):
                self.runner.forget(dropped.state)
            self._residence = residence
            self.scheduler.state = residence.state
        self.runner.move(self.state, graphs=not self.options.enforce_eager)

    @property
    def _next_residence(self) -> Residence:
        """Where a request that comes now will live."""
        return self._residence if self._switch is None else self._switch.residence

    def _resolve(self, params: SamplingParams, length: int) -> Placement:
        """Return the placement that a request would be computed with now. Raises `ParameterError` where it is not
        served, or where prompt and output, `length` tokens, do not fit.
        """
        placement = self._residences.placement_of(params.placement, self._next_residence.placement)
        check_pools(length - 1, self._next_residence.state, self.options)
        return placement

    def step(self) -> list[Job]:
        """Launch a step and take the results of one; the jobs that have got something new, each once.

        Where the runner runs ahead, the step launched is the one after that whose results are taken: the device goes
        on while the host reads. A request that turns out to have ended has then been given one step too many, whose
        token is dropped.

        An exception is raised to whoever steps, after the step has been rolled back: all requests are still there,
        lose their state and are computed again, tokens that they have are kept. An error in a single request's output
        ends that request alone, with finish reason "error".

        Raises `WorkerError` where another rank's process has ended; so does every later step.
        """
        with self.workers.guard(), self._change():
            return self._step()

    def _step(self) -> list[Job]:
        before, self._ahead = self._ahead, None
        if self._can_switch:
            changed = [] if before is None else self._take(before)
            self._complete_switch()
            return changed
        if before is not None and any(request.looks_back for request in self.scheduler.running):
            return self._take(before)
        flight = self._launch()
        if flight is None:
            return [] if before is None else self._take(before)
        if not self.runner.runs_ahead:
            assert before is None
            self.scheduler.computed(flight.shares)
            return self._take(flight)
        self._ahead = flight
        changed = [] if before is None else self._take(before)
        # Only now are the tokens known that name the pages that the launched step fills.
        self.scheduler.computed(flight.shares)
        return changed

    def _launch(self) -> Flight | None:
        shares = self.scheduler.schedule()
        if not shares:
            return None
        copies = self.state.take_copies()
        self.workers.launch(shares, copies)
        self.memory.copy_slots(copies)
        self.state.copied()
        flight = self.runner.launch(shares)
        self._counts["steps"] += 1
        for share in shares:
            share.request.num_pending += share.samples
            prompt = len(share.request.prompt_token_ids)
            if share.start < prompt:
                self._counts["prompt_tokens"] += min(share.start + share.count, prompt) - share.start
        return flight

    def _take(self, flight: Flight) -> list[Job]:
        changed: dict[str, Job] = {}
        for share, result in zip(flight.shares, self.runner.collect(flight), strict=True):
            if result.request in self._restarted:
                self._restarted.discard(result.request)
                continue
            result.request.num_pending -= share.samples
            entry = self._jobs.find(result.request)
            if entry is None:
                continue  # it has ended since
            job, completion = entry
            had = completion.revision
            try:
                completion.receive(share.start + 1, result.prompt_logprobs, result.token_id, result.logprobs)
            except NotFiniteError as error:
                if self._blames_others(result.request):
                    continue
                completion.fail(str(error))
            except MemoryError:  # of the process, not of this request
                raise
            except Exception as error:  # of its own text or log-probabilities: nobody else's
                logger.exception("request %s failed", job.request_id)
                completion.fail(f"{type(error).__name__}: {error}")
            if completion.revision == had:
                continue
            changed[job.request_id] = job
            if completion.error is None:
                self._counts["generated_tokens"] += 1
            else:
                self._counts["errors"] += 1
            if completion.finish_reason is not None:
                self._drop(completion)
        self.state.commit()
        if not self.has_work:
            self.state.check_at_rest()
        return list(changed.values())

    def _blames_others(self, request: Request) -> bool:
        """Forget what a request with NaN or Inf has left in the prefix cache. If it started with state of others, which
        may be why, compute it again by itself, and return True.
        """
        tokens = len(request.prompt_token_ids) + len(request.output_token_ids)
        self.state.forget(request.page_keys(self.state.page_size, tokens))
        if not request.num_reused:
            return False
        if self._ahead is not None and any(share.request is request for share in self._ahead.shares):
            self._restarted.add(request)
        self.scheduler.restart(request)
        return True

    def stats(self) -> dict[str, Any]:
        """Counts since the start (tokens computed again after a preemption count again), and what is in use now."""
        return {**self._counts, **usage(self)}

    def reset_prefix_cache(self) -> None:
        """Forget every prefix: what starts from now on is computed whole. Running requests go on undisturbed."""
        self.state.reset_prefix_cache()

    def _drop(self, completion: Completion) -> None:
        self._jobs.drop(completion)
        self.scheduler.finish(completion.request)
        completion.request.images = ()  # their rows go with the last request that may still need them

    def _prefix_root(self, placement: Placement, salt: str | None) -> bytes | None:
        """What a request's prefixes are keyed by; None where it takes no part in the cache."""
        if not self.options.enable_prefix_caching:
            return None
        return root_key(self.options.name, placement, salt)

    def _next_seed(self) -> int:
        """A seed of its own for each request that has none, reproducible from the engine's."""
        digest = hashlib.sha256(f"{self.options.seed}/{next(self._seeds)}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)
