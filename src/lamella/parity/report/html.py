"""Render a parity report as one self-contained HTML page without scripts, fonts or network access."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

from lamella.parity.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    chart_legend,
    curve,
    decades,
    hover,
    plane,
    staircase,
    svg,
    svg_line,
    svg_text,
    x_ticks,
)
from lamella.parity.report.markup import (
    Markup,
    badge,
    definition_list,
    finite_or_none,
    finite_values,
    html_table,
    join_markup,
    listing_text,
    number_text,
    page_details,
    page_section,
    percent_text,
    tag,
    times_text,
    with_error,
)

# Horizontal bars have names left of BAR_LEFT and values right of BAR_RIGHT, one bar each BAR_PITCH.
BAR_LEFT, BAR_RIGHT, BAR_PITCH, BAR_TOP = 92, 290, 18, 30
CONTEXT_IDS = 12  # token ids shown where the context has no text
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SUMMARY = ["n", "bias", "rms", "p50", "p95", "p99.9", "max", "KL mean", "agreement", "flips (near ties)"]


def render(report: Mapping[str, Any]) -> str:
    """Return the page for a report as `Report.as_dict` returns it. Sections whose data is None are left out."""
    head = (
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        tag("title", f"Parity of {report['model']}: {report['verdict']}"),
        tag("style", Markup(files("lamella.parity.report").joinpath("page.css").read_text(encoding="utf-8"))),
    )
    body = tag("main", *_sections(report))
    return "<!doctype html>\n" + tag("html", tag("head", *head), tag("body", body), lang="en") + "\n"


def _sections(report: Mapping[str, Any]) -> Iterator[Markup]:
    yield _headline(report)
    yield _compared(report)
    if stats := report.get("stats"):
        yield _error_by_position(report, stats)
        yield _error_histogram(report, stats)
        yield _summary(report, stats)
    optional: Mapping[str, Callable[[Any], Markup]] = {
        "paths": _paths,
        "bisect": _bisect,
        "worst_tokens": _worst_tokens,
        "free_running": _free_running,
        "tolerances": _tolerances,
    }
    for name, section in optional.items():
        if content := report.get(name):
            yield section(content)


# Sections.


def _headline(report: Mapping[str, Any]) -> Markup:
    ratio, stats = report.get("noise_floor_ratio"), report.get("stats") or {}
    shown = finite_or_none(ratio)
    error = finite_or_none(stats.get("noise_floor_ratio_error"))
    parts = [
        tag("p", "Parity report", class_="kicker"),
        tag("h1", report["model"]),
        tag("p", badge(report["verdict"]), class_="verdict"),
    ]
    if stats or shown is not None:
        value = "n/a" if shown is None else f"{shown:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        parts += [
            tag("p", "noise floor ratio ", tag("strong", value), class_="ratio"),
            tag(
                "p",
                f"The engine's error divided by the reference's own rounding error in {report['dtype']}, both measured "
                f"against {report['oracle']} in {report['reference_dtype']}: at most 1 is the goal.",
                join_markup(
                    [" The same for the largest errors, at p99.9: ", tag("b", number_text(stats["p999_ratio"])), "."]
                )
                if "p999_ratio" in stats
                else "",
            ),
        ]
    if report["reasons"]:
        reasons = tag("ul", *(tag("li", reason) for reason in report["reasons"]))
        parts.append(tag("div", tag("h2", "Why it fails"), reasons, class_="reasons"))
    return tag("header", *parts)


def _compared(report: Mapping[str, Any]) -> Markup:
    inputs = report["inputs"]
    facts = {
        "Model": f"{report['model']} ({report['architecture']})",
        "Config hash": tag("code", report["config_hash"]),
        "Engine": f"{report['engine']} in {report['dtype']} on {report['device']}",
        "Reference": f"{report['oracle']} in {report['reference_dtype']}, in {report['dtype']} as noise floor",
        "Inputs": f"{inputs['source']}: {number_text(inputs['sequences'])} sequences of "
        f"{number_text(inputs['prompt_len'])} + {number_text(inputs['decode_len'])} tokens, "
        f"{number_text(inputs['predictions'])} predictions, "
        f"vocabulary: {inputs['vocabulary']}, seed {report['seed']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version),
        "Time": f"{number_text(report.get('seconds'))} s",
    }
    return page_section("What was compared", definition_list(facts))


def _error_by_position(report: Mapping[str, Any], stats: Mapping[str, Any]) -> Markup:
    bins = stats["curve"]
    names = {"floor": "floor_rms", "engine": "engine_rms"}
    x = Axis(0.0, max([1.0, *(float(one["stop"]) for one in bins)]), LEFT, RIGHT)
    y = Axis.fit(finite_values(one[key] for one in bins for key in names.values()), BOTTOM, TOP)

    def points(key: str) -> Iterator[tuple[float, float | None]]:
        for one in bins:
            value = finite_or_none(one[key])
            yield x.at((one["start"] + one["stop"]) / 2), None if value is None else y.at(value)

    hovers = (
        hover(
            x.at(one["start"]),
            x.at(one["stop"]),
            f"positions {one['start']} to {one['stop'] - 1}: "
            f"engine {number_text(one['engine_rms'])}, floor {number_text(one['floor_rms'])}",
        )
        for one in bins
    )
    chart = plane(
        "Error of engine and noise floor against position in the sequence",
        x,
        y,
        "position in the sequence",
        "rms error of the log-probability (nat)",
        *(curve(points(key), class_) for class_, key in names.items()),
        *hovers,
    )
    return page_section(
        "Error against position", tag("figure", chart_legend(report), chart), _drift(stats.get("slope"))
    )


def _drift(slope: Mapping[str, Any] | None) -> Markup:
    if slope is None:
        return Markup()
    drift = with_error(slope["per_step"], slope["standard_error"])
    return tag("p", "Slope of the error over the decode steps: ", tag("b", drift), " per step.")


def _error_histogram(report: Mapping[str, Any], stats: Mapping[str, Any]) -> Markup:
    outliers = stats["outliers"]
    chart = _histogram_chart(stats["histogram"], finite_or_none(outliers["limit"]))
    count = f"{number_text(outliers['count'])} ({percent_text(outliers['share'])})"
    return page_section(
        "Distribution of the error",
        tag("figure", chart_legend(report), chart) if chart else "",
        tag("p", f"Outliers, errors beyond {number_text(outliers['limit'])} nat: ", tag("b", count), "."),
    )


def _histogram_chart(histogram: Mapping[str, Any], limit: float | None) -> Markup:
    """Return the histogram, or empty markup if NaN or Inf in the errors left no range to draw."""
    edges = finite_values(histogram["edges"])
    if len(edges) != len(histogram["edges"]) or not edges or not 0 < edges[0] < edges[-1]:
        return Markup()
    shares = {name: _percentages(histogram[name]) for name in ("floor", "engine")}
    x = Axis(edges[0], edges[-1], LEFT, RIGHT, log=True)
    y = Axis(0.0, 1.2 * max(*shares["floor"], *shares["engine"]) or 1.0, BOTTOM, TOP)
    columns = zip(
        edges[:-1], edges[1:], *(zip(histogram[name], shares[name], strict=True) for name in shares), strict=True
    )
    return plane(
        "Histogram of the absolute error of engine and noise floor",
        x,
        y,
        "|delta log-probability| (nat)",
        "% of predictions",
        *(staircase(edges, heights, x, y, class_) for class_, heights in shares.items()),
        _limit(limit, x) if limit is not None and edges[0] < limit < edges[-1] else "",
        *(
            hover(
                x.at(low),
                x.at(high),
                f"{number_text(low)} to {number_text(high)} nat: "
                f"engine {number_text(engine)} ({engine_share:.2f} %), "
                f"floor {number_text(floor)} ({floor_share:.2f} %)",
            )
            for low, high, (floor, floor_share), (engine, engine_share) in columns
        ),
    )


def _limit(limit: float, x: Axis) -> Markup:
    at = x.at(limit)
    side, anchor = (4, "start") if at < WIDTH / 2 else (-4, "end")
    return join_markup(
        [svg_line(at, TOP, at, BOTTOM, "limit"), svg_text(at + side, TOP + 10, "outliers from here", anchor)]
    )


def _percentages(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [100 * count / total for count in counts]


def _summary(report: Mapping[str, Any], stats: Mapping[str, Any]) -> Markup:
    rows = {
        "engine": stats["engine"],
        "prefill": stats["engine_prefill"],
        "decode": stats["engine_decode"],
        **{f"floor {name}": summary for name, summary in stats["floor"].items()},
    }
    table = html_table("Summary", ["", *SUMMARY], [[name, *_measures(one)] for name, one in rows.items() if one])
    steps = [
        ["prefill" if one["step"] == 0 else f"decode {one['step']}", *_measures(one)] for one in stats["positions"]
    ]
    note = (
        f"Log-probability of the true next token, {report['engine']} or the floor minus the reference, in nat. "
        "Quantiles are of its absolute value; agreement and flips are about the likeliest token."
    )
    per_step = (
        page_details("Per decode step", html_table("Per decode step", ["step", *SUMMARY], steps)) if steps else ""
    )
    return page_section("Summary", tag("p", note), table, per_step)


def _measures(one: Mapping[str, Any]) -> list[str]:
    """Return the cells of one row under the headers `SUMMARY`."""
    return [
        number_text(one["n"]),
        with_error(one["bias"], one["bias_error"]),
        *(number_text(one[key]) for key in ("rms", "p50", "p95", "p999", "max", "kl_mean")),
        percent_text(one["agreement"]),
        f"{number_text(one['flips'])} ({number_text(one['near_tie_flips'])})",
    ]


def _paths(paths: Mapping[str, Any]) -> Markup:
    headers = ["path", "status", "bitwise", "log-prob max", "log-prob rms", "agreement", "state max", "where, why"]
    bitwise = {True: "yes", False: "no", None: "n/a"}
    rows = [
        [
            cell["path"],
            badge(cell["status"]),
            bitwise[cell["bitwise"]],
            number_text(cell["logprob_max"]),
            number_text(cell["logprob_rms"]),
            percent_text(cell["agreement"]),
            number_text(cell["state_max"]),
            "; ".join(filter(None, (cell["state_worst"], cell["why"]))),
        ]
        for cell in paths["cells"]
    ]
    limits = tag("p", f"Limits: {listing_text(paths['limits'])}.")
    return page_section(
        "Execution paths",
        tag("p", "The engine against itself: every way to run the same tokens must agree within the limits."),
        html_table("Execution paths", headers, rows, text=("status", "where, why")),
        limits,
    )


def _bisect(bisect: Mapping[str, Any]) -> Markup:
    first, rows = bisect["first"], bisect["rows"]
    if first is None:
        finding = tag("p", badge("pass", "in line"), " The error of every sub-block is in line with rounding.")
    elif first.get("missing"):
        place = tag("b", f" First out of line: {_place(first)}")
        finding = tag("p", badge("fail", "out of line"), place, f": the {first['missing']} does not compute it.")
    else:
        finding = tag(
            "p",
            badge("fail", "out of line"),
            tag("b", f" First out of line: {_place(first)}"),
            f", position {first['position']}, channel {first['channel']}. Its rms error is {number_text(first['rms'])} "
            f"where rounding explains {number_text(first['explained'])} ({times_text(first['ratio'])}); the largest "
            f"error is {number_text(first['max'])}.",
        )
    return page_section(
        "Layer by layer",
        finding,
        tag("p", f"Run of {bisect['plan']}. For each layer, the sub-block whose error is furthest above rounding:"),
        tag("figure", _bars(_worst_of_each_layer(rows))),
        page_details("Every sub-block", _bisect_table(rows)),
    )


def _place(row: Mapping[str, Any]) -> str:
    return row["site"] if row["layer"] is None else f"layer {row['layer']}, {row['op']}"


def _worst_of_each_layer(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the worst row of each layer in order of appearance; rows outside the layers stay separate."""

    def badness(row: Mapping[str, Any]) -> tuple[bool, float]:
        ratio = finite_or_none(row["ratio"])
        return row["out_of_line"], math.inf if ratio is None and row["out_of_line"] else ratio or 0.0

    worst: dict[object, Mapping[str, Any]] = {}
    for row in rows:
        key = row["site"] if row["layer"] is None else row["layer"]
        worst[key] = max(worst.get(key, row), row, key=badness)
    return list(worst.values())


