"""How exact the engines are: the parity kit's headline over random models of each architecture, mean over seeds.

    python benchmarks/parity.py [--seeds 5] [--device cuda] [--engine vllm] [--json FILE]

Llama and Qwen3 are made with `transformers`, which is also their truth; for LlamaCanon, which it lacks, the kit's own
reference is. A noise floor ratio of 1 is what users of `transformers` have in the same dtype. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch

from common.checkpoints import write_checkpoint
from lamella.models import LlamaCanonForCausalLM
from lamella.parity import check
from lamella.parity.report.report import versions

SHAPE = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
CANON = {"architectures": ["LlamaCanonForCausalLM"], "model_type": "LlamaCanon", "canon_set": "ABCD", "qk_norm": True}
INPUTS = {"prompts": "random", "count": 8, "prompt_len": 96, "decode_len": 32}


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that every part matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
        elif "canon" in name:
            parameter.uniform_(-0.5, 0.5, generator=generator)
        else:
            parameter.normal_(0.0, 0.06, generator=generator)


def make_canon(folder: Path, seed: int) -> None:
    """Write a random LlamaCanon."""
    model = LlamaCanonForCausalLM.from_config(SHAPE | CANON)
    randomize(model, seed)
    write_checkpoint(folder, model, SHAPE | CANON)


def make_hf(kind: str, folder: Path, seed: int) -> None:
    """Write a random model of `transformers`."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomize(model, seed)
    model.save_pretrained(folder)


def make(architecture: str, folder: Path, seed: int) -> None:
    """Write a random model of an architecture."""
    if architecture == "LlamaCanon":
        make_canon(folder, seed)
    else:
        make_hf(architecture, folder, seed)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["Llama", "Qwen3", "LlamaCanon"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--engine", default="lamella")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for architecture in args.architectures:
        for dtype in args.dtypes:
            reports = []
            for seed in range(args.seeds):
                with tempfile.TemporaryDirectory() as name:
                    folder = Path(name)
                    make(architecture, folder, seed)
                    reports.append(
                        check(folder, engine=args.engine, device=args.device, dtype=dtype, seed=seed, **INPUTS)
                    )
            rows.append(summarise(architecture, dtype, reports))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "benchmark": "parity",
        "engine": args.engine,
        "device": args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
        "device_name": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "shape": SHAPE,
        "inputs": INPUTS,
        "seeds": args.seeds,
        "versions": versions(),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def summarise(architecture: str, dtype: str, reports: list) -> dict:
    """Means over the seeds, and the worst of what must never be bad."""
    stats = [report.stats for report in reports]
    cells = [cell for r in reports if r.paths for cell in r.paths.cells if cell.status != "unavailable"]
    rows = [row for r in reports if r.bisection for row in r.bisection.rows]
    return {
        "architecture": architecture,
        "dtype": dtype,
        "oracle": reports[0].reference,
        "ratio": round(statistics.mean(s.noise_floor_ratio for s in stats), 3),
        "ratio_min": round(min(s.noise_floor_ratio for s in stats), 3),
        "ratio_max": round(max(s.noise_floor_ratio for s in stats), 3),
        "p999_ratio": round(statistics.mean(s.p999_ratio for s in stats), 3),
        "bias_in_standard_errors": round(statistics.mean(s.engine.bias / s.engine.bias_error for s in stats), 2),
        "rms": statistics.mean(s.engine.rms for s in stats),
        "max": max(s.engine.max for s in stats),
        "flips": sum(s.engine.flips for s in stats),
        "flips_beyond_ties": sum(s.engine.flips - s.engine.near_tie_flips for s in stats),
        "paths_passed": f"{sum(cell.status == 'pass' for cell in cells)}/{len(cells)}",
        "path_logprob_max": max((cell.logprob_max for cell in cells), default=None),
        "path_state_max": max((cell.state_max for cell in cells if cell.state_max is not None), default=None),
        "operations_in_line": f"{sum(not row.out_of_line for row in rows)}/{len(rows)}",
        "operation_ratio_max": round(max((row.ratio for row in rows), default=0.0), 2),
        "passed": f"{sum(report.passed for report in reports)}/{len(reports)}",
        "reasons": [reason for report in reports for reason in report.reasons],
    }


if __name__ == "__main__":
    main()
