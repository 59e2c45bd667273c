"""What compiling costs on a CPU, by the depth of the stack: the engine's blocks, the whole model, each layer by itself.

    python benchmarks/compile.py [--layers 12 48] [--stacks maverick canon hybrid]

`maverick` is Llama 4's pattern at a toy's width: every 4th layer without rotation, norm and chunk and with warmer
queries, experts in every 2nd. `canon` has all four convolutions in each layer. `hybrid` is Apriel2 with one layer of
attention to two of a gated delta net. The first depth is measured of each, others of `maverick`.

Each form compiles in a process of its own, without caches, on one thread, then computes steps of 64, 33, 1, 128, 7 and
2 tokens, whose results must be the eager ones; in all of them attention over state, recurrences and experts are
operations that torch.compile does not look into. Seconds are CPU time with the compilers', without what torch.compile's
own start takes. One JSON line ends the output; the exit status is 1 where a form computes something else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lamella.bench.compile import compile_costs
from lamella.cli.inspect import compile_table

_WIDTHS = {
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "dtype": "float32",
}
_BLOCK = {
    "mlp": {"type": "mlp", "intermediate_size": 512, "activation": "silu", "gated": True},
    "normalization": {"type": "rms_norm", "epsilon": 1e-5},
}
_ATTENTION = {
    "type": "attention",
    "heads": 8,
    "head_groups": 2,
    "head_size": 32,
    "rotary": {"type": "mistral_1d", "theta": 1e4},
}
_DELTA_NET = {
    "type": "gdn",
    "value_heads": 8,
    "key_heads": 4,
    "key_head_dim": 32,
    "value_head_dim": 32,
    "convolution_layer": {"kernel_size": 4},
}
STACKS: dict[str, dict[str, Any]] = {
    "maverick": _WIDTHS
    | {
        "architectures": ["Llama4ForCausalLM"],
        "intermediate_size": 256,
        "intermediate_size_mlp": 512,
        "num_hidden_layers": 4,
        "interleave_moe_layer_step": 2,
        "num_local_experts": 4,
        "attention_chunk_size": 32,
        "floor_scale": 16,
    },
    "canon": _WIDTHS
    | {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "canon_set": "ABCD",
    },
    "hybrid": {
        "architectures": ["Apriel2ForCausalLM"],
        "model_type": "apriel2_text",
        "vocab_size": 128,
        "hidden_size": 256,
        "dtype": "float32",
        "decoder": {
            "type": "pattern",
            "num_blocks": 3,
            "pattern": ["attention", "gdn", "gdn"],
            "blocks": {"attention": {"mixer": _ATTENTION, **_BLOCK}, "gdn": {"mixer": _DELTA_NET, **_BLOCK}},
        },
        "head": {"normalization": {"type": "rms_norm", "epsilon": 1e-5}},
    },
}


def main() -> int:
    """Compile each stack, print the costs, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    args = parser.parse_args()
    found = {}
    for name in args.stacks:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(STACKS[name]))
            depths = args.layers if name == "maverick" else args.layers[:1]
            found[name] = list(compile_costs(folder, depths))
        table = compile_table(found[name])
        table.title = f"{name}: {table.title}"
        Console(width=120).print(table)
    print(json.dumps({name: [asdict(cost) for cost in costs] for name, costs in found.items()}))
    return int(not all(cost.is_right for costs in found.values() for cost in costs))


if __name__ == "__main__":
    raise SystemExit(main())
