"""What a canon model costs inside vLLM, beside vLLM's own Llama of the same shape: one machine, one run.

    python benchmarks/vllm_plugin.py [--shapes llama-1b] [--runs RUN ...] [--gpus N]

Each run is a process of its own with random bf16 weights and the workloads of `gpu_vs_vllm.py`, one after the other,
or N at a time on a GPU each. `vllm` is vLLM's class; `control` the same model through the plugin; `canon` has
convolutions A, B, C and D; `-eager` is without compilation and graphs; `-v1` and `-v2` name the model runner, of
which vLLM up to 0.28 gives models with slot state the first, and dense ones the second. First the bundled demo must
answer as it was trained to, compiled and with graphs, by either runner. The table gives each run's time relative to
`vllm`. The floor of a decode step is the time in which its weights can be read at the bandwidth that a probe
measures. One JSON line ends it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any

from gpu_vs_vllm import MAX_MODEL_LEN, SHAPES, config, timed, workloads

RUNS = ("vllm", "vllm-v1", "control", "canon", "canon-v2", "canon-eager")
KEYS = {"decode_b1_ms": -1, "offline_tok_s": 1, "prefill_tok_s": 1}  # whether more is better


def engine(path: str, **options: Any) -> Any:
    import vllm

    settings = {"load_format": "dummy", "skip_tokenizer_init": True, "gpu_memory_utilization": 0.85}
    return vllm.LLM(path, enable_prefix_caching=False, **(settings | options))


def check_demo() -> dict[str, Any]:
    """Right answers of the trained demo, of 300; they must be nearly all."""
    import vllm

    from lamella.demo import CHECKPOINT
    from lamella.demo.questions import MAX_TOKENS, held_out, is_right

    llm = engine(str(CHECKPOINT), load_format="auto", skip_tokenizer_init=False, max_model_len=256)
    questions = held_out(300)
    params = vllm.SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    outputs = llm.generate([q.prompt for q in questions], params, use_tqdm=False)
    right = sum(is_right(q, o.outputs[0].text) for q, o in zip(questions, outputs, strict=True))
    assert right >= 0.99 * len(questions), f"the demo answers {right} of {len(questions)} questions rightly"
    return {"right": right, "questions": len(questions), "vllm": vllm.__version__}


def measure(run: str, shape: str) -> dict[str, Any]:
    import torch
    import vllm

    values = config(f"{shape}+canon" if run.startswith("canon") else shape)
    if run == "control":
        values["architectures"] = [f"Lamella{values['architectures'][0]}"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        llm = engine(folder, max_model_len=MAX_MODEL_LEN, enforce_eager=run == "canon-eager")

    from lamella.bench.card import measure_bandwidth

    return {
        **workloads(timed(llm, vllm.SamplingParams)),
        "bandwidth_gb_s": round(measure_bandwidth(torch.device("cuda")) / 1e9),
    }


def floor_ms(shape: str, bandwidth: float) -> float:
    """The time to read the weights once, with bandwidth in GB/s."""
    import torch

    from lamella.layers.decoder import LanguageModel
    from lamella.layers.kit import LocalKit
    from lamella.models.hf_config import HFConfig
    from lamella.models.registry import resolve_architecture

    values = config(shape)
    model_config = resolve_architecture(values["architectures"][0]).read_config(HFConfig(values))
    model = LanguageModel(model_config, LocalKit(torch.bfloat16, "meta"))
    embedding = 0 if model_config.tie_word_embeddings else model.model.embed_tokens.weight.nbytes
    return (sum(p.nbytes for p in model.parameters()) - embedding) / bandwidth / 1e6


def in_process(run: str, *arguments: str, gpus: Queue[int] | None = None) -> dict[str, Any]:
    environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    if (runner := run.rpartition("-v")[2]) in ("1", "2"):
        environment["VLLM_USE_V2_MODEL_RUNNER"] = str(int(runner) - 1)
    command = [sys.executable, __file__, "--worker", run, *arguments]
    gpu = None if gpus is None else gpus.get()
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if gpus is not None and gpu is not None:
        gpus.put(gpu)
    if output.returncode:
        sys.exit(f"{' '.join((run, *arguments))} ended with status {output.returncode}")
    line = output.stdout.strip().splitlines()[-1]
    print(" ".join((run, *arguments)), line, file=sys.stderr, flush=True)  # the table comes minutes later
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["llama-1b"])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--gpus", type=int, default=1, help="run so many at a time")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        run, *shapes = args.worker
        print(json.dumps(measure(run, *shapes) if shapes else check_demo()))
        return
    gpus: Queue[int] = Queue()
    for gpu in range(args.gpus):
        gpus.put(gpu)
    with ThreadPoolExecutor(args.gpus) as pool:

        def start(*arguments: str) -> Future[dict[str, Any]]:
            return pool.submit(in_process, *arguments, gpus=gpus if args.gpus > 1 else None)

        demos = {run: start(run) for run in ("demo-v1", "demo-v2")}
        started = {shape: {run: start(run, shape) for run in args.runs} for shape in args.shapes}
    checked = {run: demo.result() for run, demo in demos.items()}
    for run, demo in checked.items():
        print(f"vLLM {demo['vllm']}, {run}: {demo['right']} of {demo['questions']} questions answered rightly")
    results = {shape: {run: future.result() for run, future in runs.items()} for shape, runs in started.items()}
    for shape, runs in results.items():
        floor = floor_ms(shape, next(iter(runs.values()))["bandwidth_gb_s"])
        print(f"\n{shape}: floor {floor:.3f} ms a decode step")
        print(f"{'':12}{'decode b1, ms':>22}{'256 requests, tok/s':>24}{'prefill, tok/s':>22}")
        for name, run in runs.items():
            cells = []
            for key, sign in KEYS.items():
                ratio = (run[key] / runs["vllm"][key]) ** -sign if "vllm" in runs else float("nan")
                cells.append(f"{run[key]:>13} ({100 * (ratio - 1):+5.1f} %)")
            print(f"{name:12}" + "".join(cells))
        sys.stdout.flush()
    print(json.dumps({"benchmark": "vllm_plugin", "demo": checked, "results": results}))


if __name__ == "__main__":
    main()
