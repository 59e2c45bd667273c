"""Offline inference, with the interface of vLLM's `LLM`."""

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
    """Language model for offline inference.

    Options: see docs/options.md. Other arguments of vLLM: see `lamella.serve.vllm_arguments`.

    Thread-safe: calls of several threads share batches. A lock is held for one step at a time, and never while an
    iterator waits for its consumer. A callback inside a step, such as a module's forward hook, can only call `stats`;
    all other methods raise `EngineError` there.

    Raises:
        ConfigError: an option or the model's config is not supported.
        CheckpointError: the checkpoint's files or tensors do not fit.
        TypeError: an argument does not exist.
    """

    def __init__(self, model: str | Path | LanguageModel, **options: Any) -> None:
        """Load a model.

        Args:
            model: folder, GGUF file, `demo`, Hub id, or a constructed model of `lamella.models`.
            options: see docs/options.md.
        """
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
        """Generate completions of prompts. All requests are validated before any of them runs.

        Args:
            prompts: one prompt or several: texts, lists of token ids, or mappings, see `read_prompt`. A prompt with
                images is `{"prompt": "<|image|> ...", "multi_modal_data": {"image": image}}`.
            sampling_params: one for all prompts, or one per prompt; default: `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: only None is supported; merge an adapter into the model instead.
            priority: only None or 0 is supported; requests start in order of arrival.
            tokenization_kwargs: `{"add_special_tokens": False}` encodes texts without special tokens such as BOS.

        Returns:
            One output per prompt, in the order of the prompts.

        Raises:
            ParameterError: a prompt or its sampling parameters are invalid; the message gives its index.
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
        """Generate answers to chats. Arguments as in vLLM.

        Args:
            messages: a chat, or a list of chats. A chat is a list of messages in OpenAI's format: `role` and `content`.
                A content is a text or a list of parts: `{"type": "text", "text": ...}`, `{"type": "image_url",
                "image_url": {"url": "data:..."}}` or `{"type": "image", "image": ...}`.
            sampling_params: one for all chats, or one per chat; default: `get_default_sampling_params()`.
            use_tqdm: show a progress bar.
            lora_request: only None is supported; merge an adapter into the model instead.
            priority: only None or 0 is supported.
            chat_template: text of a template, or the name of one of the model's; default: the model's.
            chat_template_content_format: "string" joins the parts of a content, "openai" passes them to the template as
                they are, "auto" detects what the template expects.
            add_generation_prompt: append the text that starts an assistant message.
            continue_final_message: continue the final message instead; needs `add_generation_prompt=False`.
            tools: JSON schemas of the functions that the model can call.
            chat_template_kwargs: additional template variables, such as `{"enable_thinking": False}`.
            tokenization_kwargs: `{"add_special_tokens": True}` adds the tokenizer's special tokens to the template's.
            mm_processor_kwargs: only None is supported; images are tiled as the checkpoint's files define.

        Returns:
            One output per chat, in the order of the chats.

        Raises:
            ParameterError: the model has no chat template, the template does not accept the messages, or a request
                cannot run.
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
        """Return the prompts of chats, for `generate` and `stream`. Arguments: see `chat`."""
        return chat_prompts(self.engine, messages, **arguments)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Generate one completion, and yield the output so far after each new token.

        The request is validated by this call, and queued by the first `next`, with the placement at that time. Closing
        the iterator early cancels the request.

        Args:
            prompt: see `generate`.
            sampling_params: default: `get_default_sampling_params()`.

        Raises:
            ParameterError: the prompt or the sampling parameters are invalid. Raised by the first `next` if
                `set_placement` has removed the request's own placement since.
        """
        job = self._make_job(prompt, sampling_params or self.get_default_sampling_params())
        return (output for _, output in self._run([job]) if output is not None)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the sampling parameters of requests without their own, see `generation_config` in docs/options.md."""
        return self.engine.admission.default_params()

    def get_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ConfigError: the model has no tokenizer.
        """
        return get_tokenizer(self.engine)

    def stats(self) -> dict[str, Any]:
        """Return counters and current usage, see docs/options.md."""
        if self._shared.is_owner:  # in a callback
            return self.engine.stats()
        with self._shared.exclusive():
            return self.engine.stats()

    def reset_prefix_cache(self) -> None:
        """Drop all cached prefixes. Running requests are not affected."""
        with self._shared.exclusive():
            self.engine.reset_prefix_cache()

    @property
    def placement(self) -> Placement:
        """Mixer of each layer of a supernet for requests without a placement; None for a layer without a choice."""
        return self.engine.variants.current.placement

    def mixer_names(self) -> tuple[str, ...]:
        """Return the mixer names that a placement can use; empty if no layer has a choice."""
        return mixer_names(self.engine.model.config)

    def set_placement(self, placement: PlacementLike | None, running: str = "finish") -> None:
        """Switch a supernet to another placement.

        If no request is running, the switch is made before the next step. With `mixed_placements` it never waits:
        running requests keep their placement.

        Args:
            placement: the new placement, see `lamella.config.read_placement`.
            running: "finish": queued and running requests finish under the old placement, and later requests wait.
                "recompute": all are recomputed under the new placement, and keep their output tokens.

        Raises:
            ConfigError: the placement is invalid, its state does not fit, or a request that would run under it does not
                fit or has another placement of its own. Nothing has changed.
        """
        with self._shared.exclusive():
            self.engine.switch(placement, running)

    def _make_job(self, prompt: Prompt, params: SamplingParams) -> Job:
        with self._shared.exclusive():
            return self.engine.make_job(str(next(self._ids)), prompt, params)

    def _run(self, jobs: Sequence[Job], with_outputs: bool = True) -> Iterator[tuple[Job, RequestOutput | None]]:
        """Step until the jobs have finished, and yield each job with new output, and the output if requested.

        Unfinished jobs are cancelled when the iterator is closed.
        """
        # Steps of other threads advance these jobs, too. So new output is detected by comparing revisions.
        yielded = {job: job.revision for job in jobs}
        try:
            with self._shared.exclusive():
                for job in jobs:
                    self.engine.add(job)
            while yielded:
                with self._shared.exclusive():
                    if all(job.revision == before for job, before in yielded.items()):
                        self.engine.step()
                    changed = [job for job, before in yielded.items() if job.revision != before]
                    # Copied under the lock, since another thread may step the engine next.
                    new = [(job, job.output() if with_outputs else None) for job in changed]
                    for job in changed:
                        yielded[job] = job.revision
                        if job.finished:
                            del yielded[job]
                yield from new
        finally:
            self._shared.abandon(job.request_id for job in jobs)

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
    """Return the tokenizer of an engine.

    Raises:
        ConfigError: there is none.
    """
    if engine.tokenizer is None:
        raise ConfigError(
            "tokenizer: the model has none; give one with LLM(tokenizer=FOLDER)"
            if not engine.options.skip_tokenizer_init
            else "skip_tokenizer_init=True: no tokenizer was loaded; leave it out"
        )
    return engine.tokenizer


def with_tokenization(
    prompt: Prompt,
    lora_request: object,
    priority: int | Sequence[int] | None,
    tokenization_kwargs: Mapping[str, Any] | None,
) -> Prompt:
    """Apply vLLM's arguments of a request to its prompt.

    Args:
        prompt: see `read_prompt`.
        lora_request: must be None or empty.
        priority: must be None or 0.
        tokenization_kwargs: see `read_tokenization`.

    Returns:
        The prompt, with `add_special_tokens` if `tokenization_kwargs` sets it.

    Raises:
        ParameterError: an argument has an unsupported value.
    """
    if lora_request not in (None, []):
        raise ParameterError("lora_request: not supported: merge the adapter into the model, or use vLLM's plugin")
    values = [priority] if priority is None or isinstance(priority, int) else list(priority)
    if any(value not in (None, 0) for value in values):
        raise ParameterError(f"priority={priority!r}: not supported: requests start in order of arrival; leave it out")
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
