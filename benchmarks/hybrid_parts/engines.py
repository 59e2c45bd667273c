"""Engines with one model: lamella, the plugin inside vLLM, and vLLM's own model.

Each function that `jobs.STARTS` names starts an engine and returns the function that measures it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.checkpoints import write_config
from common.timing import timed
from hybrid_parts.models import Values, model, vllm_values
from hybrid_parts.sizes import Sizes
from hybrid_parts.workloads import warm, workloads

CACHE_BYTES = 4 << 30  # of vLLM's cache: more than any of these workloads fills
GAP = 0.5  # nats; rounding is worth some hundredths, a wrong token about 3
# With experts, rounding may send a token to another expert. With this vocabulary, a wrong token is worth about 6.
SCOUT_GAP = 1.5

Measure = Callable[[], Values]


def hide_flashinfer(args: argparse.Namespace) -> None:
    """Make `import flashinfer` fail, unless the command line asks for it."""
    if not args.flashinfer:
        sys.modules["flashinfer"] = None  # type: ignore[assignment]


def start_lamella(values: Values, sizes: Sizes, args: argparse.Namespace, folder: Path, **options: Any) -> Any:
    """Start lamella with random weights, check its tokens, and warm it up.

    Args:
        values: the model's config.
        sizes: of the workloads.
        args: the command line.
        folder: for the config file.
        options: more arguments of `LLM`.
    """
    hide_flashinfer(args)
    from lamella import LLM, SamplingParams
    from lamella.bench.workloads import Workload, check

    small = {"num_blocks": 256} if args.tiny else {}
    llm = LLM(
        write_config(folder, values), load_format="dummy", dtype="bfloat16", device=args.device,
        max_model_len=sizes.length, max_num_seqs=sizes.most, max_num_batched_tokens=sizes.batched,
        enable_prefix_caching=False, **small, **options,
    )  # fmt: skip
    gap = check(llm, Workload(2, min(300, sizes.length // 2), 16))
    most = SCOUT_GAP if "num_local_experts" in values else GAP
    assert gap < most, f"tokens are {gap} nats less likely than a plain forward's"
    warm(timed(llm, SamplingParams), sizes)
    return llm


def floors(llm: Any, sizes: Sizes) -> Values:
    """Return the cost card, and the floors of decode steps in ms, under the engine's placement."""
    from lamella.bench.card import CostCard, measure_bandwidth

    card = CostCard.from_model(llm.engine.model, measure_bandwidth(llm.engine.device))
    context = sizes.prompt + sizes.decode // 2
    steps = {f"floor_b{batch}_ms": round(card.floor_seconds(batch, context) * 1e3, 4) for batch in sizes.batches}
    return {"card": card.as_dict(), **steps}


def lamella_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start lamella with a run's model, or with the hybrid that a supernet is compared with."""
    from lamella import SamplingParams

    llm = start_lamella(model("gdn" if run == "supernet" else run, sizes), sizes, args, folder)
    return lambda: {**workloads(timed(llm, SamplingParams), sizes), **floors(llm, sizes)}


def vllm_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start vLLM with its own nearest model."""
    if run == "gdn":
        from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM

        # This function sets up the balancing of experts, and raises an error for a model without experts.
        Qwen3NextForCausalLM.set_moe_parameters = lambda self: None
    return start_vllm(vllm_values(run, sizes), sizes, args, folder)


def plugin_engine(run: str, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start vLLM with a run's model by the plugin."""
    from lamella.vllm_plugin import register

    register()  # where the package is not installed, vLLM finds no entry point
    values = model(run, sizes)
    if run == "scout":
        values["architectures"] = ["LamellaLlama4ForCausalLM"]  # the plain name is vLLM's own
    return start_vllm(values, sizes, args, folder)


def start_vllm(values: Values, sizes: Sizes, args: argparse.Namespace, folder: Path) -> Measure:
    """Start vLLM with random weights of a model with this config, and warm it up."""
    import vllm

    options: dict[str, Any] = {"kv_cache_memory_bytes": 64 << 20 if args.tiny else CACHE_BYTES}
    if args.device != "cpu":
        graphs = [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= sizes.most]
        options |= {"gpu_memory_utilization": 0.1, "compilation_config": {"cudagraph_capture_sizes": graphs}}
    if args.gdn_prefill != "auto":
        options["additional_config"] = {"gdn_prefill_backend": args.gdn_prefill}
    llm = vllm.LLM(
        write_config(folder, values), load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True,
        max_model_len=sizes.length, max_num_seqs=sizes.most, max_num_batched_tokens=sizes.batched,
        enable_prefix_caching=False, mamba_ssm_cache_dtype="float32" if "num_experts" in values else "auto", **options,
    )  # fmt: skip
    run = timed(llm, vllm.SamplingParams)
    warm(run, sizes)
    return lambda: {**workloads(run, sizes), "version": vllm.__version__}
