"""Hybrids and supernets on one GPU: lamella's own engine, the plugin inside vLLM, and vLLM's nearest model of its own.

    python benchmarks/hybrids.py [--runs gdn kda mamba ops supernet] [--engines ENGINE ...] [--quick]
        [--vllm-python PYTHON] [--at-a-time N] [--flashinfer] [--gdn-prefill auto] [--logs FOLDER]

First the engine must be as exact as its reference on this device: teacher-forced log-probabilities of a small random
hybrid of all five mixers in bf16, whose error may be at most the noise floor's (`lamella.parity.compare`). Then, with
random bf16 weights, in processes of their own:

    gdn, kda    24 layers, three of the mixer and one of attention in turn, by `lamella`, `plugin` and `vllm`
    mamba       the same by `lamella` and `plugin`; vLLM has no such mixer
    scout       4 layers of Llama 4 Scout (21.6 GB: hidden 5120, 16 experts and a shared one of 8192, three layers that
                see chunks of 8192 and one that sees all), for contexts beyond a chunk, by `lamella`, `plugin`, `vllm`
    supernet    attention, sliding window, gdn and kda in each layer. `standalone`: gdn's model; `fixed`: the supernet
                with that placement, and how long a switch to another one takes, first and with its graphs kept;
                `mixed`: decodes of many requests, half of them under each of two placements without a mixer in common
    ops         what a decode step does with the state (convolution, delta rule, gated norm), within a graph over many
                layers' states, beside the time in which the bytes that must be moved can be

Decode: 128 tokens after prompts of 128, for 1 and for 64 requests, as the difference to one token. Prefill: 16 x 2048.
Best of three; `--quick` has half of the layers, fewer tokens, and best of two. The floor of a step is the time in which
its weights and its state can be moved at the bandwidth that a probe measures.

The processes of several engines start at the same time (`--at-a-time 1`: one after the other, so that kernels are tuned
in quiet); each then waits until all have started, and measures alone. One JSON line ends the output; the exit status
is 1 where a run has failed, which keeps none of the others from running.

What the models of vLLM's own have otherwise:

    gdn     Qwen3NextForCausalLM with dense MLPs (no experts; its bookkeeping of them, which insists on one, is
            skipped), without the attention's output gate, rotation of whole heads, and fp32 recurrent state. It norms
            each query and key head, and its norms multiply by 1 + weight. Prompts take its Triton chunks, unless
            `--gdn-prefill auto` leaves it to vLLM, which on Hopper compiles FlashInfer's kernels for minutes.
    kda     KimiLinearForCausalLM without experts. Its attention is latent (rank 512, 32 heads of 128 + 64, values of
            128: 26.4 M weights a layer), ours has 32 heads of 128 over 16 (25.2 M); neither rotates.

All of vLLM runs in the process that calls it (VLLM_ENABLE_V1_MULTIPROCESSING=0 unless that is set), with graphs for
powers of two. Prompts' attention in lamella is its own kernel: FlashInfer's compile for minutes on first use, and are
taken with `--flashinfer`.

`--device cpu --tiny` runs the same code with tiny shapes, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from common.environment import device_name, installed_versions
from hybrid_parts.jobs import STARTS, batches, execute, work
from hybrid_parts.models import Values
from hybrid_parts.sizes import Sizes
from hybrid_parts.tables import print_run, ratios

RUNS = {
    "gdn": ("lamella", "plugin", "vllm"),
    "kda": ("lamella", "plugin", "vllm"),
    "mamba": ("lamella", "plugin"),
    "scout": ("lamella", "plugin", "vllm"),
    "ops": ("ops",),
    "supernet": ("standalone", "fixed", "mixed"),
}


def parse() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--engines", nargs="+", choices=STARTS, default=list(STARTS), help="only these of each run")
    parser.add_argument("--quick", action="store_true", help="half of the work")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, whose times say nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--at-a-time", type=int, default=5, help="engines that start at the same time")
    parser.add_argument("--flashinfer", action="store_true", help="lamella's prompts by FlashInfer")
    parser.add_argument("--gdn-prefill", choices=("triton", "auto"), default="triton", help="of vLLM's gdn")
    parser.add_argument("--logs", type=Path, help="keep what the engines say in this folder")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.logs and args.logs.exists() and any(args.logs.iterdir()) and not args.worker:
        parser.error(f"--logs {args.logs}: is not empty")
    if shutil.which(args.vllm_python) is None:
        parser.error(f"--vllm-python {args.vllm_python}: there is no such program")
    return args


def main() -> None:
    """Run the jobs of the command line, or be one of their worker processes."""
    args = parse()
    if args.worker:
        run, engine, folder = args.worker
        work(run, engine, Path(folder), args)
    sizes, begin = Sizes.from_args(args), time.monotonic()
    jobs = [("parity", "parity")]
    jobs += [(run, engine) for run in RUNS if run in args.runs for engine in RUNS[run] if engine in args.engines]
    results: dict[str, dict[str, Values]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.logs or Path(temporary)).resolve()
        missing = {run: sum(job[0] == run for job in jobs) for run, _ in jobs}
        for some in batches(jobs, max(1, args.at_a_time)):
            for run, engine, result in execute(some, args, home):
                results.setdefault(run, {})[engine] = result
                if len(results[run]) == missing[run]:
                    print_run(run, results[run], sizes)
    failed = [f"{run}/{engine}" for run, each in results.items() for engine, r in each.items() if "error" in r]
    summary = {
        "benchmark": "hybrids",
        "device": device_name(args.device),
        "versions": installed_versions(),
        "seconds": round(time.monotonic() - begin),
        "layers": sizes.layers,
        "failed": failed,
        "ratios": ratios(results, RUNS, sizes),
        "results": results,
    }
    print(json.dumps(summary))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
