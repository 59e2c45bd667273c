"""The offline interface, in the form of vLLM's `LLM`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lamella.config import Placement, PlacementLike, mixer_names
from lamella.engine.engine import Engine
from lamella.engine.loading import load_engine
from lamella.engine.options import EngineOptions, with_options
from lamella.engine.requests.chat import is_chat
from lamella.engine.requests.completion import Job
from lamella.engine.requests.outputs import RequestOutput
from lamella.engine.requests.prompt import Prompt, is_token_ids
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer, read_tokenization
from lamella.errors import ConfigError, ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.serve.chat import chat_prompts
from lamella.serve.sharing import SharedEngine
from lamella.serve.vllm_arguments import engine_options


class LLM:
    """A model ready to generate.

    Options: see docs/options.md, and `lamella.serve.vllm_arguments` for other arguments of vLLM. An unknown argument is
    a `TypeError`.

    Safe to use from several threads: calls that run at the same time share batches. A lock is held for one step at a
    time and never while an iterator waits for its reader. A callback inside a step, such as a module's forward hook,
    can call `stats` only; everything else raises `EngineError` there.

    Raises `ConfigError` or `CheckpointError`, each with one line that names the setting, file or tensor.
    """

    def __init__(self, model: str | Path | LanguageModel, **options: Any) -> None:
        """Load a model; the options are those of `EngineOptions`, see docs/options.md."""
        self.engine = load_engine(EngineOptions(model=model, **engine_options(options)))
        self._shared = SharedEngine(self.engine)
        self._ids = itertools.count()

    __init__.__signature__ = with_options(("model",), "vllm_arguments")  # type: ignore[attr-defined]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs come in the prompts' order.

        Args:
            prompts: one prompt or several, see `read_prompt`: texts, token ids, or mappings.
            sampling_params: one for all, or one for each prompt; by default `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: only None; merge an adapter into the model.
            priority: only None or 0; requests start in the order in which they come.
            tokenization_kwargs: `{"add_special_tokens": False}` takes texts as they are, without a BOS.

        With images a prompt is `{"prompt": "<|image|> ...", "multi_modal_data": {"image": image}}`. Every request is
        checked before any is run; a bad one is a `ParameterError` that says which.
        """
        single = isinstance(prompts, str | Mapping) or is_token_ids(prompts)
        given: list[Any] = [prompts] if single else _listed("prompts", prompts)
        if any(is_chat(prompt) or (isinstance(prompt, Mapping) and "role" in prompt) for prompt in given):
            raise ParameterError("prompts: these are messages of a chat: call chat(messages) instead of generate")
        prompts = [with_tokenization(prompt, lora_request, priority, tokenization_kwargs) for prompt in given]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        else:
            params = _listed("sampling_params", sampling_params)
        if len(params) != len(prompts):
            raise ParameterError(f"sampling_params: {len(params)} for {len(prompts)} prompts")
        jobs = []
        for index, (prompt, some) in enumerate(zip(prompts, params, strict=True)):
            try:
                jobs.append(self._make_job(prompt, some))
            except ParameterError as error:
                raise ParameterError(f"prompts[{index}]: {error}") from error
        with tqdm(total=len(jobs), desc="generating", unit="req", disable=not use_tqdm, dynamic_ncols=True) as bar:
            start = time.perf_counter()
            for job, _ in self._run(jobs, with_outputs=False):
                if job.finished:
                    bar.update()
                if use_tqdm:
                    bar.set_postfix_str(self._progress(jobs, time.perf_counter() - start), refresh=False)
        return [job.output() for job in jobs]

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        priority: int | Sequence[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer chats; arguments as in vLLM.

        Args:
            messages: a chat, or a list of chats. A chat is a list of OpenAI's messages: `role` and `content`, a text
                or a list of parts (`{"type": "text", "text": ...}`, `{"type": "image_url", "image_url": {"url":
                "data:..."}}`, `{"type": "image", "image": ...}`).
            sampling_params: one for all, or one for each chat; by default `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: only None; merge an adapter into the model.
            priority: only None or 0.
            chat_template: a template's text, or the name of one of the model's; by default the model's.
            chat_template_content_format: "string" joins the parts of a content, "openai" gives them to the template as
                they are; "auto" finds out which the template takes.
            add_generation_prompt: end the prompt with what stands before an answer.
            continue_final_message: continue the final message instead; needs `add_generation_prompt=False`.
            tools: JSON schemas of the functions that the model may call.
            chat_template_kwargs: more names for the template, such as `{"enable_thinking": False}`.
            tokenization_kwargs: `{"add_special_tokens": True}` adds the tokenizer's special tokens to the template's.
            mm_processor_kwargs: only None; images are tiled as the checkpoint's files say.

        Raises:
            ParameterError: the model has no chat template, the template does not take the messages, or a request cannot
                run.
        """
        if mm_processor_kwargs:
            raise ParameterError("mm_processor_kwargs: not supported: images are tiled as the checkpoint's files say")
        prompts = self.preprocess_chat(
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            tokenization_kwargs=_special_only(tokenization_kwargs),
        )
        return self.generate(prompts, sampling_params, use_tqdm, lora_request, priority)

    def preprocess_chat(self, messages: Sequence[Any], **arguments: Any) -> list[dict[str, Any]]:
        """Return the prompts of chats as `generate` and `stream` take them; arguments as of `chat`."""
        return chat_prompts(self.engine, messages, **arguments)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, giving the whole output so far after each new token.

        Closing the iterator early cancels the request. A bad prompt or parameter is an error of this call, not of the
        first `next`. The request is queued by the first `next`, and computed with the placement in force then, or with
        its own; if `set_placement` has since taken that away, the first `next` raises `ParameterError`.
        """
        job = self._make_job(prompt, sampling_params or self.get_default_sampling_params())
        return (output for _, output in self._run([job]) if output is not None)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of requests that give none: generation_config.json's, see docs/options.md."""
        return self.engine.admission.default_params()

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer; raises `ConfigError` where there is none."""
        return get_tokenizer(self.engine)

    def stats(self) -> dict[str, Any]:
        """See `Engine.stats`."""
        if self._shared.is_mine:  # in a callback
            return self.engine.stats()
        with self._shared.exclusive():
            return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """See `Engine.reset_prefix_cache`."""
        with self._shared.exclusive():
            self.engine.reset_prefix_cache()

    @property
    def placement(self) -> Placement:
        """The mixer of each layer of a supernet for requests that ask for no other; None where there is no choice."""
        return self.engine.variants.current.placement

    def mixer_names(self) -> tuple[str, ...]:
        """The mixers that a placement may name; empty where no layer has a choice."""
        return mixer_names(self.engine.model.config)

    def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """Compute with another placement of a supernet, see `lamella.config.read_placement`.

        If nothing runs, it is in force from the next step on. Otherwise requests that are queued or running finish
        under the old placement, and later ones wait; with `running="recompute"` all are computed again under the new
        one and keep their output. With `mixed_placements` nothing waits: running requests keep their placement.

        Raises:
            ConfigError: a name is wrong, the state does not fit, or a request that would be computed under the new
                placement does not fit or asked for another. Nothing has changed.
        """
        with self._shared.exclusive():
            self.engine.switch(placement, running)

    def _make_job(self, prompt: Prompt, params: SamplingParams) -> Job:
        with self._shared.exclusive():
            return self.engine.make_job(str(next(self._ids)), prompt, params)

    def _run(self, jobs: Sequence[Job], with_outputs: bool = True) -> Iterator[tuple[Job, RequestOutput | None]]:
        """Step until the jobs are through, giving each that got something new, and its output if wanted; on the way
        out none is left behind.
        """
        # Whoever steps the engine moves the jobs of other callers too, so what counts is what has been given on.
        given = {job: job.revision for job in jobs}
        try:
            with self._shared.exclusive():
                for job in jobs:
                    self.engine.add(job)
            while given:
                with self._shared.exclusive():
                    if all(job.revision == before for job, before in given.items()):
                        self.engine.step()
                    changed = [job for job, before in given.items() if job.revision != before]
                    # Made under the lock: another thread's step may be next.
                    new = [(job, job.output() if with_outputs else None) for job in changed]
                    for job in changed:
                        given[job] = job.revision
                        if job.finished:
                            del given[job]
                yield from new
        finally:
            self._shared.leave(job.request_id for job in jobs)

    def _progress(self, jobs: Sequence[Job], seconds: float) -> str:
        stats = self.stats()
        tokens = sum(len(c.request.output_token_ids) for job in jobs for c in job.completions)
        waiting = f", {stats['waiting']} waiting" if stats["waiting"] else ""
        blocks = f"blocks {stats['blocks_used']}/{stats['blocks']}"
        hits = ""
        if stats["prefix_hit_rate"] is not None:
            hits = f", prefix hits {stats['prefix_hit_rate']:.0%} ({stats['prefix_hit_tokens']} tok)"
            hits += f", snapshots {stats['prefix_snapshot_bytes'] >> 20} MiB" if stats["prefix_snapshots"] else ""
            hits += f", {stats['prefix_evictions']} evicted" if stats["prefix_evictions"] else ""
        return f"{tokens / seconds:.1f} tok/s, {stats['running']} running{waiting}, {blocks}{hits}"


def get_tokenizer(engine: Engine) -> Tokenizer:
    """Return an engine's tokenizer.

    Raises:
        ConfigError: there is none.
    """
    if engine.tokenizer is None:
        raise ConfigError(
            "tokenizer: the model has none: LLM(tokenizer=FOLDER) takes another's"
            if not engine.options.skip_tokenizer_init
            else "skip_tokenizer_init=True: no tokenizer was loaded"
        )
    return engine.tokenizer


def with_tokenization(
    prompt: Prompt,
    lora_request: object,
    priority: int | Sequence[int] | None,
    tokenization_kwargs: Mapping[str, Any] | None,
) -> Prompt:
    """Return a prompt that says what vLLM's arguments of a request say of it.

    Raises:
        ParameterError: an argument asks for what this engine has not.
    """
    if lora_request not in (None, []):
        raise ParameterError("lora_request: not supported: merge the adapter into the model, or use vLLM's plugin")
    values = [priority] if priority is None or isinstance(priority, int) else list(priority)
    if any(value not in (None, 0) for value in values):
        raise ParameterError(f"priority={priority!r}: not supported: requests start in the order in which they come")
    special = read_tokenization(tokenization_kwargs)
    if special is None or is_token_ids(prompt):
        return prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, "add_special_tokens": special}
    return {"add_special_tokens": special, **prompt} if isinstance(prompt, Mapping) else prompt


def _special_only(tokenization_kwargs: Mapping[str, Any] | None) -> dict[str, bool]:
    special = read_tokenization(tokenization_kwargs)
    return {} if special is None else {"add_special_tokens": special}


def _listed(name: str, given: Any) -> list[Any]:
    if not isinstance(given, Iterable):
        raise ParameterError(f"{name}: must be one or a list of them, not {type(given).__name__}")
    return list(given)
