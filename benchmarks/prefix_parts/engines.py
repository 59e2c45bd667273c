"""Engines in worker processes, with the prefix cache off, on, or both."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.environment import prepare_vllm
from common.workers import Worker, open_answers
from prefix_parts.load import Run, Tokens

SCRIPT = Path(__file__).parents[1] / "prefix.py"
NUM_BLOCKS = 4096  # 2 GiB of blocks of this shape, as much as vLLM's CPU build is given


def start_lamella(path: str, device: str, modes: Sequence[bool], dtype: str = "auto") -> tuple[Run, Callable[[], None]]:
    """Start lamella, and return the functions that run requests and that empty the prefix cache.

    Args:
        path: the checkpoint.
        device: of the engine.
        modes: for each engine to start, whether it has a prefix cache.
        dtype: to compute in.
    """
    from lamella import LLM, SamplingParams

    def load(cached: bool) -> LLM:
        return LLM(path, device=device, dtype=dtype, enable_prefix_caching=cached, num_blocks=NUM_BLOCKS)

    llms = {cached: load(cached) for cached in modes}
    ids = itertools.count()

    def stream(llm: LLM, prompt: Tokens, params: SamplingParams) -> tuple[list[float], list[Tokens]]:
        outputs = llm.stream({"prompt_token_ids": prompt}, params)
        output = next(outputs)
        first = time.perf_counter()
        for output in outputs:  # noqa: B007 - the last one is wanted
            pass
        return [first], [output.outputs[0].token_ids]

    def batch(llm: LLM, prompts: Sequence[Tokens], params: SamplingParams) -> tuple[list[float], list[Tokens]]:
        engine = llm.engine
        jobs = [engine.make_job(f"batch{next(ids)}", {"prompt_token_ids": ids_}, params) for ids_ in prompts]
        for job in jobs:
            engine.add(job)
        times: dict[str, float] = {}
        while engine.has_work:
            for job in engine.step():
                times.setdefault(job.request_id, time.perf_counter())
        return [times[job.request_id] for job in jobs], [job.output().outputs[0].token_ids for job in jobs]

    def run(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        llm = llms[cached]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        before = llm.stats()["prefix_hit_tokens"]
        start = time.perf_counter()
        first, tokens = stream(llm, prompts[0], params) if len(prompts) == 1 else batch(llm, prompts, params)
        total = time.perf_counter() - start
        hit = llm.stats()["prefix_hit_tokens"] - before
        return {"first": [t - start for t in first], "total": total, "tokens": tokens, "hit": hit}

    def reset() -> None:
        for llm in llms.values():
            llm.reset_prefix_cache()

    return run, reset


def start_vllm(path: str, device: str, modes: Sequence[bool]) -> tuple[Run, Callable[[], None]]:
    """Start vLLM. See `start_lamella`; `modes` has one element."""
    prepare_vllm()
    from vllm import LLM, SamplingParams

    (cached,) = modes  # one to a process
    room: dict[str, Any] = {} if device == "cpu" else {"gpu_memory_utilization": 0.3}
    llm = LLM(path, skip_tokenizer_init=True, enable_prefix_caching=cached, enforce_eager=False, **room)
    engine, ids = llm.llm_engine, itertools.count()

    def run(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        names = [str(next(ids)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        first: dict[str, float] = {}
        ended: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - start)
                if output.finished:
                    ended[output.request_id] = output
        total = time.perf_counter() - start
        tokens = [list(ended[name].outputs[0].token_ids) for name in names]
        hit = sum(output.num_cached_tokens or 0 for output in ended.values())
        return {"first": [first[name] for name in names], "total": total, "tokens": tokens, "hit": hit}

    def reset() -> None:
        llm.reset_prefix_cache()

    return run, reset


def worker(engine: str, path: str, device: str, modes: str) -> None:
    """Run in a worker process: start an engine, then run what each line of stdin asks for, and answer."""
    answer = open_answers()
    cached = [mode == "on" for mode in modes.split(",")]
    run, reset = {"lamella": start_lamella, "vllm": start_vllm}[engine](path, device, cached)
    for mode in cached:
        for length in (17, 600):
            run(mode, [[length] * length], 3)
        run(mode, [[n] * 40 for n in range(4)], 3)
    answer({"ready": engine})
    for line in sys.stdin:
        request = json.loads(line)
        answer(run(*request) if request else reset())


class PrefixWorker:
    """A worker process with an engine."""

    def __init__(self, python: str, engine: str, path: str, device: str, modes: str) -> None:
        """Start the process, and wait until the engine is ready.

        Args:
            python: the interpreter.
            engine: "lamella" or "vllm".
            path: the checkpoint.
            device: of the engine.
            modes: "off", "on" (with the prefix cache), or "off,on".
        """
        self.engine, self.modes = engine, modes.split(",")
        command = [python, str(SCRIPT), "--worker", engine, path, device, modes]
        self._worker = Worker(f"{engine} {modes}", command)
        self._worker.read()

    def run(self, cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        """Run requests. See `Run`."""
        return self._worker.ask([cached, prompts, count])

    def reset(self) -> None:
        """Empty the prefix caches."""
        self._worker.ask([])

    def close(self) -> None:
        """End the process."""
        self._worker.close()
