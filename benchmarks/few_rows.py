"""Products of 4 to 256 rows, as decode steps of batches have them: ours against cuBLAS, next to their floor.

Each product runs within a CUDA graph over copies of its weight that do not fit into the cache together; for gate and up
cuBLAS is followed by our swiglu kernel, which ours has within. `layer` is all four products of a layer in a row. The
floor is the longer of reading the weight and x and writing y at the measured bandwidth, and of the arithmetic at 790
TFLOP/s. Before a timing, the result is compared with fp32. Best of several rounds, in microseconds a product.

    python benchmarks/few_rows.py [--models qwen3-0.6b llama-1b] [--rows 16 64]
    python benchmarks/few_rows.py --sweep [--models qwen3-0.6b]

With --sweep, many settings of each product, and the best three of them and of what `triton_rows.choose` takes. Kernels
are compiled first, by a process a core. Ends with one JSON line; without a GPU, at once, with exit status 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROUNDS, REPLAYS = 5, 4
WEIGHT_BYTES = 100e6  # of all copies, at least
FLOPS = 790e12
ROWS = (4, 16, 32, 64, 96, 128, 192, 256)
SWEPT_ROWS = (16, 64, 128, 256)
DTYPE = torch.bfloat16
SHARED = 227 << 10  # bytes of a processor


class Product(NamedTuple):
    name: str
    size: int
    outputs: int  # half of the weight's if gated
    gated: bool = False


MODELS = {
    "qwen3-0.6b": (
        Product("qkv", 1024, 4096), Product("o", 2048, 1024), Product("gate_up", 1024, 3072, True),
        Product("down", 3072, 1024),
    ),
    "llama-1b": (
        Product("qkv", 2048, 3072), Product("o", 2048, 2048), Product("gate_up", 2048, 8192, True),
        Product("down", 8192, 2048),
    ),
    "llama-8b": (
        Product("qkv", 4096, 6144), Product("o", 4096, 4096), Product("gate_up", 4096, 14336, True),
        Product("down", 14336, 4096),
    ),
}  # fmt: skip

# What is tried, by rows: a tile's rows, outputs and inputs, warps, stages.
FORMS = {
    16: ((16, 64, 64, 4, 6), (16, 64, 128, 4, 4), (16, 64, 256, 4, 3), (16, 128, 128, 4, 4), (16, 32, 256, 4, 4)),
    64: (
        (64, 64, 64, 4, 6), (64, 64, 64, 4, 4), (64, 64, 128, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 8, 4),
        (32, 64, 128, 4, 4),
    ),
    128: (
        (128, 64, 64, 4, 4), (128, 64, 128, 4, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (64, 64, 64, 4, 6),
        (64, 128, 64, 4, 4),
    ),
    256: (
        (128, 64, 64, 4, 4), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (256, 64, 64, 4, 3), (256, 64, 64, 8, 4),
        (256, 128, 64, 8, 3), (64, 128, 64, 4, 4),
    ),
}  # fmt: skip

Settings = Any  # triton_rows.Settings, which only a machine with Triton can import


def candidates(product: Product, rows: int) -> list[Settings]:
    """Settings that can be compiled, with a program or two for each processor where splits can bring that about."""
    from lamella.ops.linear.triton_rows import Settings

    found, sums = [], 2 if product.gated else 1
    for tile, outputs, inputs, warps, stages in FORMS[min(most for most in FORMS if most >= rows)]:
        if tile * outputs * sums > 160 * 32 * warps or 2 * stages * inputs * (tile + sums * outputs) > SHARED:
            continue
        tiles = -(-rows // tile) * -(-product.outputs // outputs)
        fit = [n for n in (1, 2, 4, 8, 16) if 60 <= n * tiles <= 280 and product.size // n >= 2 * inputs]
        found += [Settings(tile, outputs, inputs, n, warps, stages) for n in fit or [1]]
    return found


def operands(product: Product, rows: int, weights: int) -> tuple[Tensor, list[Tensor]]:
    outputs = product.outputs * (2 if product.gated else 1)
    x = torch.randn(rows, product.size, device="cuda").to(DTYPE)
    shape, scale = (outputs, product.size), product.size**-0.5
    return x, [torch.empty(shape, dtype=DTYPE, device="cuda").normal_(0, scale) for _ in range(weights)]


def ours(product: Product, x: Tensor, weight: Tensor, settings: Settings | None = None) -> Tensor:
    from lamella.ops.linear import triton_rows

    return triton_rows.linear(x, weight, None, gated=product.gated, settings=settings)


def library(product: Product, x: Tensor, weight: Tensor) -> Tensor:
    from lamella.ops.swiglu.triton import swiglu

    y = torch.nn.functional.linear(x, weight)
    return swiglu(y) if product.gated else y


def compile_one(job: tuple[Product, int, Settings | None]) -> None:
    """Leave the kernels in Triton's cache; what cannot be compiled is found out again by who wants to run it."""
    product, rows, settings = job
    with torch.inference_mode():
        x, (weight,) = operands(product, rows, 1)
        try:
            ours(product, x, weight, settings)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{product.name} {rows} {settings}: {type(error).__name__}", flush=True)


