"""lamella against vLLM on one GPU: one machine, one run, the same shapes with random bf16 weights.

    python benchmarks/gpu_vs_vllm.py [--shapes llama-1b qwen3-0.6b llama-8b] [--canon] [--vllm-python PYTHON]
        [--engines lamella vllm]

Three workloads, of which each engine does all in a process of its own: decode of 256 tokens after a prompt of 128, one
request at a time (the median of seven); 256 requests of 100 to 1024 tokens in and out; prompts of 32 x 2048 tokens.
With `--canon` lamella also runs the same shapes with canon A, B, C and D. lamella's tokens are checked first: they must
be as likely as a plain forward's own choice. The floor of a decode step is the time in which its weights and its state
can be read at the bandwidth that a probe measures. The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common.checkpoints import write_config
from common.dense_models import DECODE_TOKENS, MAX_MODEL_LEN, PROMPT_TOKENS, SHAPES, config, workloads
from common.timing import timed
from common.workers import Worker, WorkerEnded, open_answers


def run_vllm(path: str) -> dict[str, Any]:
    """Start vLLM and return its figures."""
    import vllm

    llm = vllm.LLM(
        model=path,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
    )

    return {"version": vllm.__version__, **workloads(timed(llm, vllm.SamplingParams))}


def run_lamella(path: str) -> dict[str, Any]:
    """Start lamella, check its tokens, and return its figures with the floor of a decode step."""
    import lamella
    from lamella import LLM, SamplingParams
    from lamella.bench.card import CostCard, measure_bandwidth
    from lamella.bench.workloads import Workload, check

    start = time.perf_counter()
    llm = LLM(
        path,
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
    )
    load = time.perf_counter() - start
    gap = check(llm, Workload(2, 300, 16))
    # Rounding is worth some hundredths, and more in many layers of random weights; a wrong token is worth about 3.
    assert gap < 0.3, f"tokens are {gap} nats less likely than a plain forward's"

    measured = workloads(timed(llm, SamplingParams))
    bandwidth = measure_bandwidth(llm.engine.device)
    floor = CostCard.from_model(llm.engine.model, bandwidth).floor_seconds(1, PROMPT_TOKENS + DECODE_TOKENS // 2) * 1e3
    return {
        "version": lamella.__version__,
        **measured,
        "load_s": round(load, 1),
        "bandwidth_gb_s": round(bandwidth / 1e9),
        "floor_ms": round(floor, 4),
        "check_logprob_gap": gap,
    }


def in_process(engine: str, name: str, python: str) -> dict[str, Any]:
    """Return the figures of an engine for a shape. The engine runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), config(name))
        environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        command = [python, __file__, "--worker", engine, folder]
        worker = Worker(f"{engine} on {name}", command, environment)
        try:
            result = worker.read()
        except WorkerEnded as error:
            sys.exit(str(error))
        if status := worker.close():
            sys.exit(f"{worker.name} ended with status {status}")
    return result


def main() -> None:
    """Run the benchmark, or be one of its worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--canon", action="store_true", help="also the same shapes with canon layers")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--engines", nargs="+", choices=("lamella", "vllm"), default=["lamella", "vllm"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, path = args.worker
        answer = open_answers(os.devnull)
        answer({"lamella": run_lamella, "vllm": run_vllm}[engine](path))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.shapes:
        runs = {}
        if "lamella" in args.engines:
            runs["lamella"] = in_process("lamella", name, sys.executable)
            if args.canon:
                runs["lamella, canon ABCD"] = in_process("lamella", f"{name}+canon", sys.executable)
        if "vllm" in args.engines:
            runs["vllm"] = in_process("vllm", name, args.vllm_python)
        results[name] = runs
        print_shape(name, runs)
    print(json.dumps({"benchmark": "gpu_vs_vllm", "results": results}))


def print_shape(name: str, runs: dict[str, dict[str, Any]]) -> None:
    """Print the figures of a shape's engines."""
    first = runs.get("lamella")
    floor = f"floor {first['floor_ms']:.3f} ms a decode step at {first['bandwidth_gb_s']} GB/s" if first else ""
    print(f"\n{name}: {floor}")
    print(f"{'':22}{'decode b1, ms':>16}{'256 requests, tok/s':>22}{'prefill, tok/s':>18}")
    for engine, run in runs.items():
        print(f"{engine:22}{run['decode_b1_ms']:16.3f}{run['offline_tok_s']:22}{run['prefill_tok_s']:18}")
        if first and engine != "lamella":
            ratios = (
                run["decode_b1_ms"] / first["decode_b1_ms"],
                first["offline_tok_s"] / run["offline_tok_s"],
                first["prefill_tok_s"] / run["prefill_tok_s"],
            )
            print(
                f"{'  lamella is faster by':22}"
                + "".join(f"{r:{w}.2f}x" for r, w in zip(ratios, (15, 21, 17), strict=True))
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
