"""Hybrids and supernets on one GPU: lamella's own engine, the plugin inside vLLM, and vLLM's nearest model of its own.

    python benchmarks/hybrids.py [--runs gdn kda mamba ops supernet] [--engines ENGINE ...] [--quick]
        [--vllm-python PYTHON] [--at-a-time N] [--flashinfer] [--gdn-prefill auto] [--logs FOLDER]

First the engine must be as exact as its reference on this device: teacher-forced log-probabilities of a small random
hybrid of all five mixers in bf16, whose error may be at most the noise floor's (`lamella.parity.compare`). Then, with
random bf16 weights, in processes of their own:

    gdn, kda    24 layers, three of the mixer and one of attention in turn, by `lamella`, `plugin` and `vllm`
    mamba       the same by `lamella` and `plugin`; vLLM has no such mixer
    scout       4 layers of Llama 4 Scout (21.6 GB: hidden 5120, 16 experts and a shared one of 8192, three layers that
                see chunks of 8192 and one that sees all), for contexts beyond a chunk, by `lamella`, `plugin`, `vllm`
    supernet    attention, sliding window, gdn and kda in each layer. `standalone`: gdn's model; `fixed`: the supernet
                with that placement, and how long a switch to another one takes, first and with its graphs kept;
                `mixed`: decodes of many requests, half of them under each of two placements without a mixer in common
    ops         what a decode step does with the state (convolution, delta rule, gated norm), within a graph over many
                layers' states, beside the time in which the bytes that must be moved can be

Decode: 128 tokens after prompts of 128, for 1 and for 64 requests, as the difference to one token. Prefill: 16 x 2048.
Best of three; `--quick` has half of the layers, fewer tokens, and best of two. The floor of a step is the time in which
its weights and its state can be moved at the bandwidth that a probe measures.

The processes of several engines start at the same time (`--at-a-time 1`: one after the other, so that kernels are tuned
in quiet); each then waits until all have started, and measures alone. One JSON line ends the output; the exit status
is 1 where a run has failed, which keeps none of the others from running.

What the models of vLLM's own have otherwise:

    gdn     Qwen3NextForCausalLM with dense MLPs (no experts; its bookkeeping of them, which insists on one, is
            skipped), without the attention's output gate, rotation of whole heads, and fp32 recurrent state. It norms
            each query and key head, and its norms multiply by 1 + weight. Prompts take its Triton chunks, unless
            `--gdn-prefill auto` leaves it to vLLM, which on Hopper compiles FlashInfer's kernels for minutes.
    kda     KimiLinearForCausalLM without experts. Its attention is latent (rank 512, 32 heads of 128 + 64, values of
            128: 26.4 M weights a layer), ours has 32 heads of 128 over 16 (25.2 M); neither rotates.

All of vLLM runs in the process that calls it (VLLM_ENABLE_V1_MULTIPROCESSING=0 unless that is set), with graphs for
powers of two. Prompts' attention in lamella is its own kernel: FlashInfer's compile for minutes on first use, and are
taken with `--flashinfer`.

`--device cpu --tiny` runs the same code with tiny shapes, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gpu_vs_vllm import Run, timed

RUNS = {
    "gdn": ("lamella", "plugin", "vllm"),
    "kda": ("lamella", "plugin", "vllm"),
    "mamba": ("lamella", "plugin"),
    "scout": ("lamella", "plugin", "vllm"),
    "ops": ("ops",),
    "supernet": ("standalone", "fixed", "mixed"),
}
START_LIMIT, MEASURE_LIMIT = 240, 120  # seconds
CACHE_BYTES = 4 << 30  # of vLLM's cache: more than any of these workloads fills
GAP = 0.5  # nats; rounding is worth some hundredths, a wrong token about 3
# With experts, rounding may send a token to another one; of this vocabulary, a wrong token is worth about 6.
SCOUT_GAP = 1.5
TABLE = 24  # width of the first column

Measure = Callable[[], dict[str, Any]]
Values = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Of models and workloads."""

    layers: int = 24
    hidden: int = 2048
    intermediate: int = 5632
    vocab: int = 32768
    heads: tuple[int, int, int] = (16, 2, 256)  # attention's query and key heads, and their size
    plain_heads: tuple[int, int, int] = (32, 16, 128)  # the same beside kda
    window: int = 512
    gdn: tuple[int, int, int] = (16, 32, 128)  # key and value heads, and their size
    kda: tuple[int, int] = (32, 128)
    latent: tuple[int, int, int, int] = (512, 128, 64, 128)  # rank, head sizes without and with rotation, of values
    mamba: tuple[int, int, int, int] = (16, 4096, 1024, 128)  # state, inner, key and value size, rank of the steps
    batches: tuple[int, ...] = (1, 64)
    prompt: int = 128
    decode: int = 128
    prefill: tuple[int, int] = (16, 2048)
    batched: int = 16384
    length: int = 2304
    rounds: int = 3
    op_batches: tuple[int, ...] = (1, 64, 256)
    op_bytes: int = 1 << 29  # of all layers' states

    @classmethod
    def of(cls, args: argparse.Namespace) -> Sizes:
        if args.tiny:
            return cls(
                layers=4, hidden=64, intermediate=96, vocab=512, heads=(4, 2, 32), plain_heads=(4, 2, 32), window=8,
                gdn=(2, 4, 64), kda=(4, 16), latent=(32, 16, 8, 16), mamba=(8, 64, 32, 4), batches=(1, 4), prompt=16,
                decode=8, prefill=(2, 64), batched=128, length=256, rounds=2, op_batches=(1, 4), op_bytes=1 << 16,
            )  # fmt: skip
        return cls(layers=12, decode=64, rounds=2) if args.quick else cls()

    def scout(self) -> Sizes:
        """The same workloads by a Llama 4, whose `window` is the chunk; contexts may be longer than that."""
        if self.hidden < 2048:
            return replace(self, window=128)
        shape = {"hidden": 5120, "intermediate": 8192, "vocab": 202048, "heads": (40, 8, 128), "window": 8192}
        return replace(self, layers=4, length=12288, **shape)

    @property
    def most(self) -> int:
        return max(self.batches)


