"""A layer of experts by itself: lamella's grouped products against torch's `grouped_mm`.

    scout       16 experts of 5120 -> 8192 -> 5120, one a token (Llama 4 Scout)
    fine        128 experts of 2048 -> 768 -> 2048, eight a token

`lamella` is `ops/moe/triton.py`: a plan, two grouped products with what stands around them inside. `grouped_mm` makes
the same plan and then gathers, multiplies, gates, multiplies and adds up, with torch's products, whose bounds stay on
the device. Both are compared with the reference on a few rows and timed within a graph, best of several rounds. The
floor is the larger of the time in which the weights of the experts that are used can be read, at the bandwidth that a
probe measures, and of the time of the products at the speed of a large one of cuBLAS's.

    python benchmarks/experts.py [--shapes scout] [--rows 1 64 16384]

A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common.timing import seconds
from lamella.bench.card import measure_bandwidth
from lamella.ops.moe import experts, reference
from lamella.ops.swiglu import swiglu

CHECKED = 24  # rows compared with the reference, which takes them one by one
TOLERANCE = 2e-2  # of the largest value; bf16


class Shape(NamedTuple):
    """Sizes of a layer of experts."""

    experts: int
    top_k: int
    size: int
    width: int


SHAPES = {"scout": Shape(16, 1, 5120, 8192), "fine": Shape(128, 8, 2048, 768)}
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)

Operands = dict[str, Any]


def make(shape: Shape, rows: int, device: torch.device) -> Operands:
    """Return random operands."""

    def narrow(*sizes: int) -> Tensor:
        return (torch.randn(sizes, device=device) / sizes[-1] ** 0.5).bfloat16()

    return {
        "x": torch.randn(rows, shape.size, device=device).bfloat16(),
        "logits": torch.randn(rows, shape.experts, device=device),
        "top_k": shape.top_k,
        "gate_up": narrow(shape.experts, 2 * shape.width, shape.size),
        "down": narrow(shape.experts, shape.size, shape.width),
    }


def with_grouped_mm(x: Tensor, logits: Tensor, top_k: int, gate_up: Tensor, down: Tensor) -> Tensor:
    """Compute the layer by torch's `grouped_mm`. See `lamella.ops.moe.experts`."""
    from lamella.ops.moe.triton import make_plan

    order, weights, bounds = make_plan(logits, top_k)
    order = order.long()
    rows = (x[order // top_k].float() * weights[:, None]).to(x.dtype)
    product = torch.nn.functional.grouped_mm
    inner = swiglu(product(rows, gate_up.transpose(1, 2), offs=bounds[1:]))
    parts = product(inner, down.transpose(1, 2), offs=bounds[1:])
    out = torch.empty_like(parts).index_copy_(0, order, parts)
    return out if top_k == 1 else out.unflatten(0, (-1, top_k)).float().sum(1).to(x.dtype)


def check(name: str, way: Callable[..., Tensor], operands: Operands) -> None:
    """Compare some rows with the reference."""
    some = operands | {key: operands[key][:CHECKED] for key in ("x", "logits")}
    expected = reference.experts(**some).float()
    # All rows at once, as in the timing: how many there are decides how the products run.
    error = float((way(**operands)[:CHECKED].float() - expected).abs().max() / expected.abs().max())
    assert error < TOLERANCE, f"{name}: off by {error:.1e}"


def cublas_speed() -> float:
    """FLOP/s of a large product."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return 2 * 8192**3 / seconds(lambda: a @ b, graph=True)


def floor(shape: Shape, operands: Operands, bandwidth: float, speed: float) -> float:
    """Return the least time of the layer, in seconds."""
    used = reference.route(operands["logits"], shape.top_k)[0].unique().numel()
    weights = used * 3 * shape.size * shape.width
    work = 2 * operands["x"].shape[0] * shape.top_k * 3 * shape.size * shape.width
    return max(2 * weights / bandwidth, work / speed)


@torch.inference_mode()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=tuple(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    args = parser.parse_args()
    torch.manual_seed(0)
    ways = {"lamella": experts, "grouped_mm": with_grouped_mm}
    if not torch.cuda.is_available():
        sys.exit("experts: needs a GPU")
    device = torch.device("cuda")
    bandwidth, speed = measure_bandwidth(device), cublas_speed()
    print(f"{torch.cuda.get_device_name()}, {bandwidth / 1e12:.2f} TB/s, {speed / 1e12:.0f} TFLOP/s")
    found = []
    for name in args.shapes:
        shape = SHAPES[name]
        for rows in args.rows:
            operands = make(shape, rows, device)
            least = floor(shape, operands, bandwidth, speed)
            row: dict[str, Any] = {"shape": name, "rows": rows, "floor_us": least * 1e6}
            for label, way in ways.items():
                check(f"{name}, {rows} rows, {label}", way, operands)
                row[f"{label}_us"] = seconds(partial(way, **operands), graph=True) * 1e6
            found.append(row)
            spent = {label: row[f"{label}_us"] for label in ways}
            times = "".join(f"{label:>12} {us:9.1f} us ({least * 1e6 / us:4.0%})" for label, us in spent.items())
            print(f"{name:8}{rows:6} rows, floor {row['floor_us']:9.1f} us{times}", flush=True)
    print(json.dumps({"benchmark": "experts", "device": torch.cuda.get_device_name(), "rows": found}))


if __name__ == "__main__":
    main()
