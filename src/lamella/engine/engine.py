"""The engine: a model, its state, a scheduler; requests go in, tokens come out, one step at a time."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from lamella.checkpoint import load_model, open_checkpoint
from lamella.checkpoint.files import Checkpoint
from lamella.checkpoint.loader import resolve_dtype
from lamella.config import MoEConfig, Placement, PlacementLike, describe_placement, read_placement
from lamella.distributed.group import Group
from lamella.distributed.sharding import Share
from lamella.distributed.workers import WorkerProcesses, Workers
from lamella.engine.capacity import longest_answer, memory_budget, say_what_cannot_hit
from lamella.engine.compiled import CompiledModel
from lamella.engine.completion import Completion, Job
from lamella.engine.constructed import prepare_module
from lamella.engine.image_rows import ImageRows
from lamella.engine.images import ImageReader, PlacedImage
from lamella.engine.options import EngineOptions
from lamella.engine.prompt import GivenPrompt, Prompt, read_prompt
from lamella.engine.request import Request
from lamella.engine.residence import Residence, Residences
from lamella.engine.resolve_params import resolve_params, truncated
from lamella.engine.runner import Flight, ModelRunner
from lamella.engine.sampling_params import SamplingParams
from lamella.engine.scheduler import Scheduler
from lamella.engine.tokenizer import Tokenizer, load_tokenizer
from lamella.engine.warm_up import warm_up
from lamella.errors import ConfigError, ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.layers.kit import LocalKit
from lamella.layers.norm import RMSNorm
from lamella.models.base import ImageModel
from lamella.state.manager import StateManager
from lamella.state.memory import StateCost, StateMemory
from lamella.state.prefix import root_key

logger = logging.getLogger("lamella")

# So many prompts, none of which fills a page, are worth a warning.
_SHORT_PROMPTS = 32


@dataclass
class _Switch:
    """A change of placement that waits for what is running; `held` are the jobs that came after."""

    residence: Residence
    recompute: bool
    held: list[Job]


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
            _round_norms_twice(model, dtype)
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
        self._switch: _Switch | None = None
        self._own_placements: dict[Placement, Placement] = {}
        self.workers.before_stop(self.runner.drop_graphs)
        self.workers.follow(self.state)
        self._ahead: Flight | None = None  # a step that has been launched, and not collected yet
        self._seeds = itertools.count()
        self._jobs: dict[str, Job] = {}
        self._completions: dict[Request, tuple[Job, Completion]] = {}
        self._short_prompts: int | None = 0  # so far, while there were no others
        self._counts = {"steps": 0, "prompt_tokens": 0, "generated_tokens": 0, "requests": 0}

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
        vocab_size = self.model.config.vocab_size
        params = resolve_params(params, self.tokenizer, vocab_size, self.options.max_logprobs)
        given = read_prompt(prompt, self.tokenizer, vocab_size)
        given = truncated(given, params, self.tokenizer, self.max_model_len)
        token_ids, images = self._place_images(given)
        if params.stop_strings and self.tokenizer is None:
            raise ParameterError(f"stop={params.stop!r}: without tokenizer.json there is no text to stop at")
        room = self.max_model_len - len(token_ids)
        if room < 1:
            raise ParameterError(
                f"prompt of {len(token_ids)} tokens: max_model_len={self.max_model_len} leaves no room for an answer"
            )
        placement = self._placement_of(params)
        state = self._next_residence.state
        max_tokens = min(params.max_tokens or room, room)
        if params.max_tokens is None:  # no limit, so what the pools hold is one
            max_tokens = longest_answer(state, len(token_ids), max_tokens, self.options.max_num_batched_tokens)
        self._check_pools(len(token_ids) + max_tokens - 1, state)
        seed = params.seed if params.seed is not None else self._next_seed()
        self._watch_lengths(len(token_ids))
        root = self._prefix_root(placement, given.salt)
        completions = [
            Completion(
                Request(
                    request_id=request_id,
                    prompt_token_ids=token_ids,
                    # A prompt's log-probabilities are the same for all completions.
                    params=params if index == 0 else replace(params, prompt_logprobs=None),
                    seed=seed + index,
                    max_tokens=max_tokens,
                    eos_token_ids=self.eos_token_ids,
                    prefix_root=root,
                    placement=placement if self.options.mixed_placements else (),
                    images=images,
                ),
                index,
                self.tokenizer,
            )
            for index in range(params.n)
        ]
        return Job(request_id, given.text, completions, given.salt)

    def add(self, job: Job) -> None:
        """Queue a job that `make_job` made."""
        self._jobs[job.request_id] = job
        self._counts["requests"] += 1
        for completion in job.completions:
            self._completions[completion.request] = (job, completion)
        if self._switch is not None:
            self._switch.held.append(job)
        else:
            self._queue(job)

    def _queue(self, job: Job) -> None:
        for completion in job.completions:
            self.scheduler.add(completion.request)

    def cancel(self, request_id: str) -> Job | None:
        """End a job now; its unfinished completions end with "abort". None where no such job is running."""
        job = self._jobs.pop(request_id, None)
        if job is not None:
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
        changes nothing."""
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
        recompute = running == "recompute"
        held = self._switch.held if self._switch is not None else []
        waiting = [(job, completion) for job in held for completion in job.completions]
        for job, completion in self._completions.values() if recompute else waiting:
            request = completion.request
            try:
                self._check_pools(len(request.prompt_token_ids) + request.max_tokens - 1, residence.state)
            except ParameterError as error:
                raise ConfigError(f"placement: request {job.request_id} would not fit: {error}") from error
            own = request.params.placement
            if own is None or self.options.mixed_placements:
                continue
            if read_placement(own, self.model.config) != residence.placement:
                raise ConfigError(f"placement: request {job.request_id} asked for {own!r}, and is not through yet")
        self._switch = _Switch(residence, recompute, held)
        if self._ahead is None and self._can_switch:
            self._complete_switch()

    @property
    def _can_switch(self) -> bool:
        """Whether a change of placement that was asked for can be made once nothing is in flight."""
        if self._switch is None:
            return False
        return self._switch.recompute or self.options.mixed_placements or not self.scheduler.has_work

    def _complete_switch(self) -> None:
        """The switch that was asked for; nothing is in flight."""
        switch, self._switch = self._switch, None
        assert switch is not None
        if switch.recompute:
            self.scheduler.preempt_all()
        if switch.residence.placement != self.placement:
            before = self.state
            self.workers.move(switch.residence.placement)
            self.move(switch.residence.placement)
            if self.state is not before:
                self.workers.follow(self.state)
        waiting = [self._completions[request] for request in self.scheduler.waiting] if switch.recompute else []
        waiting += [(job, completion) for job in switch.held for completion in job.completions]
        for job, completion in waiting:
            if completion.request.params.placement is None:
                own = self.placement if self.options.mixed_placements else ()
                completion.request.place(own, self._prefix_root(self.placement, job.salt))
        for job in switch.held:
            self._queue(job)

    def move(self, placement: Placement) -> None:
        """Make this the placement of the engine's own part. No request may hold anything, unless all placements share
        one residence."""
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

    def _placement_of(self, params: SamplingParams) -> Placement:
        """A request's own placement, or the engine's."""
        usual = self._next_residence.placement
        if params.placement is None:
            return usual
        try:
            own = read_placement(params.placement, self.model.config)
        except ConfigError as error:
            raise ParameterError(str(error)) from error
        if own != usual and not self.options.mixed_placements:
            raise ParameterError(
                f"placement={describe_placement(own)!r}: the engine keeps state for {describe_placement(usual)!r} "
                "only; LLM(mixed_placements=True) keeps it for every mixer"
            )
        return self._own_placements.setdefault(own, own)  # so that equal ones are one object

    def step(self) -> list[Job]:
        """Launch a step and take the results of one; the jobs that have got something new, each once.

        Where the runner runs ahead, the step launched is the one after that whose results are taken: the device goes
        on while the host reads. A request that turns out to have ended has then been given one step too many, whose
        token is dropped.

        Raises `WorkerError` where another rank's process has ended; so does every later step.
        """
        with self.workers.guard():
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
            result.request.num_pending -= share.samples
            entry = self._completions.get(result.request)
            if entry is None:
                continue  # it has ended since
            job, completion = entry
            if result.prompt_logprobs:
                completion.take_prompt(share.start + 1, result.prompt_logprobs)
            if result.token_id is None:
                continue
            completion.take(result.token_id, result.logprobs)
            self._counts["generated_tokens"] += 1
            changed[job.request_id] = job
            if completion.finish_reason is not None:
                self._drop(completion)
                if job.finished:
                    del self._jobs[job.request_id]
        if not self.has_work:
            self.state.check_at_rest()
        return list(changed.values())

    def stats(self) -> dict[str, Any]:
        """Counts since the start (tokens computed again after a preemption count again), and what is in use now."""
        pools, slots, scheduler = self.state.page_pools, self.state.slot_pool, self.scheduler
        capacity, free = sum(p.capacity for p in pools), sum(p.num_free for p in pools)
        started, cached = scheduler.num_started_tokens, scheduler.num_cached_tokens
        return {
            **self._counts,
            "graph_steps": self.runner.num_replays,
            "preemptions": self.scheduler.num_preemptions,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "pages": capacity,
            "pages_used": capacity - free,
            "page_groups": [
                {
                    "window": group.window,
                    "chunk": group.chunk,
                    "pages": pool.capacity,
                    "used": pool.num_held,
                    "cached": pool.num_cached,
                }
                for group, pool in zip(self.state.groups, pools, strict=True)
            ],
            "slots": self.options.max_num_seqs,
            "slots_used": slots.num_held,
            "state_bytes": self.memory.nbytes,
            "placement": describe_placement(self.placement) if self.model.has_choice else None,
            "prefix_hit_tokens": cached,
            "prefix_hit_rate": cached / started if self.options.enable_prefix_caching and started else None,
            "prefix_cached_pages": sum(pool.num_cached for pool in pools),
            "prefix_snapshots": slots.num_cached,
            "prefix_snapshot_bytes": slots.num_cached * self.cost.bytes_per_request,
            "prefix_evictions": slots.num_evictions + sum(pool.num_evictions for pool in pools),
        }

    def reset_prefix_cache(self) -> None:
        """Forget every prefix: what starts from now on is computed whole. Running requests go on undisturbed."""
        self.state.reset_prefix_cache()

    def _drop(self, completion: Completion) -> None:
        del self._completions[completion.request]
        self.scheduler.finish(completion.request)
        completion.request.images = ()  # their rows go with the last request that may still need them

    def _place_images(self, given: GivenPrompt) -> tuple[list[int], tuple[PlacedImage, ...]]:
        """A prompt's tokens with the images in their places."""
        if self._images is not None:
            return self._images.place(given.token_ids, given.images)
        if given.images:
            why = "limit_mm_per_prompt allows 0" if self.options.max_images == 0 else "the model reads none"
            raise ParameterError(f"multi_modal_data: {len(given.images)} images, and {why}")
        return given.token_ids, ()

    def _prefix_root(self, placement: Placement, salt: str | None) -> bytes | None:
        """What a request's prefixes are keyed by; None where it takes no part in the cache."""
        if not self.options.enable_prefix_caching:
            return None
        return root_key(self.options.name, placement, salt)

    def _watch_lengths(self, length: int) -> None:
        """Say once where prompts are too short for the prefix cache."""
        if self.options.enable_prefix_caching and self._short_prompts is not None:
            self._short_prompts = self._short_prompts + 1 if length <= self.options.block_size else None
            if self._short_prompts == _SHORT_PROMPTS:
                logger.warning(
                    "prefix cache: the first %d prompts are no longer than a page, so that none of them can "
                    "hit; block_size=%d is the page's size in tokens",
                    _SHORT_PROMPTS,
                    self.options.block_size,
                )

    def _check_pools(self, tokens: int, state: StateManager) -> None:
        chunk = min(tokens, self.options.max_num_batched_tokens)
        for index, pool in enumerate(state.page_pools):
            pages = state.peak_pages(index, tokens, chunk)
            if pages > pool.capacity:
                raise ParameterError(
                    f"prompt and max_tokens need {pages} pages of {state.page_size} tokens, and num_blocks="
                    f"{pool.capacity} is all there are"
                )

    def _next_seed(self) -> int:
        """A seed of its own for each request that has none, reproducible from the engine's."""
        digest = hashlib.sha256(f"{self.options.seed}/{next(self._seeds)}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)


def check_split(checkpoint: Checkpoint, options: EngineOptions) -> None:
    """Raises `ConfigError` where the model cannot be divided among so many ranks. Nothing is loaded."""
    size, architecture = options.tensor_parallel_size, checkpoint.architecture
    if size > 1 and architecture.__module__ == "__main__":
        raise ConfigError(
            f"tensor_parallel_size={size}: {architecture.__name__} is defined in the main script, where other "
            "processes cannot import it; put it into a module"
        )
    config, whole_experts = checkpoint.read_config(), options.enable_expert_parallel
    if whole_experts and not any(isinstance(layer.feed_forward, MoEConfig) for layer in config.layers):
        raise ConfigError("enable_expert_parallel=True: no layer of the model has experts")
    architecture.allocate(config, LocalKit(device="meta", group=Group(Share(0, size)), expert_parallel=whole_experts))


def load_part(checkpoint: Checkpoint, options: EngineOptions, device: torch.device, group: Group) -> LanguageModel:
    """A rank's part of the model."""
    max_length = options.resolve_length(checkpoint.read_config())
    return load_model(
        checkpoint,
        options.dtype,
        device,
        options.load_format,
        max_length,
        options.seed_number,
        group,
        options.enable_expert_parallel,
    )


def load_images(
    checkpoint: Checkpoint, options: EngineOptions, device: torch.device, tokenizer: Tokenizer | None
) -> ImageModel | None:
    """What reads the images of prompts; None where none are read."""
    loader, limit = checkpoint.architecture.image_model(checkpoint, options.load_format), options.limit_mm_per_prompt
    if loader is None:
        if limit is not None:
            raise ConfigError(f"limit_mm_per_prompt={dict(limit)!r}: the checkpoint of {options.model} reads no images")
        return None
    if options.max_images == 0:
        logger.info("%s: limit_mm_per_prompt allows no images: the part that reads them is left out", checkpoint.path)
        return None
    dtype = resolve_dtype(checkpoint, options.dtype)
    token_id = tokenizer.token_id if tokenizer is not None else lambda text: None
    return loader.load(checkpoint, dtype, device, token_id, options.load_format, options.seed_number)


def _round_norms_twice(model: LanguageModel, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        raise ConfigError("round_norms_twice=True: without effect, since float32 rounds nothing")
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.round_twice = True
