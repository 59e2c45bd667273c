"""Print a parity report as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_STATUS = {"pass": "[green]pass[/green]", "fail": "[red]FAIL[/red]", "unavailable": "[dim]n/a[/dim]"}
_WORST_SHOWN = 5


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print a report, given as `Report.as_dict` returns it."""
    inputs = report["inputs"]
    console.print(
        f"[bold]{escape(report['architecture'])}[/bold] {escape(report['model'])}: {report['engine']} in "
        f"{report['dtype']} against {report['oracle']} in {report['reference_dtype']}, on {report['device']}; "
        f"{inputs['predictions']} predictions of {inputs['sequences']} sequences, {inputs['source']}"
    )
    if report["stats"] is not None:
        _show_stats(console, report)
    if report["free_running"] is not None:
        _show_free_running(console, report["free_running"])
    if report["paths"] is not None:
        _show_paths(console, report["paths"])
    if report["bisect"] is not None:
        _show_bisect(console, report["bisect"])
    for reason in report["reasons"]:
        console.print(f"[red]-[/red] {escape(reason)}")
    headline = f"{_STATUS[report['verdict']]} in {report['seconds']:.1f} s"
    if report["noise_floor_ratio"] is not None:
        headline += f", noise floor ratio [bold]{report['noise_floor_ratio']:.3f}[/bold]"
    console.print(headline)


def _show_stats(console: Console, report: Mapping[str, Any]) -> None:
    stats = report["stats"]
    table = _table("log-probability of the forced token, minus the reference's, in nats")
    for name in ("", "rms", "p50", "p99.9", "max", "KL", "top-1", "flips (ties)"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    rows = {report["engine"]: stats["engine"], "  prefill": stats["engine_prefill"], "  decode": stats["engine_decode"]}
    rows |= {f"{report['oracle']}, {name}": summary for name, summary in stats["floor"].items()}
    for name, row in rows.items():
        if row is not None:
            sizes = [_number(row[key]) for key in ("rms", "p50", "p999", "max", "kl_mean")]
            table.add_row(name, *sizes, _percent(row["agreement"]), f"{row['flips']} ({row['near_tie_flips']})")
    console.print(table)
    engine = stats["engine"]
    console.print(f"bias {_number(engine['bias'])} ± {_number(engine['bias_error'])}, ", end="")
    if (slope := stats["slope"]) is not None:
        console.print(
            f"slope {_number(slope['per_step'])} ± {_number(slope['standard_error'])} a decode step, ", end=""
        )
    console.print(f"{stats['outliers']['count']} outliers")
    worst = _table("furthest off")
    for name in ("phase", "position", "token", "reference", report["engine"], "after"):
        worst.add_column(name)
    for token in report["worst_tokens"][:_WORST_SHOWN]:
        text = str(token["token"]) if token["text"] is None else f"{token['token']} {token['text']!r}"
        context = " ".join(map(str, token["context_ids"])) if token["context"] is None else repr(token["context"])
        values = [_number(token["reference_logprob"]), _number(token["engine_logprob"])]
        table_row = [token["phase"], f"{token['sequence']}:{token['position']}", text, *values, context]
        worst.add_row(*map(escape, table_row))
    console.print(worst)


def _show_paths(console: Console, paths: Mapping[str, Any]) -> None:
    limits = paths["limits"]
    table = _table(
        f"paths against the full forward: allowed are {_number(limits['logprob_rms'])} rms of a position's\n"
        f"log-probabilities and {_number(limits['state'])} of a state's size"
    )
    for name in ("path", "", "rms", "max", "top-1", "state", "bits"):
        table.add_column(name, justify="left" if name in ("path", "") else "right", no_wrap=True)
    for cell in paths["cells"]:
        values = [_number(cell["logprob_rms"]), _number(cell["logprob_max"])]
        values += [_percent(cell["agreement"]), _number(cell["state_max"])]
        table.add_row(cell["path"], _STATUS[cell["status"]], *values, "=" if cell["bitwise"] else "")
    console.print(table)
    for cell in paths["cells"]:
        if cell["status"] == "unavailable":
            console.print(f"[dim]{cell['path']}: {escape(cell['why'])}[/dim]")


def _show_bisect(console: Console, bisect: Mapping[str, Any]) -> None:
    rows = bisect["rows"]
    out = [row for row in rows if row["out_of_line"]]
    shown = out or sorted(rows, key=lambda row: row["ratio"], reverse=True)[:_WORST_SHOWN]
    title = f"operations out of line, of {len(rows)}" if out else f"the furthest of {len(rows)} operations, all in line"
    table = _table(f"{title}\n(the engine's steps: {bisect['plan']})")
    for name in ("layer", "operation", "position", "channel", "rms", "largest", "explained", "ratio"):
        table.add_column(name, justify="left" if name == "operation" else "right")
    for row in shown:
        place = ["" if row["layer"] is None else str(row["layer"]), row["op"]]
        place += [str(row["position"]), str(row["channel"])]
        table.add_row(*place, *(_number(row[key]) for key in ("rms", "max", "explained", "ratio")))
    console.print(table)


def _show_free_running(console: Console, free: Mapping[str, Any]) -> None:
    table = _table("free-running, as published comparisons do")
    for name in ("step", "n", "match", "mean", "p50", "p95", "max"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for row in free["positions"]:
        values = [_number(row[key]) for key in ("mean", "p50", "p95", "max")]
        table.add_row(
            "prefill" if row["step"] == 0 else str(row["step"]), str(row["n"]), _percent(row["match"]), *values
        )
    console.print(table)
    overall, hazard = free["overall"], free["hazard"]
    console.print(
        f"{_percent(overall['match'])} match, {overall['outliers']} outliers ({overall['outliers_same_text']} on the "
        f"same text); texts that are still equal diverge at {hazard:.2%} of the steps, and all that follows compares "
        "different texts"
    )


def _table(title: str) -> Table:
    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g}%"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"
