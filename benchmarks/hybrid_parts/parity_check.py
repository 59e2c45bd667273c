"""The engine against its reference, on a small hybrid of all five mixers."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from common.checkpoints import enlarge_weights, write_checkpoint
from hybrid_parts.engines import Measure, hide_flashinfer
from hybrid_parts.models import apriel2, mixers
from hybrid_parts.sizes import Sizes


def parity(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Compare the engine with its reference, and return the function that returns the result."""
    hide_flashinfer(args)
    from lamella.parity import compare

    inputs = {"prompts": "random", "count": 4 if args.tiny else 8, "prompt_len": 96, "decode_len": 32}
    reports = []
    for seed in range(1 if args.tiny or args.quick else 2):
        small = folder / str(seed)
        small.mkdir()
        make_small(small, seed)
        reports.append(compare(small, dtype="bfloat16", device=args.device, seed=seed, **inputs))
    ratio = statistics.mean(report.noise_floor_ratio for report in reports)
    assert ratio <= 1.0, f"the engine's error is {ratio:.3f} times the noise floor's"
    rms, p999 = (
        statistics.mean(values) for values in zip(*((r.engine.rms, r.p999_ratio) for r in reports), strict=True)
    )
    return lambda: {"ratio": round(ratio, 3), "p999_ratio": round(p999, 3), "rms": round(rms, 5)}


def make_small(folder: Path, seed: int) -> None:
    """Write a random checkpoint with all five mixers."""
    import torch

    from lamella.models import Apriel2ForCausalLM

    sizes = Sizes(
        layers=5, hidden=256, intermediate=512, vocab=1000, heads=(4, 2, 64), plain_heads=(4, 2, 64), window=40,
        gdn=(2, 4, 64), kda=(4, 64), mamba=(16, 512, 128, 16),
    )  # fmt: skip
    values = apriel2(sizes, mixers(sizes), ["attention", "gdn", "kda", "mamba", "sliding_window"])
    torch.manual_seed(seed)
    model = Apriel2ForCausalLM.from_config(values)
    enlarge_weights(model, dims=(2,))
    write_checkpoint(folder, model, values)
