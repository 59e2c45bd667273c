"""`lamella placement`: show, set and compare the placements of a supernet."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from lamella.bench.sweep import Swept, is_pareto_optimal, sweep, usual_placements
from lamella.bench.workloads import Workload
from lamella.checkpoint.files import Checkpoint, open_checkpoint
from lamella.cli.common import console, load_llm, print_json, size
from lamella.cli.inspect import cost_card, describe_mixer
from lamella.config import Placement, describe_placement, read_placement
from lamella.config.placement import stochastic_layers
from lamella.errors import ConfigError, ParameterError
from lamella.files import write_json


def run(args: argparse.Namespace) -> int:
    """Run the action; return the exit status."""
    return {"show": _show, "set": _set, "sweep": _sweep}[args.action](args)


def _open(model: str, written: str | None, overrides: Mapping[str, Any] | None = None) -> tuple[Checkpoint, Placement]:
    checkpoint = open_checkpoint(model, overrides)
    config = checkpoint.read_config()
    if not stochastic_layers(config):
        raise ConfigError(f"{model}: no layer has a choice of mixers")
    return checkpoint, read_placement(written, config)


def _show(args: argparse.Namespace) -> int:
    """Show the mixers of each layer, and the state size of a placement, by default the checkpoint's."""
    checkpoint, placement = _open(args.model, args.placement, args.hf_overrides)
    config = checkpoint.read_config()
    card = cost_card(checkpoint, args.dtype, None, placement)
    choices = stochastic_layers(config)
    if args.json:
        print_json(
            {
                "placement": describe_placement(placement),
                "layers": {
                    index: {"mixers": mixer.names, "active": placement[index]} for index, mixer in choices.items()
                },
                "bytes_per_token": card.state.bytes_per_token,
                "bytes_per_request": card.state.bytes_per_request,
                "decode_step_weight_bytes": card.step_bytes,
            }
        )
        return 0
    table = Table("layer", "active", "others", title=f"placement {describe_placement(placement)}")
    for index, mixer in choices.items():
        active = next(sub for name, sub in mixer.mixers if name == placement[index])
        others = ", ".join(name for name in mixer.names if name != placement[index])
        table.add_row(str(index), f"{placement[index]}: {describe_mixer(active)}", others)
    console.print(table)
    state = card.state
    console.print(
        f"state: {size(state.bytes_per_token)} per token and {size(state.bytes_per_request)} per request; "
        f"{size(card.step_bytes)} of weights per decode step"
    )
    return 0


def _set(args: argparse.Namespace) -> int:
    """Write another main placement into the checkpoint's config.json. The weights do not change."""
    try:
        checkpoint, placement = _open(args.model, args.placement)
    except ConfigError as error:
        if "--hf-overrides" not in str(error):
            raise
        raise ConfigError(f"{error}; placement set takes no overrides: correct the file itself first") from error
    values = checkpoint.architecture.with_placement(checkpoint.values, placement)
    written = checkpoint.architecture.read_config(checkpoint.hf_config(values))
    assert read_placement(None, written) == placement, "the config to write has another placement"
    write_json(checkpoint.config_file, values)
    if args.json:
        print_json({"placement": describe_placement(placement), "file": str(checkpoint.config_file)})
    else:
        console.print(f"{checkpoint.config_file}: {describe_placement(placement)}")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    """Measure loss, KL divergence from the main placement, speed and state size of several placements."""
    if args.output_len < 2:
        raise ParameterError(f"--output-len {args.output_len}: must be at least 2")
    file = None if args.plot is None else Path(args.plot)
    if file is not None:
        known = _pyplot().Figure().canvas.get_supported_filetypes()  # checked before the long work, not after it
        if file.suffix.removeprefix(".").lower() not in known:
            raise ParameterError(f"--plot {file}: must end in one of {', '.join(f'.{kind}' for kind in known)}")
        if not file.parent.is_dir() or file.is_dir():
            raise ParameterError(f"--plot {file}: not a file that can be written")
    checkpoint, main = _open(args.model, None, getattr(args, "hf_overrides", None))
    config = checkpoint.read_config()
    written = args.placements or list(dict.fromkeys([describe_placement(main), *usual_placements(config)]))
    for each in written:
        read_placement(each, config)
    llm = load_llm(args)
    workload = Workload(args.requests, args.input_len, args.output_len)
    loaded = llm.engine.options
    options = {
        "prompts": args.prompts,
        "count": args.count,
        "seed": loaded.seed,
        "load_format": loaded.load_format,
        "hf_overrides": loaded.hf_overrides,
    }
    swept: list[Swept] = []
    with console.status("") as status:
        results = sweep(llm, args.model, written, workload, args.repeats, **options)
        for index, each in enumerate(written, 1):
            status.update(f"placement {index} of {len(written)}: {each}")
            found = next(results, None)
            if found is not None:
                swept.append(found)
    swept = [replace(each, best=best) for each, best in zip(swept, is_pareto_optimal(swept), strict=True)]
    console.print(_table(swept, describe_placement(main), workload))
    if file is not None:
        _plot(swept, file)
    if args.json:
        print_json(
            {
                "benchmark": "placement sweep",
                "model": args.model,
                "main": describe_placement(main),
                "workload": {"requests": workload.requests, "input_len": workload.input_len},
                "placements": [each.as_dict() for each in swept],
            }
        )
    return 0


def _table(swept: Sequence[Swept], main: str, workload: Workload) -> Table:
    title = f"{workload.requests} requests of {workload.input_len} tokens; KL from {main}"
    table = Table("placement", title=title)
    for column in ("loss", "KL", "decode, ms", "prefill, tok/s", "state per token", "per request", "best"):
        table.add_column(column, justify="right")
    for each in sorted(swept, key=lambda each: each.decode_ms):
        table.add_row(
            each.placement,
            f"{each.loss:.4f}",
            f"{each.kl:.4f}",
            f"{each.decode_ms:.3f}",
            f"{each.prefill_tok_s:,.0f}",
            size(each.bytes_per_token),
            size(each.bytes_per_request),
            "*" if each.best else "",
        )
    return table


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ParameterError("--plot: matplotlib is not installed; pip install lamella[plot]") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt


def _plot(swept: Sequence[Swept], file: Path) -> None:
    """Write a plot of loss over decode time, with a line through the Pareto-optimal placements."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    best = sorted((each for each in swept if each.best), key=lambda each: each.decode_ms)
    axes.plot([each.decode_ms for each in best], [each.loss for each in best], color="0.6", zorder=1)
    axes.scatter(
        [each.decode_ms for each in swept],
        [each.loss for each in swept],
        c=[each.bytes_per_request / 2**20 for each in swept],
        cmap="viridis",
        zorder=2,
    )
    for each in swept:
        point = (each.decode_ms, each.loss)
        axes.annotate(each.placement, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xlabel="decode step, ms", ylabel="loss, nats per token")
    axes.set_title("placements (colour: MiB of slot state per request)")
    try:
        figure.savefig(file)
    except OSError as error:
        raise ParameterError(f"--plot {file}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)
