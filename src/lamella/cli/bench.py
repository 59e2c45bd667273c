"""`lamella bench`: print the roofline floor, check the tokens, measure the time, and print one JSON line last."""

from __future__ import annotations

import argparse
import platform
from dataclasses import asdict

import torch

import lamella
from lamella.bench.card import CostCard, measure_bandwidth
from lamella.bench.ops import time_ops
from lamella.bench.workloads import Workload, check, measure
from lamella.cli.common import load_llm, print_json, size
from lamella.ops import catalogue
from lamella.serve.llm import LLM


def run(args: argparse.Namespace) -> int:
    """Run a workload and print its figures; return the exit status."""
    llm = load_llm(args)
    requests = args.requests or (16 if args.workload == "offline" else 1)
    workload = Workload(requests, args.input_len, args.output_len)
    context = workload.input_len + workload.output_len // 2  # average length over the decode steps
    bandwidth = measure_bandwidth(llm.engine.device)
    card = CostCard.from_model(llm.engine.model, bandwidth)
    floor = card.floor_seconds(requests, context) * 1e3
    print(
        f"{card.parameters / 1e6:.1f} M parameters, {size(card.step_bytes)} of weights and "
        f"{size(requests * card.state.bytes_at(context))} of state a decode step, "
        f"at {bandwidth / 1e9:.1f} GB/s measured: floor {floor:.2f} ms"
    )
    if args.workload == "ops":
        return _ops(llm, requests, context, bandwidth)
    gap = check(llm, workload)
    print(f"check: sampled tokens are within {gap:.2g} logprob of the likeliest tokens of a plain forward")
    timing = measure(llm, workload, args.repeats)
    step = timing.decode_ms_per_step
    print(
        f"prefill {timing.prompt_tok_s:.0f} tok/s, output {timing.output_tok_s:.1f} tok/s"
        + (f", decode {step:.2f} ms a step, {floor / step:.0%} of the floor's speed" if step else "")
    )
    print_json(
        {
            "workload": args.workload,
            "model": str(args.model),
            "requests": requests,
            "input_len": workload.input_len,
            "output_len": workload.output_len,
            "dtype": str(next(llm.engine.model.parameters()).dtype).removeprefix("torch."),
            "device": str(llm.engine.device),
            **card.as_dict(),
            "floor_ms_per_step": round(floor, 3),
            "floor_share": round(floor / step, 3) if step else None,
            "check_logprob_gap": gap,
            **timing.as_dict(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "lamella": lamella.__version__,
            "torch": torch.__version__,
        }
    )
    return 0


def _ops(llm: LLM, rows: int, context: int, bandwidth: float) -> int:
    """Measure each operation, and print times and backends."""
    timings = []
    print(f"operations of a decode step of {rows} requests with {context} tokens, microseconds per layer")
    for timing in time_ops(llm, rows, context, bandwidth):
        timings.append(timing)
        fraction = timing.floor / timing.microseconds
        print(
            f"{timing.op:22} {timing.microseconds:8.2f}  floor {timing.floor:8.2f} ({fraction:4.0%})  "
            f"error {timing.error:.1e}  x {timing.calls}"
        )
    print("backends, in order of preference")
    backends = [entry._asdict() for entry in catalogue.entries()]
    for each in backends:
        print(f"{each['op']:22} {each['backend']:10} {each['missing'] or 'available'}")
    print_json(
        {
            "workload": "ops",
            "requests": rows,
            "context": context,
            "device": str(llm.engine.device),
            "bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "ops": [asdict(timing) for timing in timings],
            "backends": backends,
            "lamella": lamella.__version__,
            "torch": torch.__version__,
        }
    )
    return 0
