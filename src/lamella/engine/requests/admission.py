"""Admission of requests: validation and preprocessing, before a request is queued."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lamella.engine.images.reader import ImageReader, expand_images
from lamella.engine.memory import ShortPrompts, check_pools, longest_output
from lamella.engine.options import EngineOptions
from lamella.engine.requests.completion import Completion, Job
from lamella.engine.requests.jobs import Jobs
from lamella.engine.requests.prompt import Prompt, read_prompt
from lamella.engine.requests.request import Request
from lamella.engine.requests.resolve_params import resolve_params, truncated
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.engine.requests.tokenizer import Tokenizer
from lamella.engine.requests.variant import Variant
from lamella.engine.variants import Variants
from lamella.errors import ParameterError


class Admission:
    """Validates requests and turns them into jobs.

    Attributes:
        jobs: unfinished jobs.
        tokenizer: of the model; None if it has none.
        eos_token_ids: tokens that end an output.
        max_model_len: maximum length of prompt and output together, in tokens.
    """

    def __init__(
        self,
        vocab_size: int,
        options: EngineOptions,
        tokenizer: Tokenizer | None,
        eos_token_ids: tuple[int, ...],
        max_model_len: int,
        jobs: Jobs,
        variants: Variants,
        images: ImageReader | None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        """Make an admission without jobs.

        Args:
            vocab_size: of the model.
            options: of the engine.
            tokenizer: of the model; None if it has none.
            eos_token_ids: tokens that end an output.
            max_model_len: maximum length of prompt and output together, in tokens.
            jobs: index that the engine adds jobs to.
            variants: variants of the model that requests can run.
            images: reads the images of prompts; None if prompts cannot have images.
            defaults: fields of `SamplingParams` for requests without sampling parameters.
        """
        self.tokenizer, self.eos_token_ids, self.max_model_len, self.jobs = (
            tokenizer,
            eos_token_ids,
            max_model_len,
            jobs,
        )
        self._vocab_size, self._options, self._variants, self._images = vocab_size, options, variants, images
        self._defaults = dict(defaults or {})
        self._seeds = itertools.count()
        self._short_prompts = ShortPrompts(options)

    @property
    def reserved_token_ids(self) -> frozenset[int]:
        """Placeholder tokens, which a prompt without images must not contain."""
        return frozenset() if self._images is None else self._images.token_ids

    @property
    def image_placeholder(self) -> str | None:
        """Placeholder text of an image in a prompt; None if the model or the options accept no images."""
        return None if self._images is None else self._images.model.placeholder_text

    def default_params(self) -> SamplingParams:
        """Return the sampling parameters of requests without their own."""
        return SamplingParams(**self._defaults)

    def make_job(self, request_id: str, prompt: Prompt, params: SamplingParams) -> Job:
        """Validate a request and turn it into a job, without queueing it.

        Args:
            request_id: must not be the id of an unfinished job.
            prompt: text, token ids or a mapping, see `read_prompt`.
            params: sampling parameters.

        Returns:
            The job.

        Raises:
            ParameterError: the request cannot run.
        """
        self._check_id(request_id)
        if not isinstance(params, SamplingParams):
            raise ParameterError(f"sampling_params: must be a SamplingParams, not {type(params).__name__}")
        tokenizer, vocab_size = self.tokenizer, self._vocab_size
        # `replace` copies and checks the lists again: the caller may have changed them.
        params = resolve_params(replace(params), tokenizer, vocab_size, self._options.max_logprobs)
        given = truncated(read_prompt(prompt, tokenizer, vocab_size), params, tokenizer, self.max_model_len)
        token_ids, images = expand_images(self._images, given.token_ids, given.images, self._options.max_images)
        if params.stop_strings and tokenizer is None:
            raise ParameterError(f"stop={params.stop!r}: without tokenizer.json there is no text to stop at")
        limit = self.max_model_len - len(token_ids)
        if limit < 1:
            raise ParameterError(
                f"prompt of {len(token_ids)} tokens: max_model_len={self.max_model_len} leaves no room for an answer"
            )
        max_tokens = min(params.max_tokens or limit, limit)
        if params.max_tokens is None:  # without a limit of the caller, the size of the pools is one
            max_tokens = longest_output(self._variants.next_state, self._options, len(token_ids), max_tokens)
        self._resolve(params, len(token_ids) + max_tokens)
        # Prompt log-probabilities are equal for all completions, so only the first one computes them.
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
                    attachments=images,
                ),
                index,
                tokenizer,
            )
            for index in range(params.n)
        ]
        return Job(request_id, given.text, completions, given.salt)

    def admit(self, job: Job) -> Variant:
        """Check a job again before it is queued: the engine may have changed since `make_job`.

        Returns:
            The variant of the model that the job runs.

        Raises:
            ParameterError: an unfinished job has the same id, the engine no longer serves the requested variant, or the
                job no longer fits into the pools.
        """
        self._check_id(job.request_id)
        request = job.completions[0].request
        return self._resolve(request.params, len(request.prompt_token_ids) + request.max_tokens)

    def _check_id(self, request_id: str) -> None:
        if request_id in self.jobs:
            raise ParameterError(f"request_id={request_id!r}: a request of this id is running")

    def _resolve(self, params: SamplingParams, length: int) -> Variant:
        """Return the variant of a request, whose prompt and output have up to `length` tokens."""
        variant = self._variants.resolve(params)
        check_pools(length - 1, self._variants.next_state, self._options)
        return variant

    def _next_seed(self) -> int:
        """Return a seed for a request without one, derived from the engine's seed and the number of such requests."""
        digest = hashlib.sha256(f"{self._options.seed}/{next(self._seeds)}".encode()).digest()
        return int.from_bytes(digest[:8], "little", signed=True)