# Models


def mixers(sizes: Sizes) -> dict[str, Values]:
    heads, groups, dim = sizes.heads
    plain_heads, plain_groups, plain_dim = sizes.plain_heads
    key_heads, value_heads, size = sizes.gdn
    kda_heads, kda_size = sizes.kda
    state, inner, narrow, rank = sizes.mamba
    rotary = {"type": "mistral_1d", "theta": 10000.0}
    attention = {"type": "attention", "heads": heads, "head_groups": groups, "head_size": dim, "rotary": rotary}
    return {
        "attention": attention,
        "sliding_window": {**attention, "type": "sliding_window", "window_size": sizes.window},
        "plain_attention": {
            "type": "attention",
            "heads": plain_heads,
            "head_groups": plain_groups,
            "head_size": plain_dim,
            "rotary": {"type": "none"},
        },
        "gdn": {
            "type": "gdn",
            "value_heads": value_heads,
            "key_heads": key_heads,
            "key_head_dim": size,
            "value_head_dim": size,
            "convolution_layer": {"kernel_size": 4},
        },
        "kda": {
            "type": "kda",
            "heads": kda_heads,
            "head_dim": kda_size,
            "convolution_layer": {"kernel_size": 4},
            "normalization": {"epsilon": 1e-5, "activation": "sigmoid"},
        },
        "mamba": {
            "type": "mamba",
            "state_size": state,
            "d_inner": inner,
            "d_xb": narrow,
            "dt_rank": rank,
            "d_conv": 4,
            "conv_bias": True,
            "dt_proj_bias": True,
        },
    }