def _bars(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Return a chart with one bar per row, from ratio 1 to the row's ratio."""
    ratios = [ratio for ratio in finite_values(row["ratio"] for row in rows) if ratio > 0]
    x = Axis(*decades(min([0.5, *ratios]), max([2.0, *ratios])), BAR_LEFT, BAR_RIGHT, log=True)
    bottom = BAR_TOP + BAR_PITCH * len(rows)
    return svg(
        "Worst ratio of error to rounding in each layer",
        bottom + 24,
        svg_text(0, 12, "rms error ÷ what rounding explains"),
        x_ticks(x, BAR_TOP - 6, bottom),
        *(_bar(row, x, BAR_TOP + BAR_PITCH * index) for index, row in enumerate(rows)),
        svg_line(x.at(1.0), BAR_TOP - 6, x.at(1.0), bottom, "axis"),
    )


def _bar(row: Mapping[str, Any], x: Axis, top: float) -> Markup:
    ratio, out = finite_or_none(row["ratio"]), row["out_of_line"]
    # Draw a NaN or infinite ratio to the end of the scale if the row is out of line, otherwise without length.
    end = x.at(ratio if ratio is not None else math.inf if out else 1.0)
    left, right = sorted((x.at(1.0), end))
    baseline, class_ = top + BAR_PITCH - 5, "out" if out else None
    name = row["site"].rsplit(".", 1)[-1] if row["layer"] is None else f"layer {row['layer']}"
    value = f"{'✗ ' if out else ''}{'' if row['layer'] is None else row['op']} {times_text(row['ratio'])}"
    return tag(
        "g",
        tag(
            "title", f"{row['site']}: rms {number_text(row['rms'])}, {times_text(row['ratio'])} what rounding explains"
        ),
        tag("rect", x=0, y=top, width=WIDTH, height=BAR_PITCH, class_="hover"),
        svg_text(BAR_LEFT - 8, baseline, name, "end", class_),
        tag("rect", x=left, y=top + 3, width=round(right - left, 1), height=BAR_PITCH - 6, rx=1, class_="bar"),
        svg_text(BAR_RIGHT + 8, baseline, value.strip(), "start", class_),
        class_=class_,
    )


def _bisect_table(rows: Iterable[Mapping[str, Any]]) -> Markup:
    headers = ["site", "status", "ratio", "rms", "explained", "relative", "max", "position", "channel"]
    cells = [
        [
            row["site"],
            badge("fail", "out of line") if row["out_of_line"] else badge("pass", "in line"),
            times_text(row["ratio"]),
            *(number_text(row[key]) for key in ("rms", "explained", "relative", "max")),
            row["position"],
            row["channel"],
        ]
        for row in rows
    ]
    return html_table("Every sub-block", headers, cells, text=("status",))


def _worst_tokens(tokens: Sequence[Mapping[str, Any]]) -> Markup:
    headers = ["delta", "context and token", "where", "reference", "engine", "likeliest token", "token"]
    rows = [
        [
            number_text(token["delta"]),
            _context(token),
            f"sequence {token['sequence']}, position {token['position']}, {token['phase']}",
            number_text(token["reference_logprob"]),
            number_text(token["engine_logprob"]),
            _likeliest(token),
            token["token"],
        ]
        for token in tokens
    ]
    return page_section(
        "Worst tokens",
        tag("p", "Where the engine's log-probability of the marked token is furthest from the reference, in nat."),
        html_table("Worst tokens", headers, rows, text=("context and token", "where", "likeliest token")),
    )


def _context(token: Mapping[str, Any]) -> Markup:
    """Return the context followed by the marked token; token ids if there is no text."""
    before, ids = token["context"], token["context_ids"]
    if before is None:
        before = "".join(f"{one} " for one in ids[-CONTEXT_IDS:])
        before = f"… {before}" if len(ids) > CONTEXT_IDS else before
    text = token["token"] if token["text"] is None else token["text"]
    return tag("code", before, tag("mark", text), class_="context")


def _likeliest(token: Mapping[str, Any]) -> str:
    reference, engine = token["reference_top"], token["engine_top"]
    return f"{reference}, both" if reference == engine else f"reference {reference}, engine {engine}"


def _free_running(free: Mapping[str, Any]) -> Markup:
    overall = free["overall"]
    quantiles = ("p10", "p50", "p90", "p95", "p99", "max")
    facts = {
        "Match": percent_text(overall["match"]),
        "Mean ± std": with_error(overall["mean"], overall["std"]),
        ", ".join(quantiles): ", ".join(number_text(overall[key]) for key in quantiles),
        "Outliers": f"{number_text(overall['outliers'])} ({percent_text(overall['outlier_share'])}), of which "
        f"{number_text(overall['outliers_same_text'])} before the texts diverge",
    }
    if free["hazard"] is not None:
        facts["Hazard"] = f"texts that are still equal diverge at {percent_text(free['hazard'])} of the steps"
    rows = [
        [f"step {one['step']}", number_text(one["n"]), percent_text(one["match"])]
        + [number_text(one[key]) for key in ("mean", "p50", "p95", "max")]
        for one in free["positions"]
    ]
    return page_section(
        "Free running",
        tag(
            "p",
            "Both sides choose their own tokens, always the likeliest; differences of log-probability in nat. After "
            "the first difference they continue different texts: that, and not a growing error, is what the match "
            "loses and what most outliers are.",
        ),
        definition_list(facts),
        html_table("Free running, per step", ["", "n", "match", "mean", "p50", "p95", "max"], rows),
    )


def _tolerances(tolerances: Mapping[str, Any]) -> Markup:
    return page_section("Tolerances", definition_list({name: number_text(value) for name, value in tolerances.items()}))
