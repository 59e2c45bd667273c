"""Engines in processes of their own, which start together and are measured one after the other."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from common.workers import Worker, WorkerEnded, open_answers
from hybrid_parts.engines import Measure, lamella_engine, plugin_engine, vllm_engine
from hybrid_parts.models import Values
from hybrid_parts.op_steps import ops
from hybrid_parts.parity_check import parity
from hybrid_parts.sizes import Sizes
from hybrid_parts.supernet_engines import fixed_engine, mixed_engine

SCRIPT = Path(__file__).parents[1] / "hybrids.py"
START_LIMIT, MEASURE_LIMIT = 240, 120  # seconds
STARTS: dict[str, Callable[[str, Sizes, argparse.Namespace, Path], Measure]] = {
    "parity": parity,
    "lamella": lamella_engine,
    "standalone": lamella_engine,
    "fixed": fixed_engine,
    "mixed": mixed_engine,
    "plugin": plugin_engine,
    "vllm": vllm_engine,
    "ops": ops,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

Job = tuple[str, str]  # run and engine


def work(run: str, engine: str, folder: Path, args: argparse.Namespace) -> None:
    """Run in a worker process: start an engine, answer, wait for a line on stdin, measure, and answer the result."""
    begin = time.perf_counter()
    answer = open_answers()
    try:
        sizes = Sizes.from_args(args)
        measure = STARTS[engine](run, sizes.scout() if run == "scout" else sizes, args, folder)
        started = round(time.perf_counter() - begin, 1)
        answer({"ready": engine})
        if not sys.stdin.readline():  # the parent process has ended
            os._exit(1)
        result = {**measure(), "start_s": started}
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
    answer(result)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # without waiting for engines to shut down


class JobWorker:
    """The worker process of a job, with a folder for its log and its model."""

    def __init__(self, job: Job, folder: Path, args: argparse.Namespace) -> None:
        """Start the process.

        Args:
            job: the run and the engine.
            folder: a folder that does not exist yet.
            args: the command line.
        """
        self.job, self.folder = job, folder
        folder.mkdir(parents=True)
        python = args.vllm_python if job[1] in ("plugin", "vllm") else sys.executable
        command = [python, str(SCRIPT), "--worker", *job, str(folder), *forwarded(args)]
        environment = ENVIRONMENT | cpu_environment(args) | os.environ
        self._worker = Worker("/".join(job), command, environment, folder / "log", own_session=True)
        self._result: Values | None = None

    @property
    def name(self) -> str:
        """Name of the job in messages."""
        return self._worker.name

    def is_ready(self, limit: float) -> bool:
        """Wait until the engine has started; return False if it failed or took more than `limit` seconds."""
        reply = self._read(limit)
        if "ready" in reply:
            return True
        self._result = reply
        return False

    def measure(self) -> Values:
        """Return the result. An engine that has started is measured now."""
        if self._result is None:
            self._worker.send()
            self._result = self._read(MEASURE_LIMIT)
        if "error" in self._result:
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
            say(f"{self.name} failed; its last lines:", *lines[-25:])
        return self._result

    def stop(self) -> None:
        """End the process and its children."""
        with suppress(subprocess.TimeoutExpired):
            self._worker.close(0 if self._result is None or "error" in self._result else 5)
        self._worker.kill()

    def _read(self, limit: float) -> Values:
        try:
            return self._worker.read(limit)
        except TimeoutError:
            return {"error": "took too long"}
        except WorkerEnded as error:
            return {"error": str(error).removeprefix(f"{self.name} ")}


def forwarded(args: argparse.Namespace) -> list[str]:
    """Return the options that worker processes are given."""
    flags = [f"--{name}" for name in ("quick", "tiny", "flashinfer") if getattr(args, name)]
    return [*flags, "--device", args.device, "--gdn-prefill", args.gdn_prefill]


def cpu_environment(args: argparse.Namespace) -> dict[str, str]:
    """Return the environment variables that vLLM needs on a CPU."""
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"} if args.device == "cpu" else {}


def say(*lines: str) -> None:
    """Print a message to stderr, all lines after the first one indented."""
    print(*lines, sep="\n    ", file=sys.stderr, flush=True)


def batches(jobs: Sequence[Job], count: int) -> Iterator[list[Job]]:
    """Yield the jobs in order, at most `count` together; supernets take all free memory, so each comes alone."""
    some: list[Job] = []
    for job in jobs:
        if some and (job[0] == "supernet" or some[-1][0] == "supernet" or len(some) == count):
            yield some
            some = []
        some.append(job)
    yield some


def execute(jobs: Sequence[Job], args: argparse.Namespace, home: Path) -> Iterator[tuple[str, str, Values]]:
    """Start jobs together, and yield run, engine and result of each.

    Args:
        jobs: runs and engines.
        args: the command line.
        home: for the folders of the worker processes.
    """
    with ExitStack() as stack:
        workers = []
        for run, engine in jobs:
            workers.append(JobWorker((run, engine), home / f"{run}-{engine}", args))
            stack.callback(workers[-1].stop)
        begin = time.monotonic()
        for worker in workers:
            if not worker.is_ready(begin + START_LIMIT - time.monotonic()):
                worker.stop()
        say(f"{', '.join(w.name for w in workers)}: started after {time.monotonic() - begin:.0f} s")
        for worker in workers:
            begin = time.monotonic()
            result = worker.measure()
            worker.stop()
            say(f"{worker.name}: {result.get('error', f'measured in {time.monotonic() - begin:.1f} s')}")
            yield *worker.job, result