def apriel2(sizes: Sizes, blocks: dict[str, Values], pattern: Sequence[str]) -> Values:
    """The config of a model whose layers have these mixers in turn."""
    mlp = {"type": "mlp", "intermediate_size": sizes.intermediate, "activation": "silu", "gated": True}
    norm = {"type": "rms_norm", "epsilon": 1e-5}
    named = {name: {"mixer": blocks[name], "mlp": mlp, "normalization": norm} for name in pattern}
    return {
        "architectures": ["Apriel2ForCausalLM"],
        "model_type": "apriel2_text",
        "hidden_size": sizes.hidden,
        "vocab_size": sizes.vocab,
        "decoder": {"type": "pattern", "num_blocks": sizes.layers, "pattern": list(pattern), "blocks": named},
        "embeddings": {"max_position_embeddings": 8192},
        "head": {"normalization": norm},
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def scout(sizes: Sizes) -> Values:
    """The config of a Llama 4 of few layers."""
    heads, groups, dim = sizes.heads
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "intermediate_size_mlp": 2 * sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": dim,
        "num_local_experts": 16,
        "num_experts_per_tok": 1,
        "attention_chunk_size": sizes.window,
        "no_rope_layers": [1, 1, 1, 0] * (sizes.layers // 4),
        "interleave_moe_layer_step": 1,
        "use_qk_norm": True,
        "rope_theta": 500000.0,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }


def model(run: str, sizes: Sizes) -> Values:
    """The config of a run."""
    return scout(sizes) if run == "scout" else hybrid(run, sizes)


def hybrid(run: str, sizes: Sizes) -> Values:
    attention = "plain_attention" if run == "kda" else "attention"
    return apriel2(sizes, mixers(sizes), [run] * 3 + [attention])


def supernet(sizes: Sizes) -> Values:
    known = mixers(sizes)
    choices = {name: known[name] for name in ("attention", "sliding_window", "gdn", "kda")}
    mixer = {"type": "stochastic", "main_mixer_name": "attention", "mixers": choices}
    return apriel2(sizes, {"any": mixer}, ["any"])


def placements(sizes: Sizes) -> tuple[list[str], list[str]]:
    """Two that differ in every layer; the first is gdn's hybrid."""
    count = sizes.layers // 4
    return ["gdn", "gdn", "gdn", "attention"] * count, ["kda", "kda", "kda", "sliding_window"] * count


def vllm_values(run: str, sizes: Sizes) -> Values:
    """The config of vLLM's own nearest model."""
    common = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.intermediate,
        "num_hidden_layers": sizes.layers,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    if run == "scout":
        return scout(sizes)
    if run == "gdn":
        heads, groups, dim = sizes.heads
        key_heads, value_heads, size = sizes.gdn
        return common | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "num_attention_heads": heads,
            "num_key_value_heads": groups,
            "head_dim": dim,
            "partial_rotary_factor": 1.0,
            "attn_output_gate": False,
            "linear_num_key_heads": key_heads,
            "linear_num_value_heads": value_heads,
            "linear_key_head_dim": size,
            "linear_value_head_dim": size,
            "linear_conv_kernel_dim": 4,
            "num_experts": 0,
        }
    rank, plain, rotated, values = sizes.latent
    kda_heads, kda_size = sizes.kda
    full = [layer for layer in range(1, sizes.layers + 1) if layer % 4 == 0]
    return common | {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "num_attention_heads": kda_heads,
        "num_key_value_heads": kda_heads,
        "model_max_length": 8192,
        "kv_lora_rank": rank,
        "q_lora_rank": None,
        "qk_nope_head_dim": plain,
        "qk_rope_head_dim": rotated,
        "v_head_dim": values,
        "mla_use_nope": True,
        "num_experts": None,
        "linear_attn_config": {
            "kda_layers": [layer for layer in range(1, sizes.layers + 1) if layer not in full],
            "full_attn_layers": full,
            "num_heads": kda_heads,
            "head_dim": kda_size,
            "short_conv_kernel_size": 4,
        },
    }


def write(values: Values, folder: Path) -> str:
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


# Workloads


def prompts(count: int, length: int, sizes: Sizes) -> list[list[int]]:
    rng = random.Random(count * length)
    return [[rng.randrange(sizes.vocab) for _ in range(length)] for _ in range(count)]


def decode_ms(run: Run, batch: int, sizes: Sizes) -> float:
    """Of a step with so many requests."""
    some = prompts(batch, sizes.prompt, sizes)
    long, short = (
        min(run(some, [count] * batch) for _ in range(sizes.rounds)) for count in (1 + sizes.decode, 1)
    )  # fmt: skip
    return round((long - short) / sizes.decode * 1e3, 4)


def workloads(run: Run, sizes: Sizes) -> Values:
    count, length = sizes.prefill
    some = prompts(count, length, sizes)
    seconds = min(run(some, [1] * count) for _ in range(sizes.rounds))
    decodes = {f"decode_b{batch}_ms": decode_ms(run, batch, sizes) for batch in sizes.batches}
    return {**decodes, "prefill_tok_s": round(count * length / seconds)}


def warm(run: Run, sizes: Sizes) -> None:
    """Whatever is compiled or tuned when it is first needed."""
    for batch, length, new in ((*sizes.prefill, 1), *((batch, sizes.prompt, 4) for batch in sizes.batches)):
        run(prompts(batch, length, sizes), [new] * batch)


# Engines. Each function starts one, and gives what measures.


