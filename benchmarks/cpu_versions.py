"""Two versions of lamella on the CPU: one machine, one run, interleaved, the same random weights.

Both run the shape and the load of `cpu_vs_peers.py`, each in a process of its own, in turn; the order changes with
every round. The medians of the rounds are compared, and the tokens of both versions must be equal.

    git worktree add /tmp/before REVISION
    python benchmarks/cpu_versions.py --before /tmp/before/src

A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

from cpu_vs_peers import BATCHES, OUTPUT_LEN, make_checkpoint, roofline, start_worker, time_batch

SOURCES = {"after": str(Path(__file__).resolve().parents[1] / "src")}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, help="the `src` folder of the version to compare with")
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    sources = {"before": str(Path(args.before).resolve()), **SOURCES}
    seconds: dict[tuple[str, int, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        floors = roofline(folder)
        workers = {name: start_worker(sys.executable, "lamella", folder, source) for name, source in sources.items()}
        for number in range(args.rounds):
            for batch in BATCHES:
                for count in (1, OUTPUT_LEN):
                    tokens = []
                    for name in sorted(sources, reverse=number % 2 == 1):
                        answer = time_batch(workers[name], batch, count)
                        seconds.setdefault((name, batch, count), []).append(answer["seconds"])
                        tokens.append(answer["tokens"])
                    if tokens[0] != tokens[1]:
                        raise SystemExit(f"the versions chose other tokens, batch {batch}: {tokens}")
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        for worker in workers.values():
            worker.close()
    runs = []
    print(f"{'batch':>5} {'version':<8}{'prefill s':>11}{'decode ms':>11}{'floor ms':>10}{'total s':>9}")
    for batch in BATCHES:
        for name in sources:
            prefill, total = (median(seconds[name, batch, count]) for count in (1, OUTPUT_LEN))
            decode = (total - prefill) / (OUTPUT_LEN - 1) * 1e3
            print(f"{batch:>5} {name:<8}{prefill:>11.3f}{decode:>11.2f}{floors[batch]:>10.2f}{total:>9.3f}")
            figures = {"prefill_s": prefill, "decode_ms": decode, "total_s": total}
            runs.append({"batch": batch, "version": name, **{key: round(value, 4) for key, value in figures.items()}})
    by_key = {(run["batch"], run["version"]): run for run in runs}
    ratios = {
        f"{key}, batch {batch}": round(by_key[batch, "after"][key] / by_key[batch, "before"][key], 4)
        for batch in BATCHES
        for key in ("prefill_s", "decode_ms", "total_s")
    }
    print(json.dumps({"rounds": args.rounds, "runs": runs, "after_over_before": ratios}))


if __name__ == "__main__":
    main()
