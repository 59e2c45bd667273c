"""Time requests and device functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

# Time to complete prompts, given the number of new tokens of each, in seconds.
Run = Callable[[Sequence[Sequence[int]], Sequence[int]], float]

SETTLE_SECONDS = 0.5  # until the threads of the engine that was timed before have gone to sleep
ROUNDS = 5  # of a device function


def timed(llm: Any, params_class: type) -> Run:
    """Return a function that times `generate` of an `LLM`, lamella's or vLLM's.

    Args:
        llm: the engine.
        params_class: its `SamplingParams`.
    """

    def run(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
        common = {"temperature": 0.6, "ignore_eos": True, "detokenize": False}
        params = [params_class(max_tokens=length, **common) for length in lengths]
        return generate_seconds(llm, prompts, params)

    return run


def generate_seconds(llm: Any, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> float:
    """Return the time that `llm.generate` takes for prompts of token ids, in seconds."""
    start = time.perf_counter()
    llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
    return time.perf_counter() - start


def seconds(call: Callable[[], object], graph: bool) -> float:
    """Return the time of a function, best of `ROUNDS`.

    Args:
        call: the function.
        graph: if there is a GPU, capture the function in a CUDA graph and time the replay.
    """
    import torch

    call()
    if not torch.cuda.is_available():
        best = float("inf")
        for _ in range(ROUNDS):
            begin = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - begin)
        return best
    call()
    run: Callable[[], object] = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        run = captured.replay
    best = float("inf")
    for _ in range(ROUNDS):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        started.record()
        run()
        ended.record()
        ended.synchronize()
        best = min(best, started.elapsed_time(ended) / 1e3)
    return best
