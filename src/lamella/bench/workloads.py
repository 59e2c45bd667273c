"""Workloads of random prompts: correctness check and time measurement."""

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
    """Prompts of random tokens with greedy outputs of fixed length.

    Attributes:
        requests: number of prompts.
        input_len: tokens per prompt.
        output_len: output tokens per prompt.
        seed: of the random tokens.
    """

    requests: int
    input_len: int
    output_len: int
    seed: int = 0

    def prompts(self, engine: Engine) -> list[dict[str, list[int]]]:
        """Return the prompts. They contain no placeholder tokens of images."""
        rng, images = random.Random(self.seed), engine.admission.reserved_token_ids
        tokens = [token for token in range(engine.model.config.vocab_size) if token not in images]
        return [{"prompt_token_ids": [rng.choice(tokens) for _ in range(self.input_len)]} for _ in range(self.requests)]


@dataclass(frozen=True)
class Timing:
    """Times of the best repetition, and derived speeds.

    Attributes:
        total_s: seconds of the whole workload.
        prefill_s: seconds of the same prompts with one output token.
        decode_ms_per_step: milliseconds per decode step; None for a single output token.
        output_tok_s: output tokens per second of the whole workload.
        prompt_tok_s: prompt tokens per second of the prefill.
    """

    total_s: float
    prefill_s: float
    decode_ms_per_step: float | None
    output_tok_s: float
    prompt_tok_s: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for JSON, rounded to 3 decimals."""
        return {key: None if value is None else round(value, 3) for key, value in asdict(self).items()}


def check(llm: LLM, workload: Workload) -> float:
    """Compare the engine's greedy tokens with a plain forward of the model.

    Returns:
        The largest difference in log-probability between the likeliest token of the forward and the engine's token. 0
        if all tokens are equal; about the size of the rounding if rounding has changed the order of a near-tie.
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
    """Measure a workload: the best of `repeats` repetitions, after a short warm-up run."""
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
    llm.reset_prefix_cache()  # repetitions use the same prompts
    start = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start
