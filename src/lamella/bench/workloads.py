"""Workloads on random prompts, each checked for correctness before it is timed."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lamella.engine.engine import Engine
from lamella.engine.requests.sampling_params import SamplingParams
from lamella.serve.llm import LLM

_CHECKED_TOKENS = 8


@dataclass(frozen=True)
class Workload:
    """`requests` prompts of `input_len` random tokens, each continued by `output_len` greedy ones."""

    requests: int
    input_len: int
    output_len: int
    seed: int = 0

    def prompts(self, engine: Engine) -> list[dict[str, list[int]]]:
        """Any tokens but those of images."""
        rng, images = random.Random(self.seed), engine.admission.reserved_token_ids
        tokens = [token for token in range(engine.model.config.vocab_size) if token not in images]
        return [{"prompt_token_ids": [rng.choice(tokens) for _ in range(self.input_len)]} for _ in range(self.requests)]


@dataclass(frozen=True)
class Timing:
    """Seconds of the best repetition, and what follows from them."""

    total_s: float
    prefill_s: float  # the same prompts with one output token
    decode_ms_per_step: float | None  # None for a single output token
    output_tok_s: float
    prompt_tok_s: float

    def as_dict(self) -> dict[str, Any]:
        return {key: None if value is None else round(value, 3) for key, value in asdict(self).items()}


def check(llm: LLM, workload: Workload) -> float:
    """The largest gap, in logprob, between a token that the engine chose and a plain forward's choice there.

    0 where they choose alike everywhere; a near-tie that rounding turned is a gap of about that rounding.
    """
    prompts = workload.prompts(llm.engine)[:2]
    params = SamplingParams(temperature=0, max_tokens=_CHECKED_TOKENS, ignore_eos=True, detokenize=False)
    worst = 0.0
    for output in llm.generate(prompts, params, use_tqdm=False):
        chosen = output.outputs[0].token_ids
        ids = torch.tensor(output.prompt_token_ids + chosen, device=llm.engine.device)
        with torch.no_grad():
            hidden = llm.engine.model(ids)[len(output.prompt_token_ids) - 1 : -1]
            logprobs = llm.engine.model.compute_logits(hidden).float().log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(chosen, device=logprobs.device)[:, None])[:, 0]
        worst = max(worst, float((logprobs.amax(-1) - picked).max()))
    return worst


def measure(llm: LLM, workload: Workload, repeats: int = 3) -> Timing:
    """Time the workload; the best of `repeats`, after a short run that is not timed."""
    prompts = workload.prompts(llm.engine)
    _time(llm, prompts, SamplingParams(temperature=0, max_tokens=min(2, workload.output_len), ignore_eos=True))

    def seconds(output_len: int) -> float:
        params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        return min(_time(llm, prompts, params) for _ in range(repeats))

    prefill = seconds(1)
    total = seconds(workload.output_len) if workload.output_len > 1 else prefill
    steps = workload.output_len - 1
    return Timing(
        total_s=total,
        prefill_s=prefill,
        decode_ms_per_step=(total - prefill) / steps * 1e3 if steps else None,
        output_tok_s=workload.requests * workload.output_len / total,
        prompt_tok_s=workload.requests * workload.input_len / prefill,
    )


def _time(llm: LLM, prompts: Sequence[dict[str, list[int]]], params: SamplingParams) -> float:
    llm.reset_prefix_cache()  # the repetitions have the same prompts
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start
