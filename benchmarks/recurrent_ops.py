"""The operations of recurrent mixers by themselves: steps against the memory's speed, prompts way by way.

    gdn, kda    the gated delta rule, with a decay for a head or for a key channel
    scan        the selective scan

A step (`decode`) has R requests of one new token; `TB/s` counts each state once in and once out. The states of all
layers together are larger than the cache; on a GPU the layers' launches stand in one graph. A prompt (`prefill`) of T
tokens goes every way that there is: `tokens` (token after token), `chunks` (the selective scan in three launches),
`fla` (fla-core's chunks, where it is installed); on a CPU `native` and `torch`. Where the ways cross, the constants of
ops/delta_rule/fla.py and ops/selective_scan/triton.py should stand. Before a timing, the way is compared with the
reference on a short input. Best of several rounds.

    python benchmarks/recurrent_ops.py [--dtype bfloat16] [--only kda]

A table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.timing import seconds
from lamella.ops import native
from lamella.ops.delta_rule import cpu as delta_cpu
from lamella.ops.delta_rule import reference as delta_reference
from lamella.ops.operands import RecurrentState
from lamella.ops.ragged import RaggedBatch
from lamella.ops.selective_scan import cpu as scan_cpu
from lamella.ops.selective_scan import reference as scan_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GPU = DEVICE.type == "cuda"
STATE_BYTES = 1 << (29 if GPU else 26)  # of all layers' states in a timing of steps
DECODES = (1, 4, 16, 64, 256) if GPU else (1, 8)
PREFILLS = (16, 64, 256, 512, 1024, 4096, 8192) if GPU else (16, 128, 512)
# Key (or x) and value heads, DK (or P), DV (or N).
SHAPES = {
    "gdn": ((2, 14, 64, 64), (8, 40, 128, 128)),
    "kda": ((14, 14, 64, 64), (40, 40, 128, 128)),
    "scan": ((56, 224, 16, 16), (8, 32, 128, 128)),
}

Operation = Callable[..., Tensor]


def make(
    name: str, shape: tuple[int, ...], tokens: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """The operands by name, and the shape of a state."""
    few, heads, rows, columns = shape

    def draw_fp32(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=DEVICE)

    def draw_bf16(*sizes: int) -> Tensor:
        return torch.randn(tokens, *sizes, device=DEVICE).to(dtype)

    if name == "scan":
        each = {
            "x": draw_bf16(few, rows),
            "dt": draw_bf16(heads, rows),
            "b": draw_bf16(few, columns),
            "c": draw_bf16(heads, columns),
        }
        rest = {
            "a_log": draw_fp32(heads, rows, columns),
            "dt_bias": draw_fp32(heads, rows),
            "d": draw_fp32(heads, rows),
        }
        return {**each, "z": draw_bf16(heads, rows), **rest}, (heads, rows, columns)
    gates = (heads, rows) if name == "kda" else (heads,)
    each = {"q": draw_bf16(few, rows), "k": draw_bf16(few, rows), "v": draw_bf16(heads, columns)}
    rest = {
        "decay": draw_bf16(*gates),
        "beta": draw_bf16(heads),
        "a_log": draw_fp32(heads),
        "dt_bias": draw_fp32(*gates),
    }
    return {**each, **rest}, (heads, rows, columns)


def on_cpu(kernel: Operation, batch: RaggedBatch, state: RecurrentState, **operands: Any) -> Tensor:
    """Call a C++ kernel with the arguments of an operation."""
    operands |= {"state": state.matrix, "slots": state.slots}
    return kernel(**operands, query_start_loc=batch.query_start_loc, seq_lens=batch.seq_lens)


def with_fla(wanted: bool, **operands: Any) -> Tensor:
    """Call the delta rule with or without fla-core."""
    from lamella.ops.delta_rule import fla, triton

    before, fla.MIN_WORK = fla.MIN_WORK, 0 if wanted else 1 << 62
    length, fla.MIN_LENGTH = fla.MIN_LENGTH, 0 if wanted else 1 << 62
    try:
        return triton.delta_rule(**operands)
    finally:
        fla.MIN_WORK, fla.MIN_LENGTH = before, length


def ways(name: str, decode: bool, dtype: torch.dtype) -> dict[str, Operation]:
    """Return the implementations of an operation by name."""
    scan = name == "scan"
    if not GPU:
        portable = scan_cpu.selective_scan if scan else delta_cpu.delta_rule
        kernel = native.selective_scan if scan else native.delta_rule
        return {"torch": portable, **({"native": partial(on_cpu, kernel)} if native.available() else {})}
    from lamella.ops.delta_rule import fla
    from lamella.ops.selective_scan import triton as scan_triton

    if scan:
        tokens = {"tokens": partial(scan_triton.selective_scan, chunked=False)}
        return tokens if decode else {**tokens, "chunks": partial(scan_triton.selective_scan, chunked=True)}
    tokens = {"tokens": partial(with_fla, False)}
    some = not decode and fla.serves(torch.empty(1, 1, 1, device=DEVICE, dtype=dtype), 1, 1 << 40, 1)
    return {**tokens, "fla": partial(with_fla, True)} if some else tokens


def check(name: str, shape: tuple[int, ...], way: Operation, label: str, dtype: torch.dtype) -> None:
    """Compare an implementation with the reference."""
    lengths, contexts = [1, 1, 70, 3], [1, 5, 70, 9]
    batch = RaggedBatch.from_lengths(lengths, contexts, DEVICE)
    operands, of_state = make(name, shape, batch.num_tokens, dtype)
    slots, old = torch.tensor([3, 1, 0, 4], device=DEVICE), torch.randn(5, *of_state, device=DEVICE)
    new, reference = old.clone(), scan_reference.selective_scan if name == "scan" else delta_reference.delta_rule
    expected = reference(**operands, batch=batch, state=RecurrentState(old, slots))
    y = way(**operands, batch=batch, state=RecurrentState(new, slots))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, truth in ((y, expected), (new, old)):
        error = float((ours.float() - truth.float()).abs().max() / truth.float().abs().max())
        assert error < tolerance, f"{name} {shape} {label}: off by {error:.1e}"


def decode(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Time steps, one row each."""
    for label, way in ways(name, True, dtype).items():
        check(name, shape, way, label, dtype)
        for requests in DECODES:
            batch = RaggedBatch.from_lengths([1] * requests, [9] * requests, DEVICE)
            operands, of_state = make(name, shape, requests, dtype)
            size = 4 * requests * torch.Size(of_state).numel()
            layers = [torch.zeros(requests, *of_state, device=DEVICE) for _ in range(min(64, -(-STATE_BYTES // size)))]
            slots = torch.randperm(requests, device=DEVICE)

            def step(
                way: Operation = way, batch: RaggedBatch = batch, operands: Any = operands, layers: Any = layers,
                slots: Tensor = slots,
            ) -> None:  # fmt: skip
                for state in layers:
                    way(**operands, batch=batch, state=RecurrentState(state, slots))

            each = seconds(step, graph=True) / len(layers)
            yield {
                "op": name, "shape": shape, "case": f"decode R={requests}", "way": label, "us": each * 1e6,
                "TB/s": 2 * size / each / 1e12,
            }  # fmt: skip


def prefill(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """Time prompts, one row each."""
    for label, way in ways(name, False, dtype).items():
        check(name, shape, way, label, dtype)
        for requests in (1, 8):
            for tokens in PREFILLS:
                lengths = [max(2, tokens // requests)] * requests
                batch = RaggedBatch.from_lengths(lengths, [n + 5 for n in lengths], DEVICE)
                operands, of_state = make(name, shape, batch.num_tokens, dtype)
                state, slots = torch.zeros(requests, *of_state, device=DEVICE), torch.arange(requests, device=DEVICE)
                call = partial(way, **operands, batch=batch, state=RecurrentState(state, slots))
                each = seconds(call, graph=False)
                yield {
                    "op": name, "shape": shape, "case": f"prefill {requests} x {lengths[0]}", "way": label,
                    "us": each * 1e6, "us/token": each * 1e6 / batch.num_tokens,
                }  # fmt: skip


@torch.inference_mode()
def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--only", nargs="*", choices=tuple(SHAPES), default=tuple(SHAPES))
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(
        torch.cuda.get_device_name() if GPU else f"CPU, {torch.get_num_threads()} threads", "torch", torch.__version__
    )
    rows = []
    for name in options.only:
        for shape in SHAPES[name]:
            for row in (*decode(name, shape, dtype), *prefill(name, shape, dtype)):
                rows.append(row)
                rate = f"{row['TB/s']:8.3f} TB/s" if "TB/s" in row else f"{row['us/token']:8.3f} us/token"
                print(f"{name:5}{shape!s:22}{row['case']:20}{row['way']:8}{row['us']:10.1f} us{rate:>20}", flush=True)
    print(json.dumps({"device": str(DEVICE), "dtype": options.dtype, "rows": rows}))


if __name__ == "__main__":
    main()
