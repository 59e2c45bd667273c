"""The prefix cache: what a hit gains, what the cache costs where nothing hits, and vLLM beside it.

Two workloads, random tokens, greedy: `system` (requests that share a system prompt, one after another, and as one
batch, `system-batch`) and `chat` (conversations whose every prompt is the history with the answers), on a dense model
and on a Canon model, whose hits need copies of slot state besides pages. Random bf16 weights, written once.

    off      without the cache
    cold     with it, just emptied, and prompts that share nothing: what keeping it costs
    warm     with it; `system`: after other requests with the same system prompt have passed
    primed   with it; `system`: after the system prompt alone has passed

Engines run in processes of their own, in turn; an engine's variants take turns request by request. Of each request the
best of `--rounds` counts. The time to the first token (ttft) of `chat` is that of the later turns: the first ones have
nothing to hit. Before the timing, small float32 models must give the same tokens with the cache as without; after it,
one plain fp32 forward of the bf16 model scores tokens of each variant: rounding is worth some hundredths, a wrong token
about 3.

    python benchmarks/prefix.py --vllm-python /path/to/venv-with-vllm/bin/python

The cost card comes first, a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
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
SMALL = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"},
    "canon": {
        "architectures": ["LlamaCanonForCausalLM"],
        "model_type": "LlamaCanon",
        "canon_set": "ABCD",
        "qk_norm": True,
    },
}
PAGE = 16  # tokens, lamella's default
NUM_BLOCKS = 4096  # 2 GiB of pages of this shape, as much as vLLM's CPU build is given
SETTLE_SECONDS = 0.5  # until the last engine's threads have gone to sleep
PRIMERS = 2  # requests that pass before `warm`
COLD_GOAL = 0.03

Tokens = list[int]
# Whether to use the cache, prompts that are sent together, tokens to generate -> `first`, seconds to each prompt's
# first token, `total`, seconds to the end of the last, `tokens`, and `hit`, prompt tokens that were not computed.
Run = Callable[[bool, Sequence[Tokens], int], dict[str, Any]]

Seen = dict[str, list[tuple[Tokens, Tokens]]]  # prompts and what was chosen, by engine and variant


@dataclass(frozen=True)
class Variant:
    """A way to run a workload; `primer` is what passes before `system`'s requests."""

    name: str
    cached: bool
    shared: bool
    primer: str = ""


VARIANTS = (
    Variant("off", cached=False, shared=False),
    Variant("cold", cached=True, shared=False),
    Variant("warm", cached=True, shared=True, primer="requests"),
    Variant("primed", cached=True, shared=True, primer="system"),
)


@dataclass(frozen=True)
class Load:
    """Sizes of the workloads; lengths in tokens."""

    requests: int = 12
    system_len: int = 512
    user_len: int = 32
    conversations: int = 4
    turns: int = 4
    turn_len: int = 48
    output_len: int = 16
    vocab_size: int = SHAPE["vocab_size"]

    def system(self, run: Run, variant: Variant, together: bool) -> Iterator[dict[str, Any]]:
        """Give each answer; between them the caller may run something else."""
        draw = self._draw(f"system {together} {variant.name}")
        system = draw(self.system_len)
        if variant.primer == "requests":
            for _ in range(PRIMERS):
                run(True, [system + draw(self.user_len)], self.output_len)
        elif variant.primer == "system":
            run(True, [system + draw(1)], 1)  # a prompt's last token is never read from the cache
        prompts = [
            (system if variant.shared else draw(self.system_len)) + draw(self.user_len) for _ in range(self.requests)
        ]
        for some in [prompts] if together else [[prompt] for prompt in prompts]:
            yield run(variant.cached, some, self.output_len)

    def chat(self, run: Run, variant: Variant) -> Iterator[dict[str, Any]]:
        """The first turns of all conversations, then the second ones; unshared, each prompt is drawn anew."""
        draw = self._draw(f"chat {variant.name}")
        histories: list[Tokens] = [[] for _ in range(self.conversations)]
        for _ in range(self.turns):
            for history in histories:
                history += draw(self.turn_len)
                answer = run(variant.cached, [history if variant.shared else draw(len(history))], self.output_len)
                history += answer["tokens"][0]
                yield answer

    def workloads(self) -> dict[str, tuple[Callable[[Run, Variant], Iterator[dict[str, Any]]], list[Variant]]]:
        """Each with the variants that it has."""
        return {
            "system": (lambda run, variant: self.system(run, variant, together=False), list(VARIANTS)),
            "system-batch": (lambda run, variant: self.system(run, variant, together=True), list(VARIANTS)),
            "chat": (self.chat, [variant for variant in VARIANTS if variant.name != "primed"]),
        }

    def _draw(self, name: str) -> Callable[[int], Tokens]:
        rng = random.Random(name)
        return lambda count: [rng.randrange(self.vocab_size) for _ in range(count)]