def compile_all(jobs: Sequence[tuple[Product, int, Settings | None]]) -> None:
    start = time.perf_counter()
    with get_context("spawn").Pool(min(16, os.cpu_count() or 1)) as pool:
        pool.map(compile_one, jobs, chunksize=4)
    print(f"{len(jobs)} products compiled in {time.perf_counter() - start:.0f} s", flush=True)


def check(product: Product, rows: int, y: Tensor, expected: Tensor, who: object) -> None:
    scale = expected.abs() + expected.square().mean().sqrt()  # what is rounded is off by a part of itself
    error = float(((y.float() - expected).abs() / scale).max())
    assert error < 2**-6, f"{product} {rows} rows, {who}: off by {error:.1e}"


def microseconds(calls: Sequence[Callable[[], Tensor]], parts: int) -> float:
    """Of all calls in one graph, divided by `parts`."""
    calls[0]()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = float("inf")
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # so that the device is busy until the host has launched the rest
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / REPLAYS)
    return round(best / parts, 2)


def floor(product: Product, rows: int, bandwidth: float) -> float:
    """Microseconds."""
    weight = product.size * product.outputs * (2 if product.gated else 1)
    nbytes = DTYPE.itemsize * (weight + rows * (product.size + product.outputs))
    return round(max(nbytes / bandwidth, 2 * rows * weight / FLOPS) * 1e6, 2)


def measure(model: str, all_rows: Sequence[int], bandwidth: float, sweep: bool) -> Iterator[dict[str, Any]]:
    from triton.runtime.errors import OutOfResources, PTXASError

    from lamella.ops.linear.triton_rows import choose
    from lamella.ops.swiglu.reference import swiglu

    products = MODELS[model]
    sizes = [DTYPE.itemsize * p.size * p.outputs * (2 if p.gated else 1) for p in products]
    weights = [operands(p, 1, max(2, int(WEIGHT_BYTES / n) + 1))[1] for p, n in zip(products, sizes, strict=True)]
    layers = max(2, int(WEIGHT_BYTES / sum(sizes)) + 1)
    for rows in all_rows:
        inputs = [operands(product, rows, 0)[0] for product in products]
        for product, x, same in zip(products, inputs, weights, strict=True):
            expected = torch.nn.functional.linear(x.float(), same[0].float())
            expected = swiglu(expected) if product.gated else expected
            row: dict[str, Any] = {
                "model": model, "product": product.name, "rows": rows, "floor": floor(product, rows, bandwidth)
            }  # fmt: skip
            ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cublas": partial(library, product)}
            chosen = choose(rows, product.outputs, product.size, product.gated)
            swept = [settings for settings in candidates(product, rows) if settings != chosen] if sweep else []
            settings_of = {str(tuple(settings)): settings for settings in (chosen, *swept)}
            ways |= {name: partial(ours, product, settings=settings) for name, settings in settings_of.items()}
            times = {}
            for name, way in ways.items():
                try:
                    check(product, rows, way(x, same[0]), expected, name)
                except (OutOfResources, PTXASError) as error:
                    print(f"{product.name} {rows} {name}: {type(error).__name__}", flush=True)
                    continue
                times[name] = microseconds([partial(way, x, weight) for weight in same], len(same))
            row |= {"cublas": times.pop("cublas"), "ours": times[str(tuple(chosen))], "chosen": tuple(chosen)}
            if sweep:
                row["best"] = sorted((us, name) for name, us in times.items())[:3]
            yield row
        if not sweep:
            row = {"model": model, "product": "layer", "rows": rows}
            row["floor"] = round(sum(floor(product, rows, bandwidth) for product in products), 2)
            for name, way in (("cublas", library), ("ours", ours)):
                calls = [
                    partial(way, product, x, same[layer])
                    for layer in range(layers)
                    for product, x, same in zip(products, inputs, weights, strict=True)
                ]
                row[name] = microseconds(calls, layers)
            yield row


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--rows", nargs="*", type=int)
    parser.add_argument("--sweep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("products of few rows are measured on a GPU, and there is none")
        return 2
    from lamella.bench.card import measure_bandwidth

    start = time.perf_counter()
    all_rows = options.rows or (SWEPT_ROWS if options.sweep else ROWS)
    jobs: list[tuple[Product, int, Settings | None]] = []
    for model in options.models:
        for product in MODELS[model]:
            for rows in all_rows:
                jobs += [
                    (product, rows, None),
                    *((product, rows, s) for s in candidates(product, rows) if options.sweep),
                ]
    compile_all(jobs)
    gc.freeze()  # some versions of torch collect garbage before each capture
    bandwidth = measure_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {bandwidth / 1e12:.2f} TB/s", flush=True)
    rows_measured = []
    for model in options.models:
        for row in measure(model, all_rows, bandwidth, options.sweep):
            rows_measured.append(row)
            print(
                f"{model:12}{row['product']:9}{row['rows']:4} rows: floor {row['floor']:7.2f}  cuBLAS "
                f"{row['cublas']:7.2f}  ours {row['ours']:7.2f}  {row.get('chosen', '')}",
                flush=True,
            )
            for us, name in row.get("best", ()):
                print(f"{us:50.2f}  {name}", flush=True)
    seconds = round(time.perf_counter() - start)
    print(f"{seconds} s in all")
    device = torch.cuda.get_device_name()
    print(json.dumps({"device": device, "bandwidth": bandwidth, "seconds": seconds, "products": rows_measured}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
