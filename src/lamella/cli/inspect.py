"""`lamella inspect`: show the layers and the cost card of a model, or the cost of compiling it. Reads no weights."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from functools import singledispatch
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.tree import Tree

from lamella.bench.card import CostCard, measure_bandwidth
from lamella.bench.compile import LIMIT, SIZES, CompileCost, compile_costs
from lamella.checkpoint.files import Checkpoint, open_checkpoint
from lamella.checkpoint.loader import resolve_dtype
from lamella.cli.common import console, print_json, size
from lamella.config import (
    AttentionConfig,
    CanonConfig,
    FeedForwardConfig,
    GatedDeltaNetConfig,
    KimiDeltaConfig,
    LayerConfig,
    MambaConfig,
    MLPConfig,
    ModelConfig,
    PlacementLike,
    RopeConfig,
    StochasticConfig,
    read_placement,
)
from lamella.errors import ParameterError
from lamella.layers.decoder import LanguageModel
from lamella.layers.local_kit import LocalKit
from lamella.layers.supernet.placing import activate

BATCHES = (1, 16, 64)


def run(args: argparse.Namespace) -> int:
    """Show a model; return the exit status."""
    if args.compile:
        return _compile(args)
    if args.layers:
        raise ParameterError("--layers: only with --compile")
    checkpoint = open_checkpoint(args.model, args.hf_overrides)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    card = cost_card(checkpoint, args.dtype, measure_bandwidth(device), args.placement)
    config = checkpoint.read_config()
    if args.json:
        print_json(
            {
                "architecture": config.architecture,
                "layers": [" -> ".join(describe(layer)) for layer in config.layers],
                **card.as_dict(),
                "context": args.context,
                "floor_ms": {batch: round(card.floor_seconds(batch, args.context) * 1e3, 4) for batch in BATCHES},
            }
        )
    else:
        show(console, config, card, args.context)
    return 0


def _compile(args: argparse.Namespace) -> int:
    """Measure and show the cost of compiling; return exit status 1 if a compiled form computes wrong values."""
    costs = []
    for cost in compile_costs(args.model, args.layers, args.placement, args.hf_overrides):
        costs.append(cost)
        if not args.json:
            console.print(f"[dim]{cost.layers} layers, {cost.form}: {cost.cpu_seconds} s[/dim]")
    if args.json:
        print_json({"steps": SIZES, "compile": [asdict(cost) for cost in costs]})
    else:
        console.print(compile_table(costs))
        for cost in costs:
            for reason, count in Counter(cost.recompiles).items():
                console.print(f"{cost.layers} layers, {cost.form}, {count} x {reason}", markup=False)
    return 0 if all(cost.is_right for cost in costs) else 1


def compile_table(costs: Sequence[CompileCost]) -> Table:
    """Return a table with one row per form and depth."""
    title = f"compiling, then steps of {', '.join(map(str, SIZES))} tokens"
    table = Table("layers", "form", "graphs", "recompiles", "CPU s", "max error", "", title=title)
    for cost in costs:
        remarks = ["limit hit: rest runs eagerly"] * cost.gave_up + [f"WRONG: above {LIMIT}"] * (not cost.is_right)
        figures = (cost.graphs, len(cost.recompiles), cost.cpu_seconds, f"{cost.difference:.1e}")
        table.add_row(str(cost.layers), cost.form, *map(str, figures), ", ".join(remarks))
    return table


def cost_card(
    checkpoint: Checkpoint, dtype: str, bandwidth: float | None, placement: PlacementLike | None = None
) -> CostCard:
    """Return the cost card of a checkpoint's model, from its config alone.

    Args:
        checkpoint: of the model.
        dtype: of the weights; "auto": the checkpoint's.
        bandwidth: measured memory bandwidth in bytes per second; None: no times.
        placement: for a supernet, the active mixers; None: the checkpoint's.
    """
    kit = LocalKit(resolve_dtype(checkpoint, dtype), "meta")
    model: LanguageModel = checkpoint.allocate(checkpoint.read_config(), kit)
    activate(model, read_placement(placement, model.config))
    return CostCard.from_model(model, bandwidth)


def show(console: Console, config: ModelConfig, card: CostCard, context: int) -> None:
    """Print the layers as a tree and a table, and the cost card."""
    console.print(picture(config))
    console.print(layer_table(config))
    console.print(card_table(card, context))


def describe(layer: LayerConfig) -> list[str]:
    """Return the operations of a layer in order of computation."""
    feed_forward = layer.feed_forward
    return [
        _norm(layer),
        *_canon("canon A", layer.mixer_canon),
        describe_mixer(layer.mixer),
        *_canon("canon B on q,k,v", getattr(layer.mixer, "canon", None)),
        f"+ residual, {_norm(layer)}",
        *_canon("canon C", layer.feed_forward_canon),
        _feed_forward(feed_forward),
        *_canon("canon D on gate,up", feed_forward.canon),
        "+ residual",
    ]


def _norm(layer: LayerConfig) -> str:
    return "norm" if layer.norm.kind == "rms" else "layer norm"


def _mlp(mlp: MLPConfig) -> str:
    kind = "" if mlp.is_swiglu else f" {'gated ' if mlp.gated else ''}{mlp.activation}"
    return f"MLP {mlp.intermediate_size}{kind}"


@singledispatch
def describe_mixer(mixer: Any) -> str:
    """Return a description of a mixer in one line; for an unknown mixer, the name of its config."""
    return type(mixer).__name__.removesuffix("Config")


@describe_mixer.register
def _gated_delta_net(mixer: GatedDeltaNetConfig) -> str:
    shape = f"{mixer.value_heads} x {mixer.key_head_dim} x {mixer.value_head_dim}"
    return f"gated delta net {shape}, {mixer.key_heads} key heads, conv {mixer.kernel}"


@describe_mixer.register
def _kimi_delta(mixer: KimiDeltaConfig) -> str:
    shape = f"{mixer.num_heads} x {mixer.head_dim} x {mixer.head_dim}"
    return f"Kimi delta attention {shape}, {mixer.gate} gate, conv {mixer.kernel}"


@describe_mixer.register
def _mamba(mixer: MambaConfig) -> str:
    return (
        f"mamba {mixer.inner_size} x {mixer.state_size}, {mixer.kv_heads} of {mixer.heads} heads, conv {mixer.kernel}"
    )


@describe_mixer.register
def _stochastic(mixer: StochasticConfig) -> str:
    each = (f"{name}{' (main)' if name == mixer.main else ''}: {describe_mixer(sub)}" for name, sub in mixer.mixers)
    return "one of " + "; ".join(each)


@describe_mixer.register
def _attention(mixer: AttentionConfig) -> str:
    text = f"attention {mixer.num_heads}q/{mixer.num_kv_heads}kv x {mixer.head_dim}"
    text += f", {_rope(mixer.rope, mixer.head_dim)}"
    if mixer.qk_norm:
        text += f", qk-norm {'per head' if mixer.qk_norm_scope == 'head' else 'full width'}"
        text += "" if mixer.qk_norm_weight else ", no weight"
    if mixer.temperature:
        text += f", temperature from {mixer.temperature.floor_scale - 1} on"
    text += f", chunk {mixer.chunk}" if mixer.chunk else ""
    return text + (f", window {mixer.window}" if mixer.window else "")


def _feed_forward(config: FeedForwardConfig) -> str:
    if isinstance(config, MLPConfig):
        return _mlp(config)
    text = f"{config.top_k} of {config.num_experts} experts {config.intermediate_size}"
    return text + (f" + shared {config.shared_size}" if config.shared_size else "")


def _rope(rope: RopeConfig | None, head_dim: int) -> str:
    if rope is None:
        return "no rope"
    part = "" if rope.dim == head_dim else f" on {rope.dim} of {head_dim}"
    scaling = "" if rope.scaling is None else f" {type(rope.scaling).__name__.removesuffix('Scaling').lower()}"
    return f"rope{part} theta {rope.theta:g}{scaling}{' interleaved' if rope.interleaved else ''}"


def _canon(name: str, canon: CanonConfig | None) -> list[str]:
    return [] if canon is None else [f"{name} (width {canon.kernel})"]


def _runs(config: ModelConfig) -> list[tuple[int, int, LayerConfig]]:
    """Return (first, last, config) of each run of equal layers."""
    runs = []
    for layer, members in groupby(enumerate(config.layers), key=lambda numbered: numbered[1]):
        indices = [index for index, _ in members]
        runs.append((indices[0], indices[-1], layer))
    return runs


def picture(config: ModelConfig) -> Tree:
    """Return the layers as a tree. A run of equal layers is one branch."""
    tree = Tree(f"[bold]{config.architecture}[/bold]")
    tree.add(f"embedding {config.vocab_size} x {config.hidden_size}")
    for first, last, layer in _runs(config):
        name = f"layer {first}" if first == last else f"layers {first}..{last}"
        branch = tree.add(f"[bold]{name}[/bold]")
        for part in describe(layer):
            branch.add(part)
    tree.add("norm")
    tree.add("head" + (", tied to the embedding" if config.tie_word_embeddings else ""))
    return tree


def layer_table(config: ModelConfig) -> Table:
    """Return a table with one row per run of equal layers."""
    table = Table("layers", "mixer", "feed-forward", "canon", title="layers")
    for first, last, layer in _runs(config):
        canons: dict[str, Any] = {
            "A": layer.mixer_canon,
            "B": getattr(layer.mixer, "canon", None),
            "C": layer.feed_forward_canon,
            "D": layer.feed_forward.canon,
        }
        letters = "".join(letter for letter, canon in canons.items() if canon) or "-"
        span = f"{first}..{last}" if last > first else str(first)
        table.add_row(span, describe_mixer(layer.mixer), _feed_forward(layer.feed_forward), letters)
    return table


def card_table(card: CostCard, context: int) -> Table:
    """Return a table of bytes, and of the shortest possible decode steps on this machine."""
    table = Table("quantity", "value", title="cost")
    table.add_row("parameters", f"{card.parameters:,}")
    table.add_row("weights", size(card.weight_bytes))
    table.add_row("state per token", size(card.state.bytes_per_token))
    table.add_row("slot state per request", size(card.state.bytes_per_request))
    table.add_row(f"state of a request at {context} tokens", size(card.state.bytes_at(context)))
    if card.bandwidth is not None:
        table.add_row("memory bandwidth, measured", f"{card.bandwidth / 1e9:.1f} GB/s")
        for batch in BATCHES:
            floor = card.floor_seconds(batch, context) * 1e3
            table.add_row(f"floor of a decode step, batch {batch}", f"{floor:.3f} ms, {batch / floor * 1e3:,.0f} tok/s")
    return table