# Engines


def start_lamella(path: str, device: str, modes: Sequence[bool], dtype: str = "auto") -> tuple[Run, Callable[[], None]]:
    """`Run`, and what empties the cache."""
    from lamella import LLM, SamplingParams

    def load(cached: bool) -> LLM:
        return LLM(path, device=device, dtype=dtype, enable_prefix_caching=cached, num_blocks=NUM_BLOCKS)

    llms = {cached: load(cached) for cached in modes}
    ids = itertools.count()

    def stream(llm: LLM, prompt: Tokens, params: SamplingParams) -> tuple[list[float], list[Tokens]]:
        outputs = llm.stream({"prompt_token_ids": prompt}, params)
        output = next(outputs)
        first = time.perf_counter()
        for output in outputs:  # noqa: B007 - the last one is wanted
            pass
        return [first], [output.outputs[0].token_ids]

    def batch(llm: LLM, prompts: Sequence[Tokens], params: SamplingParams) -> tuple[list[float], list[Tokens]]:
        engine = llm.engine
        jobs = [engine.make_job(f"batch{next(ids)}", {"prompt_token_ids": ids_}, params) for ids_ in prompts]
        for job in jobs:
            engine.add(job)
        times: dict[str, float] = {}
        while engine.has_work:
            for job in engine.step():
                times.setdefault(job.request_id, time.perf_counter())
        return [times[job.request_id] for job in jobs], [job.output().outputs[0].token_ids for job in jobs]

    def run(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        llm = llms[cached]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        before = llm.stats()["prefix_hit_tokens"]
        start = time.perf_counter()
        first, tokens = stream(llm, prompts[0], params) if len(prompts) == 1 else batch(llm, prompts, params)
        total = time.perf_counter() - start
        hit = llm.stats()["prefix_hit_tokens"] - before
        return {"first": [t - start for t in first], "total": total, "tokens": tokens, "hit": hit}

    def reset() -> None:
        for llm in llms.values():
            llm.reset_prefix_cache()

    return run, reset


def start_vllm(path: str, device: str, modes: Sequence[bool]) -> tuple[Run, Callable[[], None]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM, SamplingParams

    (cached,) = modes  # one to a process
    room: dict[str, Any] = {} if device == "cpu" else {"gpu_memory_utilization": 0.3}
    llm = LLM(path, skip_tokenizer_init=True, enable_prefix_caching=cached, enforce_eager=False, **room)
    engine, ids = llm.llm_engine, itertools.count()

    def run(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        names = [str(next(ids)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        first: dict[str, float] = {}
        ended: dict[str, Any] = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.outputs[0].token_ids:
                    first.setdefault(output.request_id, time.perf_counter() - start)
                if output.finished:
                    ended[output.request_id] = output
        total = time.perf_counter() - start
        tokens = [list(ended[name].outputs[0].token_ids) for name in names]
        hit = sum(output.num_cached_tokens or 0 for output in ended.values())
        return {"first": [first[name] for name in names], "total": total, "tokens": tokens, "hit": hit}

    def reset() -> None:
        llm.reset_prefix_cache()

    return run, reset


def worker(engine: str, path: str, device: str, modes: str) -> None:
    """Load an engine with the cache off, on or both, then do what each line of stdin asks for; JSON lines back."""
    # Engines talk on stdout; the answers go to the real one, everything else to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cached = [mode == "on" for mode in modes.split(",")]
    run, reset = {"lamella": start_lamella, "vllm": start_vllm}[engine](path, device, cached)
    for mode in cached:
        for length in (17, 600):
            run(mode, [[length] * length], 3)
        run(mode, [[n] * 40 for n in range(4)], 3)
    print(json.dumps({"ready": engine}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = run(*request) if request else reset()
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """An engine in a process of its own, which waits while others are timed."""

    def __init__(self, python: str, engine: str, path: str, device: str, modes: str) -> None:
        self.engine, self.modes = engine, modes.split(",")
        command = [python, __file__, "--worker", engine, path, device, modes]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def run(self, cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        return self._ask([cached, prompts, count])

    def reset(self) -> None:
        self._ask([])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, request: list[Any]) -> Any:
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended with status {self.process.wait()}")
        return json.loads(line)


# Checkpoints and correctness


def make_checkpoint(folder: Path, config: dict[str, Any], matrix_std: float | None = None) -> None:
    """The config and seeded random weights; `matrix_std` is that of every matrix, None leaves the models' own."""
    import torch
    from safetensors.torch import save_file

    from lamella import models
    from lamella.checkpoint.names import targets

    cls = getattr(models, config["architectures"][0])
    dtype = getattr(torch, config["torch_dtype"])
    torch.manual_seed(0)
    model = cls.from_config(config)
    if matrix_std is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" not in name and "canon" not in name:
                    parameter.normal_(0.0, matrix_std)
    named = targets(model, cls.checkpoint_names).items()
    tensors = {name: t.parameter[t.start : t.stop].detach().to(dtype).clone() for name, t in named}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def check_tokens(path: str, device: str) -> dict[str, int]:
    """With the cache every workload gives the tokens that it gives without, in float32; how many prompt tokens hit."""
    load = Load(requests=4, system_len=80, user_len=20, conversations=2, turns=3, turn_len=20, vocab_size=1000)
    run, reset = start_lamella(path, device, (False, True), "float32")

    def both(cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        answer, plain = run(cached, prompts, count), run(False, prompts, count)
        if answer["tokens"] != plain["tokens"]:
            raise AssertionError(f"{path}: other tokens with the prefix cache than without")
        return answer

    hits = {}
    for name, (session, variants) in load.workloads().items():
        reset()
        for variant in variants:
            hits[f"{name} {variant.name}"] = sum(answer["hit"] for answer in session(both, variant))
            assert variant.shared or not hits[f"{name} {variant.name}"], "prompts that share nothing hit"
    return hits


class Chosen:
    """A `Run` that remembers the first and the latest prompt of each variant, with what was chosen."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.kept: list[tuple[Tokens, Tokens]] = []

    def __call__(self, cached: bool, prompts: Sequence[Tokens], count: int) -> dict[str, Any]:
        answer = self.run(cached, prompts, count)
        self.kept[1:] = [(list(prompts[-1]), answer["tokens"][-1])]
        return answer


def score(path: str, chosen: Seen) -> dict[str, float]:
    """The worst gap, in logprob, between each engine's tokens and the best ones of one full fp32 forward."""
    import torch

    from lamella.checkpoint import load_model, open_checkpoint

    model = load_model(open_checkpoint(path), dtype="float32", device="cpu")
    gaps = {}
    for engine, pairs in chosen.items():
        gaps[engine] = 0.0
        for prompt, tokens in pairs:
            with torch.inference_mode():
                hidden = model(torch.tensor(prompt + tokens))[len(prompt) - 1 : -1]
                logprobs = model.compute_logits(hidden).log_softmax(-1)
            picked = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            gaps[engine] = max(gaps[engine], float((logprobs.amax(-1) - picked).max()))
    return gaps


# Costs


def measure_flops(device: str) -> float:
    """Operations per second of a bf16 matrix product as long prompts have it."""
    import torch

    x = torch.ones(512, SHAPE["hidden_size"], dtype=torch.bfloat16, device=device)
    weight = torch.ones(2 * SHAPE["intermediate_size"], SHAPE["hidden_size"], dtype=torch.bfloat16, device=device)

    def product() -> float:
        start = time.perf_counter()
        (x @ weight.T)[0, 0].item()  # waits for the device
        return time.perf_counter() - start

    product()
    return 2 * x.numel() * weight.shape[0] / min(product() for _ in range(50))


def costs(path: str, device: str, load: Load, rates: tuple[float, float]) -> dict[str, Any]:
    """Print and give the bytes of state, what hits save, and the least time of first tokens at the measured rates."""
    import torch

    from lamella.bench.card import CostCard
    from lamella.checkpoint import open_checkpoint
    from lamella.layers.local_kit import LocalKit

    bandwidth, flops = rates
    checkpoint = open_checkpoint(path)
    model = checkpoint.allocate(checkpoint.read_config(), LocalKit(torch.bfloat16, "meta"))
    card = CostCard.of(model, bandwidth)
    multiplied = card.parameters - SHAPE["vocab_size"] * SHAPE["hidden_size"]  # per prompt token; the head is for one

    def floor_ms(tokens: int) -> float:
        return max(2 * multiplied * tokens / flops, card.step_bytes / bandwidth) * 1e3

    prompt, saved = load.system_len + load.user_len, load.system_len // PAGE * PAGE
    page, snapshot = card.state.bytes_per_token * PAGE, card.state.bytes_per_request
    print(f"  weights read by a step {card.step_bytes / 1e6:.0f} MB, {card.step_bytes / bandwidth * 1e3:.1f} ms")
    print(f"  a page of {PAGE} tokens {page / 1e3:.0f} kB, a snapshot of slot state {snapshot / 1e3:.0f} kB")
    print(
        f"  system: a hit is {saved} of {prompt} prompt tokens, {2 * multiplied * saved / 1e9:.0f} GFLOP not computed, "
        f"{saved // PAGE} pages shared; least ttft {floor_ms(prompt):.0f} ms -> {floor_ms(prompt - saved):.0f} ms"
    )
    turn, answer = load.turn_len, load.output_len
    history = (load.turns - 1) * (turn + answer)
    known = max(0, history - 1) // PAGE * PAGE  # an answer's last token is nowhere computed
    print(
        f"  chat: the last turn hits {known} of {history + turn} prompt tokens; "
        f"least ttft {floor_ms(history + turn):.0f} ms -> {floor_ms(history + turn - known):.0f} ms"
    )
    return {
        **card.as_dict(),
        "gflops": round(flops / 1e9, 1),
        "page_bytes": page,
        "snapshot_bytes": snapshot,
        "system_hit_tokens": saved,
        "system_ttft_floor_ms": [round(floor_ms(prompt), 2), round(floor_ms(prompt - saved), 2)],
        "chat_last_turn_hit_tokens": known,
        "chat_last_turn_ttft_floor_ms": [
            round(floor_ms(history + turn), 2),
            round(floor_ms(history + turn - known), 2),
        ],
    }


# Timing


@dataclass
class Best:
    """Of one variant of a workload, the best seconds of each request and of each call over the rounds."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    all_totals: list[float] = field(default_factory=list)  # round after round
    hit: int = 0

    def take(self, answers: Sequence[dict[str, Any]]) -> None:
        first = [seconds for answer in answers for seconds in answer["first"]]
        total = [answer["total"] for answer in answers]
        self.first = [min(pair) for pair in zip(self.first, first, strict=True)] if self.first else first
        self.total = [min(pair) for pair in zip(self.total, total, strict=True)] if self.total else total
        self.all_totals += total
        self.hit = sum(answer["hit"] for answer in answers)


Key = tuple[str, str, str]  # workload, engine, variant


def measure(workers: Sequence[Worker], load: Load, rounds: int, seen: Seen) -> dict[Key, Best]:
    """The best by workload, engine and variant; into `seen` go some of the tokens that each of them chose."""
    best: dict[Key, Best] = {}
    for number in range(rounds):
        for (name, (session, variants)), each in itertools.product(load.workloads().items(), workers):
            time.sleep(SETTLE_SECONDS)
            each.reset()
            mine = [variant for variant in variants if ("on" if variant.cached else "off") in each.modes]
            runs = {variant.name: Chosen(each.run) for variant in mine}
            answers: dict[str, list[dict[str, Any]]] = {variant.name: [] for variant in mine}
            # Who comes first in a turn changes with the round.
            order = mine if number % 2 == 0 else mine[::-1]
            turns = {variant.name: session(runs[variant.name], variant) for variant in order}
            while turns:
                for variant_name, turn in list(turns.items()):
                    answer = next(turn, None)
                    if answer is None:
                        del turns[variant_name]
                    else:
                        answers[variant_name].append(answer)
            for variant in mine:
                best.setdefault((name, each.engine, variant.name), Best()).take(answers[variant.name])
                if number == 0:
                    seen.setdefault(f"{each.engine} {variant.name}", []).extend(runs[variant.name].kept)
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    return best


def rows_of(model: str, best: dict[Key, Best], load: Load) -> list[dict[str, Any]]:
    rows = []
    system = load.requests * (load.system_len + load.user_len)
    turn, answer = load.turn_len, load.output_len
    chat = load.conversations * sum(n * turn + (n - 1) * answer for n in range(1, load.turns + 1))
    for workload, engine, variant in sorted(best, key=_order):
        mine, off = best[workload, engine, variant], best[workload, engine, "off"]
        skip = load.conversations if workload == "chat" and load.turns > 1 else 0
        first, plain = mine.first[skip:], off.first[skip:]
        rows.append(
            {
                "model": model,
                "workload": workload,
                "engine": engine,
                "variant": variant,
                "ttft_ms": round(statistics.mean(first) * 1e3, 2),
                "ttft_p95_ms": round(_quantile(first, 0.95) * 1e3, 2),
                "total_s": round(sum(mine.total), 4),
                "hit_rate": round(mine.hit / (chat if workload == "chat" else system), 4),
                "ttft_gain": round(statistics.mean(plain) / statistics.mean(first), 3),
                "total_gain": round(sum(off.total) / sum(mine.total), 3),
                "pair_cost": round(_pair_cost(off, mine), 4),
            }
        )
    return rows


def _pair_cost(off: Best, mine: Best) -> float:
    """The median over all requests of all rounds of what the variant adds; lamella's pairs ran next to each other."""
    return statistics.median(b / a - 1 for a, b in zip(off.all_totals, mine.all_totals, strict=True))


def _order(key: Key) -> tuple[int, int, int]:
    workload, engine, variant = key
    names = [each.name for each in VARIANTS]
    return list(Load().workloads()).index(workload), ("lamella", "vllm").index(engine), names.index(variant)


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def report(rows: list[dict[str, Any]], gaps: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Print the table and what follows from it; the latter for the summary too."""
    by_key = {(row["model"], row["workload"], row["engine"], row["variant"]): row for row in rows}
    print(
        f"\n{'model':<7}{'workload':<14}{'engine':<9}{'variant':<8}{'ttft ms':>9}{'p95 ms':>9}{'total s':>9}{'hit':>7}"
        f"{'ttft gain':>11}{'total gain':>12}"
    )
    for row in rows:
        print(
            f"{row['model']:<7}{row['workload']:<14}{row['engine']:<9}{row['variant']:<8}{row['ttft_ms']:>9.1f}"
            f"{row['ttft_p95_ms']:>9.1f}{row['total_s']:>9.3f}{row['hit_rate']:>7.0%}{row['ttft_gain']:>10.2f}x"
            f"{row['total_gain']:>11.2f}x"
        )
    print()
    cold: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    for (model, workload, engine, variant), row in by_key.items():
        where = {"model": model, "workload": workload}
        if variant == "cold":
            off = by_key[model, workload, engine, "off"]
            cost, ttft = row["total_s"] / off["total_s"] - 1, row["ttft_ms"] / off["ttft_ms"] - 1
            pairs = row["pair_cost"]
            cold.append(
                {
                    **where,
                    "engine": engine,
                    "cold_cost": round(cost, 4),
                    "cold_cost_median_of_pairs": pairs,
                    "cold_ttft_cost": round(ttft, 4),
                }
            )
            goal = "" if engine != "lamella" else f"; goal {COLD_GOAL:.0%}: {'met' if cost <= COLD_GOAL else 'MISSED'}"
            print(
                f"cold cost, {model} {workload} {engine}: {cost:+.1%} of total time (median of pairs {pairs:+.1%}), "
                f"{ttft:+.1%} of ttft{goal}"
            )
    for (model, workload, engine, variant), row in by_key.items():
        peer = by_key.get((model, workload, "vllm", variant))
        if engine == "lamella" and peer:
            ttft, total = row["ttft_ms"] / peer["ttft_ms"], row["total_s"] / peer["total_s"]
            ratios.append({**where, "variant": variant, "ttft": round(ttft, 3), "total": round(total, 3)})
            print(f"lamella / vllm, {model} {workload} {variant}: ttft {ttft:.2f}, total {total:.2f}")
    for model, some in gaps.items():
        for name, gap in some.items():
            print(f"{model}, {name}: chosen tokens within {gap:.3f} logprob of the fp32 forward's best")
    return {"cold_cost": cold, "lamella_over_vllm": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", help="a Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    for size, value in asdict(Load()).items():
        if size != "vocab_size":
            parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", type=Path, help="a file for the last line")
    parser.add_argument("--worker", nargs=4, metavar=("ENGINE", "PATH", "DEVICE", "MODES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*args.worker)
        return
    load = Load(**{size: getattr(args, size) for size in asdict(Load()) if size != "vocab_size"})
    rows, cards, gaps, equal = [], {}, {}, {}
    with tempfile.TemporaryDirectory() as name:
        for model in args.models:
            small = str(Path(name, f"{model}-small"))
            make_checkpoint(Path(small), {**SHAPE, **MODELS[model], **SMALL, "torch_dtype": "float32"}, 0.06)
            equal[model] = check_tokens(small, args.device)
            print(f"{model}: float32 tokens with the cache equal those without; hits, in tokens: {equal[model]}")
            make_checkpoint(Path(name, model), {**SHAPE, **MODELS[model]})
        rates = measure_rates(args.device)
        for model in args.models:
            print(f"{model}:")
            cards[model] = costs(str(Path(name, model)), args.device, load, rates)
        for model in args.models:
            path = str(Path(name, model))
            workers = [Worker(sys.executable, "lamella", path, args.device, "off,on")]
            if args.vllm_python and model == "dense":  # vLLM has no Canon layers
                workers += [Worker(args.vllm_python, "vllm", path, args.device, mode) for mode in ("off", "on")]
            seen: Seen = {}
            best = measure(workers, load, args.rounds, seen)
            for each in workers:
                each.close()
            rows += rows_of(model, best, load)
            gaps[model] = score(path, seen)
    summary = {
        "benchmark": "prefix",
        "device": args.device,
        "rounds": args.rounds,
        "load": asdict(load),
        "shape": SHAPE,
        "vllm": bool(args.vllm_python),
        "cost": cards,
        "float32_tokens_equal": equal,
        "rows": rows,
        **report(rows, gaps),
        "logprob_gap": {model: {k: round(gap, 4) for k, gap in some.items()} for model, some in gaps.items()},
    }
    if not args.vllm_python:
        print("vLLM was left out; --vllm-python brings it in")
    worst = max(gap for some in gaps.values() for gap in some.values())
    assert worst < 0.5, f"wrong tokens were chosen: {gaps}"
    if args.json:
        args.json.write_text(json.dumps(summary) + "\n")
    print(json.dumps(summary))


def measure_rates(device: str) -> tuple[float, float]:
    """Bytes and operations per second."""
    import torch

    from lamella.bench.card import measure_bandwidth

    bandwidth, flops = measure_bandwidth(torch.device(device)), measure_flops(device)
    print(f"measured: reads {bandwidth / 1e9:.1f} GB/s, bf16 products {flops / 1e9:.0f} GFLOP/s")
    return bandwidth, flops


if __name__ == "__main__":
    main()
