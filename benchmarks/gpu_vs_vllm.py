"""lamella against vLLM on one GPU: one machine, one run, the same shapes with random bf16 weights.

    python benchmarks/gpu_vs_vllm.py [--shapes llama-1b qwen3-0.6b llama-8b] [--canon] [--vllm-python PYTHON]
        [--engines lamella vllm]

Three workloads, of which each engine does all in a process of its own: decode of 256 tokens after a prompt of 128, one
request at a time (the median of seven); 256 requests of 100 to 1024 tokens in and out; prompts of 32 x 2048 tokens.
With `--canon` lamella also runs the same shapes with canon A, B, C and D. lamella's tokens are checked first: they must
be as likely as a plain forward's own choice. The floor of a decode step is the time in which its weights and its state
can be read at the bandwidth that a probe measures. The table is followed by one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    },
    "llama-8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
CANON = {"architectures": ["LlamaCanonForCausalLM"], "model_type": "LlamaCanon", "canon_set": "ABCD"}
MAX_MODEL_LEN = 4096
DECODE_TOKENS = 256
PROMPT_TOKENS = 128

# Seconds to complete prompts with so many tokens each.
Run = Callable[[Sequence[Sequence[int]], Sequence[int]], float]


def config(name: str) -> dict[str, Any]:
    """The shape of a name; with "+canon" at its end, with all four convolutions (and without Qwen3's norm)."""
    base = SHAPES[name.removesuffix("+canon")]
    return base | CANON if name.endswith("+canon") else base


def workloads(run: Run) -> dict[str, float]:
    """What both engines do."""
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(10000) for _ in range(count)]

    run([[1, 2, 3]], [8])
    prompt = [tokens(PROMPT_TOKENS)]
    # Each by itself: the prompt's time varies by more than what is to be seen in the steps.
    times = [(run(prompt, [1 + DECODE_TOKENS]), run(prompt, [1])) for _ in range(7)]
    decode = (
        statistics.median(long for long, _ in times) - statistics.median(short for _, short in times)
    ) / DECODE_TOKENS
    prompts = [tokens(rng.randint(100, 1024)) for _ in range(256)]
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    offline = sum(lengths) / run(prompts, lengths)
    prompts = [tokens(2048) for _ in range(32)]
    prefill = max(32 * 2048 / run(prompts, [1] * 32) for _ in range(2))
    return {
        "decode_b1_ms": round(decode * 1e3, 4),
        "offline_tok_s": round(offline),
        "prefill_tok_s": round(prefill),
    }


def timed(llm: Any, params_class: Any) -> Run:
    """How long an `LLM`, lamella's or vLLM's, needs."""

    def run(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
        common = {"temperature": 0.6, "ignore_eos": True, "detokenize": False}
        params = [params_class(max_tokens=length, **common) for length in lengths]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def run_vllm(path: str) -> dict[str, Any]:
    import vllm

    llm = vllm.LLM(
        model=path,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=MAX_MODEL_LEN,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
    )

    return {"version": vllm.__version__, **workloads(timed(llm, vllm.SamplingParams))}


def run_lamella(path: str) -> dict[str, Any]:
    import lamella
    from lamella import LLM, SamplingParams
    from lamella.bench.card import CostCard, measure_bandwidth
    from lamella.bench.workloads import Workload, check

    start = time.perf_counter()
    llm = LLM(
        path,
        load_format="dummy",
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
    )
    load = time.perf_counter() - start
    gap = check(llm, Workload(2, 300, 16))
    # Rounding is worth some hundredths, and more in many layers of random weights; a wrong token is worth about 3.
    assert gap < 0.3, f"tokens are {gap} nats less likely than a plain forward's"

    measured = workloads(timed(llm, SamplingParams))
    bandwidth = measure_bandwidth(llm.engine.device)
    floor = CostCard.of(llm.engine.model, bandwidth).floor_seconds(1, PROMPT_TOKENS + DECODE_TOKENS // 2) * 1e3
    return {
        "version": lamella.__version__,
        **measured,
        "load_s": round(load, 1),
        "bandwidth_gb_s": round(bandwidth / 1e9),
        "floor_ms": round(floor, 4),
        "check_logprob_gap": gap,
    }


def in_process(engine: str, name: str, python: str) -> dict[str, Any]:
    """One engine's figures for a shape, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config(name)))
        environment = os.environ | {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
        command = [python, __file__, "--worker", engine, folder]
        output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if output.returncode:
        sys.exit(f"{engine} on {name} ended with status {output.returncode}")
    return json.loads(output.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--canon", action="store_true", help="also the same shapes with canon layers")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--engines", nargs="+", choices=("lamella", "vllm"), default=["lamella", "vllm"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        engine, path = args.worker
        print(json.dumps({"lamella": run_lamella, "vllm": run_vllm}[engine](path)))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in args.shapes:
        runs = {}
        if "lamella" in args.engines:
            runs["lamella"] = in_process("lamella", name, sys.executable)
            if args.canon:
                runs["lamella, canon ABCD"] = in_process("lamella", f"{name}+canon", sys.executable)
        if "vllm" in args.engines:
            runs["vllm"] = in_process("vllm", name, args.vllm_python)
        results[name] = runs
        print_shape(name, runs)
    print(json.dumps({"benchmark": "gpu_vs_vllm", "results": results}))


def print_shape(name: str, runs: dict[str, dict[str, Any]]) -> None:
    first = runs.get("lamella")
    floor = f"floor {first['floor_ms']:.3f} ms a decode step at {first['bandwidth_gb_s']} GB/s" if first else ""
    print(f"\n{name}: {floor}")
    print(f"{'':22}{'decode b1, ms':>16}{'256 requests, tok/s':>22}{'prefill, tok/s':>18}")
    for engine, run in runs.items():
        print(f"{engine:22}{run['decode_b1_ms']:16.3f}{run['offline_tok_s']:22}{run['prefill_tok_s']:18}")
        if first and engine != "lamella":
            ratios = (
                run["decode_b1_ms"] / first["decode_b1_ms"],
                first["offline_tok_s"] / run["offline_tok_s"],
                first["prefill_tok_s"] / run["prefill_tok_s"],
            )
            print(
                f"{'  lamella is faster by':22}"
                + "".join(f"{r:{w}.2f}x" for r, w in zip(ratios, (15, 21, 17), strict=True))
            )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
