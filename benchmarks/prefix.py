"""The prefix cache: what a hit gains, what the cache costs where nothing hits, and vLLM beside it.

Two workloads, random tokens, greedy: `system` (requests that share a system prompt, one after another, and as one
batch, `system-batch`) and `chat` (conversations whose every prompt is the history with the answers), on a dense model,
and on a canon model and a hybrid with gated delta nets, whose hits need copies of slot state besides blocks. Random
bf16 weights, written once.

    off      without the cache
    cold     with it, just emptied, and prompts that share nothing: what keeping it costs
    warm     with it; `system`: after other requests with the same system prompt have passed
    primed   with it; `system`: after the system prompt alone has passed

Engines run in processes of their own, in turn; an engine's variants take turns request by request. Of each request the
best of `--rounds` counts. The time to the first token (ttft) of `chat` is that of the later turns: the first ones have
nothing to hit. Before the timing, small float32 models must give the same tokens with the cache as without; after it,
one plain fp32 forward of the bf16 model scores tokens of each variant: rounding is worth some hundredths, a wrong token
about 3.

    python benchmarks/prefix.py --vllm-python /path/to/venv-with-vllm/bin/python

The cost card comes first, a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from prefix_parts.checks import Seen, check_tokens, score
from prefix_parts.costs import costs, measure_rates
from prefix_parts.engines import PrefixWorker, worker
from prefix_parts.load import Load
from prefix_parts.models import MODELS, SHAPE, SMALL, make_checkpoint, model_config
from prefix_parts.tables import report
from prefix_parts.timing import measure, rows_of


def main() -> None:
    """Run the benchmark, or be one of its worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="a Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    for size, value in asdict(Load()).items():
        if size != "vocab_size":
            parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="a file for the last line")
    parser.add_argument("--worker", nargs=4, metavar=("ENGINE", "PATH", "DEVICE", "MODES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    load = Load(**{size: getattr(args, size) for size in asdict(Load()) if size != "vocab_size"})
    rows, cards, gaps, equal = [], {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        for model in args.models:
            small = str(Path(name, f"{model}-small"))
            make_checkpoint(Path(small), model_config(model, **SMALL, torch_dtype="float32"), 0.06)
            equal[model] = check_tokens(small, args.device)
            print(f"{model}: float32 tokens with the cache equal those without; hits, in tokens: {equal[model]}")
            make_checkpoint(Path(name, model), model_config(model))
        rates = measure_rates(args.device)
        for model in args.models:
            print(f"{model}:")
            cards[model] = costs(str(Path(name, model)), load, rates)
        for model in args.models:
            path = str(Path(name, model))
            workers = [PrefixWorker(sys.executable, "lamella", path, args.device, "off,on")]
            if args.vllm_python and model == "dense":  # vLLM has no canon layers, and not this hybrid
                workers += [PrefixWorker(args.vllm_python, "vllm", path, args.device, mode) for mode in ("off", "on")]
            seen: Seen = {}
            best = measure(workers, load, args.rounds, seen)
            for each in workers:
                each.close()
            rows += rows_of(model, best, load)
            gaps[model] = score(path, seen)
    summary = {
        "benchmark": "prefix",
        "device": args.device,
        "rounds": args.rounds,
        "load": asdict(load),
        "shape": SHAPE,
        "vllm": bool(args.vllm_python),
        "cost": cards,
        "float32_tokens_equal": equal,
        "rows": rows,
        **report(rows, gaps),
        "logprob_gap": {model: {k: round(gap, 4) for k, gap in some.items()} for model, some in gaps.items()},
    }
    if not args.vllm_python:
        print("vLLM was left out; --vllm-python brings it in")
    worst = max(gap for some in gaps.values() for gap in some.values())
    assert worst < 0.5, f"wrong tokens were chosen: {gaps}"
    if args.json:
        args.json.write_text(json.dumps(summary) + "\n")
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
