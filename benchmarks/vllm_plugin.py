"""What a canon model costs inside vLLM, beside vLLM's own Llama of the same shape: one machine, one run.

    python benchmarks/vllm_plugin.py [--shapes llama-1b] [--runs RUN ...] [--rounds 3]

Each run is an engine in a process of its own with random bf16 weights. All engines of a shape stand at the same time,
so that they must have room on the GPU together (of llama-8b two), and take turns with the workloads of
`gpu_vs_vllm.py`, round after round: with small models vLLM waits for the host, whose speed varies by more than what is
to be seen. `vllm` is vLLM's class; `control`
the same model through the plugin; `canon` has convolutions A, B, C and D; `-eager` is without compilation and graphs,
and has one turn only; `-v1` and `-v2` name the model runner, of which vLLM up to 0.28 gives models with slot state
the first, and dense ones the second. First the bundled demo must answer as it was trained to, compiled and with
graphs, by either runner. The table has the medians over rounds, and the median of each round's time relative to that
of `vllm`. The floor of a decode step is the time in which its weights can be read at the bandwidth that a probe
measures. One JSON line ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import write_config
from common.dense_models import MAX_MODEL_LEN, SHAPES, config, workloads
from common.timing import timed
from common.workers import Worker, WorkerEnded, open_answers

RUNS = ("vllm", "vllm-v1", "control", "canon", "canon-v2", "canon-eager")
KEYS = {"decode_b1_ms": -1, "offline_tok_s": 1, "prefill_tok_s": 1}  # whether more is better
CACHED_TOKENS = 240_000  # in an engine's cache: more than 256 requests have at any time


def engine(path: str, cache_bytes: int, **options: Any) -> Any:
    """Start vLLM without a check of free GPU memory, which other engines are using at the same time."""
    import vllm

    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.1}
    settings |= {"kv_cache_memory_bytes": cache_bytes, "enable_prefix_caching": False}
    return vllm.LLM(path, **(settings | options))


def check_demo() -> dict[str, Any]:
    """Count the right answers of the trained demo to 300 questions; nearly all must be right."""
    import vllm

    from lamella.demo import CHECKPOINT
    from lamella.demo.questions import MAX_TOKENS, held_out, is_right

    llm = engine(str(CHECKPOINT), 1 << 30, load_format="auto", skip_tokenizer_init=False, max_model_len=256)
    questions = held_out(300)
    params = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([q.prompt for q in questions], params, use_tqdm=False)
    right = sum(is_right(q, o.outputs[0].text) for q, o in zip(questions, outputs, strict=True))
    assert right >= 0.99 * len(questions), f"the demo answers {right} of {len(questions)} questions rightly"
    return {"right": right, "questions": len(questions), "vllm": vllm.__version__}


def serve(run: str, shape: str) -> None:
    """Run in a worker process: start an engine, then run the workloads for each line on stdin, and answer."""
    answer = open_answers(os.devnull)
    import torch
    import vllm

    values = config(f"{shape}+canon" if run.startswith("canon") else shape)
    if run == "control":
        values["architectures"] = [f"Lamella{values['architectures'][0]}"]
    token = 4 * values["num_hidden_layers"] * values["num_key_value_heads"] * values["head_dim"]  # bytes of K and V
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), values)
        eager = run == "canon-eager"
        llm = engine(folder, CACHED_TOKENS * token, max_model_len=MAX_MODEL_LEN, enforce_eager=eager)

    from lamella.bench.card import measure_bandwidth

    answer({"bandwidth_gb_s": round(measure_bandwidth(torch.device("cuda")) / 1e9)})
    for _ in sys.stdin:
        answer(workloads(timed(llm, vllm.SamplingParams)))


def floor_ms(shape: str, bandwidth: float) -> float:
    """Return the time to read the weights once at a bandwidth in GB/s."""
    import torch

    from lamella.config.hf_config import HFConfig
    from lamella.layers.decoder import LanguageModel
    from lamella.layers.local_kit import LocalKit
    from lamella.models.registry import resolve_architecture

    values = config(shape)
    model_config = resolve_architecture(values["architectures"][0]).read_config(HFConfig(values))
    model = LanguageModel(model_config, LocalKit(torch.bfloat16, "meta"))
    embedding = 0 if model_config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    return (sum(p.nbytes for p in model.parameters()) - embedding) / bandwidth / 1e6


def start(run: str, *arguments: str) -> Worker:
    """Start a worker process of a run."""
    environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if (runner := run.rpartition("-v")[2]) in ("1", "2"):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner) - 1)
    command = [sys.executable, __file__, "--worker", run, *arguments]
    return Worker(" ".join((run, *arguments)), command, environment)


def answer_of(worker: Worker) -> dict[str, Any]:
    """Return the next answer, and print it to stderr, since the table comes minutes later."""
    try:
        answer = worker.read()
    except WorkerEnded as error:
        sys.exit(str(error))
    print(worker.name, json.dumps(answer), file=sys.stderr, flush=True)
    return answer


def measure(shape: str, runs: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Start all engines of a shape, run the workloads in rounds, and return the medians of each run."""
    workers = {run: start(run, shape) for run in runs}
    results = {run: answer_of(worker) | {"rounds": []} for run, worker in workers.items()}
    for turn in range(rounds):
        for run, worker in workers.items():
            if turn == 0 or run != "canon-eager":
                worker.send()
                results[run]["rounds"].append(answer_of(worker))
    for worker in workers.values():
        worker.close()
    for result in results.values():
        for key, sign in KEYS.items():
            result[key] = round(statistics.median(turn[key] for turn in result["rounds"]), 3)
            if "vllm" in results:
                pairs = zip(result["rounds"], results["vllm"]["rounds"], strict=False)
                result[f"{key}_time"] = statistics.median((own[key] / theirs[key]) ** -sign for own, theirs in pairs)
    return results


def main() -> None:
    """Run the benchmark, or be one of its worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-1b"])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run, *shapes = args.worker
        if shapes:
            serve(run, *shapes)
        else:
            answer = open_answers(os.devnull)
            answer(check_demo())
        return
    demos = {run: start(run) for run in ("demo-v1", "demo-v2")}
    checked = {run: answer_of(demo) for run, demo in demos.items()}
    for run, demo in checked.items():
        demos[run].close()
        print(f"vLLM {demo['vllm']}, {run}: {demo['right']} of {demo['questions']} questions answered rightly")
    results = {shape: measure(shape, args.runs, args.rounds) for shape in args.shapes}
    for shape, runs in results.items():
        floor = floor_ms(shape, max(run["bandwidth_gb_s"] for run in runs.values()))
        print(f"\n{shape}: floor {floor:.3f} ms a decode step; medians of {args.rounds} rounds")
        print(f"{'':12}{'decode b1, ms':>22}{'256 requests, tok/s':>24}{'prefill, tok/s':>22}")
        for name, run in runs.items():
            cells = (f"{run[key]:>13} ({100 * (run.get(f'{key}_time', float('nan')) - 1):+5.1f} %)" for key in KEYS)
            print(f"{name:12}" + "".join(cells))
        sys.stdout.flush()
    print(json.dumps({"benchmark": "vllm_plugin", "demo": checked, "results": results}))


if __name__ == "__main__":
    main()