def start_lamella(values: Values, sizes: Sizes, args: argparse.Namespace, folder: Path, **options: Any) -> Any:
    if not args.flashinfer:
        sys.modules["flashinfer"] = None  # type: ignore[assignment]
    from lamella import LLM, SamplingParams
    from lamella.bench.workloads import Workload, check

    small = {"num_blocks": 256} if args.tiny else {}
    llm = LLM(
        write(values, folder), load_format="dummy", dtype="bfloat16", device=args.device, max_model_len=sizes.length,
        max_num_seqs=sizes.most, max_num_batched_tokens=sizes.batched, enable_prefix_caching=False, **small, **options,
    )  # fmt: skip
    gap = check(llm, Workload(2, min(300, sizes.length // 2), 16))
    most = SCOUT_GAP if "num_local_experts" in values else GAP
    assert gap < most, f"tokens are {gap} nats less likely than a plain forward's"
    warm(timed(llm, SamplingParams), sizes)
    return llm


def floors(llm: Any, sizes: Sizes) -> Values:
    """Of decode steps, in ms, under the engine's placement."""
    from lamella.bench.card import CostCard, measure_bandwidth

    card = CostCard.of(llm.engine.model, measure_bandwidth(llm.engine.device))
    context = sizes.prompt + sizes.decode // 2
    steps = {f"floor_b{batch}_ms": round(card.floor_seconds(batch, context) * 1e3, 4) for batch in sizes.batches}
    return {"card": card.as_dict(), **steps}


def lamella_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    from lamella import SamplingParams

    llm = start_lamella(model("gdn" if run == "supernet" else run, sizes), sizes, args, folder)
    return lambda: {**workloads(timed(llm, SamplingParams), sizes), **floors(llm, sizes)}


def fixed_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    from lamella import SamplingParams

    first, second = placements(sizes)
    llm = start_lamella(supernet(sizes), sizes, args, folder, placement=first)

    def switch(placement: list[str]) -> float:
        start = time.perf_counter()
        llm.set_placement(placement)
        synchronize(args)
        return round(time.perf_counter() - start, 4)

    def measure() -> Values:
        result = {**workloads(timed(llm, SamplingParams), sizes), **floors(llm, sizes)}
        order = {"first": second, "back": first, "again": second}
        return result | {f"switch_{name}_s": switch(placement) for name, placement in order.items()}

    return measure


def mixed_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    from lamella import SamplingParams

    first, second = placements(sizes)
    options = {"placement": first, "mixed_placements": True}
    llm = start_lamella(supernet(sizes), sizes, args, folder, **options)
    half = sizes.most // 2

    def decode(*own: list[str] | None) -> float:
        def run(some: Sequence[Sequence[int]], lengths: Sequence[int]) -> float:
            params = [
                SamplingParams(max_tokens=length, temperature=0.6, ignore_eos=True, detokenize=False, placement=placed)
                for length, placed in zip(lengths, own, strict=True)
            ]
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": list(prompt)} for prompt in some], params, use_tqdm=False)
            return time.perf_counter() - start

        run(prompts(sizes.most, sizes.prompt, sizes), [2] * sizes.most)
        return decode_ms(run, sizes.most, sizes)

    def measure() -> Values:
        both = [first, second]
        result = {
            "first_ms": decode(*[None] * sizes.most),
            "mixed_ms": decode(*both * half),
            "second_ms": decode(*[second] * sizes.most),
            **mixed_floors(llm, both, sizes),
        }
        llm.engine.runner.drop_graphs()
        return result | {
            "mixed_without_graphs_ms": decode(*both * half),
            "second_without_graphs_ms": decode(*[second] * sizes.most),
        }

    return measure


def mixed_floors(llm: Any, both: Sequence[list[str]], sizes: Sizes) -> Values:
    """Of a step of all requests, in ms, under each placement, and with half of the requests under each."""
    from lamella.bench.card import CostCard, measure_bandwidth
    from lamella.config import read_placement
    from lamella.layers.supernet.placing import activate, active_placement, idle_parameters

    model, bandwidth = llm.engine.model, measure_bandwidth(llm.engine.device)
    before, context = active_placement(model), sizes.prompt + sizes.decode // 2
    cards, idle = [], []
    for placement in both:
        activate(model, read_placement(placement, model.config))
        cards.append(CostCard.of(model, bandwidth))
        idle.append({parameter: parameter.nbytes for parameter in idle_parameters(model)})
    activate(model, before)
    alone = [card.floor_seconds(sizes.most, context) for card in cards]
    more = sum(nbytes for parameter, nbytes in idle[0].items() if parameter not in idle[1])
    state = sum(card.decode_bytes(sizes.most, context) - card.step_bytes for card in cards) / 2
    together = (cards[0].step_bytes + more + state) / bandwidth
    names = ("floor_first_ms", "floor_second_ms", "floor_mixed_ms")
    times = (round(seconds * 1e3, 4) for seconds in (*alone, together))
    return {"card": cards[0].as_dict(), **dict(zip(names, times, strict=True))}


def vllm_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    if run == "gdn":
        from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM

        # It keeps books on experts for balancing them, and takes a model without any for an error.
        Qwen3NextForCausalLM.set_moe_parameters = lambda self: None
    return start_vllm(vllm_values(run, sizes), sizes, args, folder)


def plugin_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    from lamella.vllm_plugin import register

    register()  # where the package is not installed, vLLM finds no entry point
    values = model(run, sizes)
    if run == "scout":
        values["architectures"] = ["LamellaLlama4ForCausalLM"]  # the plain name is vLLM's own
    return start_vllm(values, sizes, args, folder)


def start_vllm(values: Values, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    import vllm

    options: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20 if args.tiny else CACHE_BYTES}
    if args.device != "cpu":
        graphs = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= sizes.most]
        options |= {"gpu_memory_utilization": 0.1, "compilation_config": {"cudagraph_capture_sizes": graphs}}
    if args.gdn_prefill != "auto":
        options["additional_config"] = {"gdn_prefill_backend": args.gdn_prefill}
    llm = vllm.LLM(
        write(values, folder), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True,
        max_model_len=sizes.length, max_num_seqs=sizes.most, max_num_batched_tokens=sizes.batched,
        enable_prefix_caching=False, mamba_ssm_cache_dtype="float32" if "num_experts" in values else "auto", **options,
    )  # fmt: skip
    run = timed(llm, vllm.SamplingParams)
    warm(run, sizes)
    return lambda: {**workloads(run, sizes), "version": vllm.__version__}


def synchronize(args: argparse.Namespace) -> None:
    import torch

    if args.device != "cpu":
        torch.cuda.synchronize()


# The engine against its reference


def parity(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Of a small hybrid; done when it has started."""
    if not args.flashinfer:
        sys.modules["flashinfer"] = None  # type: ignore[assignment]
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
    """A random checkpoint with all five mixers."""
    import torch
    from safetensors.torch import save_file

    from lamella.checkpoint.names import targets
    from lamella.models import Apriel2ForCausalLM

    sizes = Sizes(
        layers=5, hidden=256, intermediate=512, vocab=1000, heads=(4, 2, 64), plain_heads=(4, 2, 64), window=40,
        gdn=(2, 4, 64), kda=(4, 64), mamba=(16, 512, 128, 16),
    )  # fmt: skip
    values = apriel2(sizes, mixers(sizes), ["attention", "gdn", "kda", "mamba", "sliding_window"])
    torch.manual_seed(seed)
    model = Apriel2ForCausalLM.from_config(values)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif parameter.dim() == 2 and "A_log" not in name:
                parameter.mul_(3)  # large enough that every part matters to the output
    named = targets(model, model.checkpoint_names).items()
    tensors = {name: t.parameter[t.start : t.stop].detach().contiguous().clone() for name, t in named}
    save_file(tensors, folder / "model.safetensors")
    write(values, folder)


# Operations


def ops(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    import torch

    with torch.inference_mode():
        for name in ("gdn", "kda"):
            check_core(Core(name, sizes, 2, 4, args.device))

    def measure() -> Values:
        from lamella.bench.card import measure_bandwidth

        bandwidth = measure_bandwidth(torch.device(args.device))
        with torch.inference_mode():
            rows = [time_core(name, batch, sizes, args.device, bandwidth) for name in ("gdn", "kda")
                    for batch in sizes.op_batches]  # fmt: skip
        return {"bandwidth_gb_s": round(bandwidth / 1e9), "rows": rows}

    return measure


class Core:
    """What the mixers of several layers compute over their state in a step of `batch` decodes."""

    def __init__(self, name: str, sizes: Sizes, layers: int, batch: int, device: str) -> None:
        import torch

        from lamella.config.hf_config import HFConfig
        from lamella.layers.build import build
        from lamella.layers.context import ForwardBatch
        from lamella.layers.local_kit import LocalKit
        from lamella.models import Apriel2ForCausalLM
        from lamella.models.base import initialize
        from lamella.ops.ragged import RaggedBatch

        # The projections around it are none of its business: they are narrow.
        values = apriel2(sizes, mixers(sizes), [name]) | {"hidden_size": 16}
        config = Apriel2ForCausalLM.read_config(HFConfig(values)).layers[0].mixer
        kit = LocalKit(torch.bfloat16, device)
        self.mixers: list[Any] = [build(config, kit, 16, f"{index}", None) for index in range(layers)]
        for mixer in self.mixers:
            initialize(mixer)
            specs = mixer.history.holder.specs
            mixer.history.holder.bind(
                *(torch.randn(batch, *spec.shape, device=device).to(spec.dtype) for spec in specs)
            )
        first = self.mixers[0]
        widths = [sum(first.sizes)] + ([first.config.size] * 2 if name == "kda" else [])  # decay and gate
        self.name, self.batch = name, batch
        self.inputs = [torch.randn(batch, width, device=device).to(torch.bfloat16) for width in widths]
        slots = torch.randperm(batch, device=device)
        self.step = ForwardBatch(RaggedBatch.from_lengths([1] * batch, [9] * batch, device), {}, slots)

    def __call__(self) -> list[Any]:
        from lamella.layers.context import forward_batch

        with forward_batch(self.step):
            return [mixer.core(*self.inputs, None) for mixer in self.mixers]

    @property
    def nbytes(self) -> int:
        """Of one layer: inputs, state in and out, weights, the output."""
        mixer = self.mixers[0]
        state = sum(spec.bytes_per_request for spec in mixer.history.holder.specs)
        weights = (mixer.convolution.weight, mixer.A_log, mixer.dt_bias, mixer.norm.weight)
        out = 2 * self.batch * (mixer.config.value_size if self.name == "gdn" else mixer.config.size)
        return sum(t.nbytes for t in (*self.inputs, *weights)) + 2 * self.batch * state + out


def check_core(core: Core) -> None:
    """Against plain torch, output and state."""
    from lamella.ops.backend import portable_only

    holder = core.mixers[0].history.holder
    before = [rows.clone() for rows in holder.rows]
    found = [core()[0], *(rows.clone() for rows in holder.rows)]
    holder.bind(*before)
    with portable_only():
        expected = [core()[0], *holder.rows]
    for ours, truth in zip(found, expected, strict=True):
        error = float((ours.float() - truth.float()).abs().max() / truth.float().abs().max())
        assert error < 5e-2, f"{core.name}: off by {error:.1e}"


def time_core(name: str, batch: int, sizes: Sizes, device: str, bandwidth: float) -> Values:
    from recurrent_ops import seconds

    each = Core(name, sizes, 1, batch, device).nbytes
    core = Core(name, sizes, max(2, min(64, -(-sizes.op_bytes // each))), batch, device)
    us = seconds(core, graph=True) / len(core.mixers) * 1e6
    floor = core.nbytes / bandwidth * 1e6
    return {
        "op": name, "batch": batch, "layers": len(core.mixers), "us": round(us, 2), "floor_us": round(floor, 2),
        "mbytes": round(core.nbytes / 1e6, 3), "of_floor": round(floor / us, 3),
    }  # fmt: skip


# Processes

STARTS: dict[str, Callable[[str, Sizes, argparse.Namespace, Path], Measure]] = {
    "parity": parity,
    "lamella": lamella_engine,
    "standalone": lamella_engine,
    "fixed": fixed_engine,
    "mixed": mixed_engine,
    "plugin": plugin_engine,
    "vllm": vllm_engine,
    "ops": ops,
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def work(run: str, engine: str, folder: Path, args: argparse.Namespace) -> None:
    """A worker: it starts, says so, waits for its turn, measures, and leaves its result."""
    begin, parent = time.perf_counter(), os.getppid()
    try:
        sizes = Sizes.of(args)
        measure = STARTS[engine](run, sizes.scout() if run == "scout" else sizes, args, folder)
        started = round(time.perf_counter() - begin, 1)
        (folder / "ready").touch()
        while not (folder / "go").exists():
            if os.getppid() != parent:
                os._exit(1)
            time.sleep(0.02)
        result = {**measure(), "start_s": started}
    except BaseException as error:
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]}
    (folder / "result.tmp").write_text(json.dumps(result))
    (folder / "result.tmp").rename(folder / "result.json")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # engines are in no hurry to end


@dataclass
class Worker:
    """A process of ours, and the folder through which it is talked to."""

    run: str
    engine: str
    folder: Path
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, run: str, engine: str, folder: Path, args: argparse.Namespace) -> Worker:
        folder.mkdir(parents=True)
        python = args.vllm_python if engine in ("plugin", "vllm") else sys.executable
        command = [python, __file__, "--worker", run, engine, str(folder), *forwarded(args)]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, env=ENVIRONMENT | cpu_environment(args) | os.environ, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        return cls(run, engine, folder, process)

    @property
    def name(self) -> str:
        return f"{self.run}/{self.engine}"

    def wait_for(self, what: str, limit: float) -> bool:
        """Until the worker has left this file; false where it has ended, or taken longer than `limit` seconds."""
        end = time.monotonic() + limit
        while time.monotonic() < end:
            ended = self.process.poll() is not None
            if (self.folder / what).exists():
                return True
            if ended or (self.folder / "result.json").exists():
                return False
            time.sleep(0.02)
        return False

    def measure(self) -> Values:
        """Its result, once it has had its turn."""
        (self.folder / "go").touch()
        self.wait_for("result.json", MEASURE_LIMIT)
        return self.result()

    def result(self) -> Values:
        path = self.folder / "result.json"
        if path.exists():
            result = json.loads(path.read_text())
        elif self.process.poll() is None:
            result = {"error": "took too long"}
        else:
            result = {"error": f"ended with status {self.process.returncode}"}
        if "error" in result:
            lines = (self.folder / "log").read_text(errors="replace").splitlines()
            say(f"{self.name} failed; its last lines:", *lines[-25:])
        return result

    def stop(self) -> None:
        """End it and whatever it has started."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5 if (self.folder / "result.json").exists() else 0)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def forwarded(args: argparse.Namespace) -> list[str]:
    flags = [f"--{name}" for name in ("quick", "tiny", "flashinfer") if getattr(args, name)]
    return [*flags, "--device", args.device, "--gdn-prefill", args.gdn_prefill]


def cpu_environment(args: argparse.Namespace) -> dict[str, str]:
    return {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_CI_ENV": "1"} if args.device == "cpu" else {}


def say(*lines: str) -> None:
    print(*lines, sep="\n    ", file=sys.stderr, flush=True)


def batches(jobs: Sequence[tuple[str, str]], count: int) -> Iterator[list[tuple[str, str]]]:
    """So many at a time, in order; supernets, which take all memory that is free, one by one."""
    some: list[tuple[str, str]] = []
    for job in jobs:
        if some and (job[0] == "supernet" or some[-1][0] == "supernet" or len(some) == count):
            yield some
            some = []
        some.append(job)
    yield some


def execute(jobs: Sequence[tuple[str, str]], args: argparse.Namespace, home: Path) -> Iterator[tuple[str, str, Values]]:
    """Jobs that start together; the result of each."""
    with ExitStack() as stack:
        workers = []
        for run, engine in jobs:
            workers.append(Worker.start(run, engine, home / f"{run}-{engine}", args))
            stack.callback(workers[-1].stop)
        begin = time.monotonic()
        ready = [worker.wait_for("ready", begin + START_LIMIT - time.monotonic()) for worker in workers]
        for worker, started in zip(workers, ready, strict=True):
            if not started:
                worker.stop()
        say(f"{', '.join(w.name for w in workers)}: started after {time.monotonic() - begin:.0f} s")
        for worker, started in zip(workers, ready, strict=True):
            begin = time.monotonic()
            result = worker.measure() if started else worker.result()
            worker.stop()
            say(f"{worker.name}: {result.get('error', f'measured in {time.monotonic() - begin:.1f} s')}")
            yield worker.run, worker.engine, result


# Tables


def print_run(run: str, results: dict[str, Values], sizes: Sizes) -> None:
    print(f"\n{run}")
    for engine, result in results.items():
        if "error" in result:
            print(f"{engine:{TABLE}}FAILED: {result['error']}")
    right = {engine: result for engine, result in results.items() if "error" not in result}
    if run == "parity":
        for result in right.values():
            print(
                f"rms error {result['ratio']} times the noise floor's, 99.9th percentile {result['p999_ratio']} times"
            )
    elif run == "ops":
        print_ops(right)
    else:
        print_engines({engine: result for engine, result in right.items() if engine != "mixed"}, sizes)
        print_placements(right, sizes)
    sys.stdout.flush()


def print_engines(results: dict[str, Values], sizes: Sizes) -> None:
    if not results:
        return
    keys = [*(f"decode_b{batch}_ms" for batch in sizes.batches), "prefill_tok_s"]
    first = next(iter(results))
    own = results[first] if "card" in results[first] else {}
    if own:
        steps = ", ".join(f"{own[f'floor_b{batch}_ms']:.3f} ms at {batch}" for batch in sizes.batches)
        print(f"{own['card']['parameters'] / 1e9:.2f} B parameters; floor of a decode step at "
              f"{own['card']['bandwidth_gb_s']:.0f} GB/s: {steps}")  # fmt: skip
    heads = [*(f"decode b{batch}, ms" for batch in sizes.batches), "prefill, tok/s", "start, s"]
    print(f"{'':{TABLE}}" + "".join(f"{head:>18}" for head in heads))
    for engine, result in results.items():
        cells = []
        for key in keys:
            floor = own.get(key.replace("decode", "floor")) if key.startswith("decode") else None
            share = f" ({100 * floor / result[key]:.0f} %)" if floor else ""
            cells.append(f"{result[key]:{18 - len(share)}}{share}")
        print(f"{engine:{TABLE}}" + "".join(cells) + f"{result['start_s']:18}")
        if engine != first:
            ratios = compared(results[first], result, keys)
            print(f"{f'  {first} is faster by':{TABLE}}" + "".join(f"{ratio:17.2f}x" for ratio in ratios.values()))


def compared(first: Values, other: Values, keys: Sequence[str]) -> dict[str, float]:
    """How many times as fast the first is."""
    return {
        key: round(first[key] / other[key] if key.endswith("tok_s") else other[key] / first[key], 3) for key in keys
    }


def print_placements(results: dict[str, Values], sizes: Sizes) -> None:
    if "fixed" in results:
        switches = (results["fixed"][f"switch_{name}_s"] for name in ("first", "back", "again"))
        print("switch of the placement: {:.3f} s at first, back {:.4f} s, again {:.4f} s".format(*switches))
    if "mixed" in results:
        mixed = results["mixed"]
        print(f"decode of {sizes.most} requests, ms a step (floor):")
        for name in ("first", "second", "mixed"):
            print(f"{'  ' + name:{TABLE}}{mixed[f'{name}_ms']:12.3f} ({mixed[f'floor_{name}_ms']:.3f})")
        for name in ("second", "mixed"):
            print(f"{f'  {name}, no graphs':{TABLE}}{mixed[f'{name}_without_graphs_ms']:12.3f}")
        print(f"{'  mixed / one placement':{TABLE}}{mixed_price(mixed):12.2f}x")


def mixed_price(mixed: Values) -> float:
    return round(mixed["mixed_ms"] / statistics.mean((mixed["first_ms"], mixed["second_ms"])), 3)


def print_ops(results: dict[str, Values]) -> None:
    for result in results.values():
        print(f"one layer's step over its state; floor at {result['bandwidth_gb_s']} GB/s")
        for row in result["rows"]:
            print(f"{row['op']:6}{row['batch']:5} requests{row['us']:10.2f} us, floor {row['floor_us']:9.2f} "
                  f"({100 * row['of_floor']:.0f} %)")  # fmt: skip


def ratios(results: dict[str, dict[str, Values]], sizes: Sizes) -> dict[str, Any]:
    """What is compared within the run."""
    keys = [*(f"decode_b{batch}_ms" for batch in sizes.batches), "prefill_tok_s"]
    found: dict[str, Any] = {}
    for run, engines in results.items():
        right = {engine: result for engine, result in engines.items() if all(key in result for key in keys)}
        first = RUNS.get(run, ("",))[0]
        for engine, result in right.items():
            if engine != first and first in right:
                found[f"{run}: {first} over {engine}"] = compared(right[first], result, keys)
    mixed = results.get("supernet", {}).get("mixed", {})
    if "mixed_ms" in mixed:
        found["supernet: mixed over one placement"] = mixed_price(mixed)
    return found


def versions() -> dict[str, str]:
    """Of what is installed beside this interpreter."""
    found = {}
    for name in ("torch", "triton", "fla-core", "vllm", "flashinfer-python"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(args: argparse.Namespace) -> str:
    import torch

    return torch.cuda.get_device_name() if args.device != "cpu" else "CPU"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--engines", nargs="+", choices=STARTS, default=list(STARTS), help="only these of each run")
    parser.add_argument("--quick", action="store_true", help="half of the work")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, whose times say nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter that has vLLM")
    parser.add_argument("--at-a-time", type=int, default=5, help="engines that start at the same time")
    parser.add_argument("--flashinfer", action="store_true", help="lamella's prompts by FlashInfer")
    parser.add_argument("--gdn-prefill", choices=("triton", "auto"), default="triton", help="of vLLM's gdn")
    parser.add_argument("--logs", type=Path, help="keep what the engines say in this folder")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.logs and args.logs.exists() and any(args.logs.iterdir()) and not args.worker:
        parser.error(f"--logs {args.logs}: is not empty")
    if shutil.which(args.vllm_python) is None:
        parser.error(f"--vllm-python {args.vllm_python}: there is no such program")
    return args


def main() -> None:
    args = parse()
    if args.worker:
        run, engine, folder = args.worker
        work(run, engine, Path(folder), args)
    sizes, begin = Sizes.of(args), time.monotonic()
    jobs = [("parity", "parity")]
    jobs += [(run, engine) for run in RUNS if run in args.runs for engine in RUNS[run] if engine in args.engines]
    results: dict[str, dict[str, Values]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        home = (args.logs or Path(temporary)).resolve()
        missing = {run: sum(job[0] == run for job in jobs) for run, _ in jobs}
        for some in batches(jobs, max(1, args.at_a_time)):
            for run, engine, result in execute(some, args, home):
                results.setdefault(run, {})[engine] = result
                if len(results[run]) == missing[run]:
                    print_run(run, results[run], sizes)
    failed = [f"{run}/{engine}" for run, each in results.items() for engine, r in each.items() if "error" in r]
    summary = {
        "benchmark": "hybrids",
        "device": device_name(args),
        "versions": versions(),
        "seconds": round(time.monotonic() - begin),
        "layers": sizes.layers,
        "failed": failed,
        "ratios": ratios(results, sizes),
        "results": results,
    }
    print(json.dumps(summary))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
