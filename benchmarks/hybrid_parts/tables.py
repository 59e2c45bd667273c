"""Tables and ratios of the results."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_parts.models import Values
from hybrid_parts.sizes import Sizes

TABLE = 24  # width of the first column


def print_run(run: str, results: dict[str, Values], sizes: Sizes) -> None:
    """Print the results of a run's engines."""
    print(f"\n{run}")
    for engine, result in results.items():
        if "error" in result:
            print(f"{engine:{TABLE}}FAILED: {result['error']}")
    right = {engine: result for engine, result in results.items() if "error" not in result}
    if run == "parity":
        for result in right.values():
            print(
                f"rms error {result['ratio']} times the noise floor's, 99.9th percentile {result['p999_ratio']} times"
            )
    elif run == "ops":
        print_ops(right)
    else:
        print_engines({engine: result for engine, result in right.items() if engine != "mixed"}, sizes)
        print_placements(right, sizes)
    sys.stdout.flush()


def print_engines(results: dict[str, Values], sizes: Sizes) -> None:
    """Print the workloads of engines, each beside the first one."""
    if not results:
        return
    keys = [*(f"decode_b{batch}_ms" for batch in sizes.batches), "prefill_tok_s"]
    first = next(iter(results))
    own = results[first] if "card" in results[first] else {}
    if own:
        steps = ", ".join(f"{own[f'floor_b{batch}_ms']:.3f} ms at {batch}" for batch in sizes.batches)
        print(f"{own['card']['parameters'] / 1e9:.2f} B parameters; floor of a decode step at "
              f"{own['card']['bandwidth_gb_s']:.0f} GB/s: {steps}")  # fmt: skip
    heads = [*(f"decode b{batch}, ms" for batch in sizes.batches), "prefill, tok/s", "start, s"]
    print(f"{'':{TABLE}}" + "".join(f"{head:>18}" for head in heads))
    for engine, result in results.items():
        cells = []
        for key in keys:
            floor = own.get(key.replace("decode", "floor")) if key.startswith("decode") else None
            share = f" ({100 * floor / result[key]:.0f} %)" if floor else ""
            cells.append(f"{result[key]:{18 - len(share)}}{share}")
        print(f"{engine:{TABLE}}" + "".join(cells) + f"{result['start_s']:18}")
        if engine != first:
            ratios = compared(results[first], result, keys)
            print(f"{f'  {first} is faster by':{TABLE}}" + "".join(f"{ratio:17.2f}x" for ratio in ratios.values()))


def compared(first: Values, other: Values, keys: Sequence[str]) -> dict[str, float]:
    """Return how many times as fast the first engine is."""
    return {
        key: round(first[key] / other[key] if key.endswith("tok_s") else other[key] / first[key], 3) for key in keys
    }


def print_placements(results: dict[str, Values], sizes: Sizes) -> None:
    """Print switches of the placement, and decodes under two placements."""
    if "fixed" in results:
        switches = (results["fixed"][f"switch_{name}_s"] for name in ("first", "back", "again"))
        print("switch of the placement: {:.3f} s at first, back {:.4f} s, again {:.4f} s".format(*switches))
    if "mixed" in results:
        mixed = results["mixed"]
        print(f"decode of {sizes.most} requests, ms a step (floor):")
        for name in ("first", "second", "mixed"):
            print(f"{'  ' + name:{TABLE}}{mixed[f'{name}_ms']:12.3f} ({mixed[f'floor_{name}_ms']:.3f})")
        for name in ("second", "mixed"):
            print(f"{f'  {name}, no graphs':{TABLE}}{mixed[f'{name}_without_graphs_ms']:12.3f}")
        print(f"{'  mixed / one placement':{TABLE}}{mixed_price(mixed):12.2f}x")


def mixed_price(mixed: Values) -> float:
    """Return the time of a step under two placements over the mean time under one."""
    return round(mixed["mixed_ms"] / statistics.mean((mixed["first_ms"], mixed["second_ms"])), 3)


def print_ops(results: dict[str, Values]) -> None:
    """Print the steps of recurrent mixers."""
    for result in results.values():
        print(f"one layer's step over its state; floor at {result['bandwidth_gb_s']} GB/s")
        for row in result["rows"]:
            print(f"{row['op']:6}{row['batch']:5} requests{row['us']:10.2f} us, floor {row['floor_us']:9.2f} "
                  f"({100 * row['of_floor']:.0f} %)")  # fmt: skip


def ratios(results: dict[str, dict[str, Values]], runs: Mapping[str, Sequence[str]], sizes: Sizes) -> dict[str, Any]:
    """Return how many times as fast the first engine of each run is as the others.

    Args:
        results: by run and engine.
        runs: the engines of each run, the first one first.
        sizes: of the workloads.
    """
    keys = [*(f"decode_b{batch}_ms" for batch in sizes.batches), "prefill_tok_s"]
    found: dict[str, Any] = {}
    for run, engines in results.items():
        right = {engine: result for engine, result in engines.items() if all(key in result for key in keys)}
        first = runs.get(run, ("",))[0]
        for engine, result in right.items():
            if engine != first and first in right:
                found[f"{run}: {first} over {engine}"] = compared(right[first], result, keys)
    mixed = results.get("supernet", {}).get("mixed", {})
    if "mixed_ms" in mixed:
        found["supernet: mixed over one placement"] = mixed_price(mixed)
    return found
