"""The parity report as one HTML page that needs nothing else: no script, no font, no network."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Charts are drawn in these units and scale with the page. Left of LEFT stand the labels of the y axis.
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 468, 26, 222
# Bars that lie have names left of BAR_LEFT and values right of BAR_RIGHT, one bar each BAR_PITCH.
BAR_LEFT, BAR_RIGHT, BAR_PITCH, BAR_TOP = 92, 290, 18, 30

LOG_FROM = 30  # values that differ by more than this factor get a logarithmic axis
CONTEXT_IDS = 12  # token ids shown where the context has no text
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STATUS_MARKS = {"pass": "✓", "fail": "✗", "unavailable": "○"}
TIMES = "\N{MULTIPLICATION SIGN}"
SUMMARY = ["n", "bias", "rms", "p50", "p95", "p99.9", "max", "KL mean", "agreement", "flips (near ties)"]
VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


def render(report: Mapping[str, Any]) -> str:
    """The whole page, from `<!doctype html>` on. Sections whose data is None are left out."""
    head = (
        _Markup('<meta charset="utf-8">'),
        _Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        _Markup('<meta name="color-scheme" content="light dark">'),
        _Markup(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        _tag("title", f"Parity of {report['model']}: {report['verdict']}"),
        _tag("style", _Markup(_STYLE)),
    )
    body = _tag("main", *_sections(report))
    return "<!doctype html>\n" + _tag("html", _tag("head", *head), _tag("body", body), lang="en") + "\n"


def _sections(report: Mapping[str, Any]) -> Iterator[_Markup]:
    yield _headline(report)
    yield _compared(report)
    if stats := report.get("stats"):
        yield _error_by_position(report, stats)
        yield _error_histogram(report, stats)
        yield _summary(report, stats)
    optional: Mapping[str, Callable[[Any], _Markup]] = {
        "paths": _paths,
        "bisect": _bisect,
        "worst_tokens": _worst_tokens,
        "free_running": _free_running,
        "tolerances": _tolerances,
    }
    for name, section in optional.items():
        if content := report.get(name):
            yield section(content)


# Markup: whatever is not _Markup is escaped where it enters a tag.


class _Markup(str):
    """HTML that is complete and escaped."""

    __slots__ = ()


def _escape(value: object) -> str:
    """Text for HTML, with whitespace other than blanks, and characters that show nothing or reorder text, visible."""
    if isinstance(value, _Markup):
        return value
    shown = (VISIBLE.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in str(value))
    return html.escape("".join(shown))


def _tag(name: str, *children: object, **attributes: object) -> _Markup:
    """An element. Attributes that are None are left out; `class_` is class, `aria_label` is aria-label."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return _Markup(f"<{name}{given}>{''.join(map(_escape, children))}</{name}>")


def _join(parts: Iterable[object]) -> _Markup:
    return _Markup("".join(map(_escape, parts)))


def _section(title: str, *children: object) -> _Markup:
    return _tag("section", _tag("h2", title), *children)


def _details(summary: str, *children: object) -> _Markup:
    return _tag("details", _tag("summary", summary), *children)


def _table(label: str, headers: Sequence[str], rows: Iterable[Sequence[object]], text: Collection[str] = ()) -> _Markup:
    """A table whose first column names the rows; the columns `text` are left aligned, the others are numbers."""
    kinds = ["text" if header in text else None for header in headers]

    def line(cells: Sequence[object], cell_tag: str) -> _Markup:
        rest = (_tag(cell_tag, cell, class_=kind) for cell, kind in zip(cells[1:], kinds[1:], strict=True))
        return _tag("tr", _tag("th", cells[0]), *rest)

    table = _tag("table", _tag("thead", line(headers, "th")), _tag("tbody", *(line(row, "td") for row in rows)))
    return _tag("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def _definitions(pairs: Mapping[str, object]) -> _Markup:
    return _tag("dl", *(_tag("div", _tag("dt", name), _tag("dd", value)) for name, value in pairs.items()))


def _badge(status: str, label: str | None = None) -> _Markup:
    """A status in colour, sign and words; `label` in place of the status' own name."""
    return _tag("span", f"{STATUS_MARKS[status]} {label or status}", class_=f"badge {status}")


# Numbers.


def _finite(value: Any) -> float | None:
    """The number, or None for what a broken engine gives: NaN, an infinity, nothing."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _all_finite(values: Iterable[Any]) -> list[float]:
    return [number for number in map(_finite, values) if number is not None]


def _number(value: Any) -> str:
    """Three significant digits; integers whole."""
    number = _finite(value)
    if number is None:
        return "n/a"
    if isinstance(value, int) or 999.5 <= abs(number) < 1e6:
        return f"{number:,.0f}"
    if number == 0 or 1e-3 <= abs(number) < 1e6:
        return f"{number:.3g}"
    digits, power = f"{number:.2e}".split("e")
    return f"{float(digits):g}e{int(power)}"


def _percent(share: Any) -> str:
    number = _finite(share)
    return "n/a" if number is None else f"{100 * number:.2f} %"


def _with_error(value: Any, error: Any) -> str:
    return f"{_number(value)} ± {_number(error)}"


def _times(ratio: Any) -> str:
    return "n/a" if _finite(ratio) is None else f"{_number(ratio)}{TIMES}"


def _listing(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in values.items())


# Charts.


@dataclass(frozen=True)
class _Axis:
    """Values from `low` to `high` on a line from `start` to `stop`. What lies beyond an end is drawn at it."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def fit(cls, values: Sequence[float], start: float, stop: float) -> _Axis:
        """From 0, or over whole decades where that would press the small values flat."""
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        if high > LOG_FROM * low:
            return cls(*_decades(low, high), start, stop, log=True)
        return cls(0.0, high * 1.08, start, stop)

    def at(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (self.stop - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Round values between the ends, few enough for their labels."""
        if not self.log:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
            first, last = math.ceil(self.low / step), math.floor(self.high / step)
            return [n * step for n in range(first, last + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        decades = self._inside(10.0**power for power in powers)
        if len(decades) < 3:
            return self._inside(factor * 10.0**power for power in powers for factor in (1, 2, 5))
        return decades[:: math.ceil(len(decades) / 7)]

    def _inside(self, values: Iterable[float]) -> list[float]:
        return [value for value in values if self.low <= value <= self.high]


def _decades(low: float, high: float) -> tuple[float, float]:
    """The powers of ten around a range, at least one decade apart."""
    first = math.floor(math.log10(low))
    return 10.0**first, 10.0 ** max(math.ceil(math.log10(high)), first + 1)


def _chart(label: str, height: float, *children: object) -> _Markup:
    return _tag("svg", *children, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def _line(x1: float, y1: float, x2: float, y2: float, class_: str) -> _Markup:
    return _tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _label(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> _Markup:
    return _tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def _x_ticks(axis: _Axis, top: float, bottom: float) -> _Markup:
    return _join(
        part
        for tick in axis.ticks()
        for part in (
            _line(axis.at(tick), top, axis.at(tick), bottom, "grid"),
            _label(axis.at(tick), bottom + 17, _number(tick), "middle"),
        )
    )


def _y_ticks(axis: _Axis) -> _Markup:
    return _join(
        part
        for tick in axis.ticks()
        for part in (
            _line(LEFT, axis.at(tick), RIGHT, axis.at(tick), "grid"),
            _label(LEFT - 6, axis.at(tick) + 4, _number(tick), "end"),
        )
    )


def _plane(label: str, x: _Axis, y: _Axis, x_label: str, y_label: str, *content: object) -> _Markup:
    """A chart with both axes labelled and `content` upon them."""
    return _chart(
        label,
        HEIGHT,
        _x_ticks(x, TOP, BOTTOM),
        _y_ticks(y),
        _line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"),
        _label(0, 12, y_label),
        _label(RIGHT, HEIGHT - 8, x_label, "end"),
        *content,
    )


def _hover(left: float, right: float, tooltip: str) -> _Markup:
    """An unseen column over the plane that shows a tooltip."""
    width = round(right - left, 1)
    return _tag("rect", _tag("title", tooltip), x=left, y=TOP, width=width, height=BOTTOM - TOP, class_="hover")


def _legend(report: Mapping[str, Any]) -> _Markup:
    return _tag(
        "figcaption",
        _tag("span", f"{report['engine']} (engine)", class_="key engine"),
        _tag("span", f"{report['oracle']} in {report['dtype']} (floor)", class_="key floor"),
    )


def _curve(points: Iterable[tuple[float, float | None]], class_: str) -> _Markup:
    """A line through points in drawing units, broken where y is None."""
    path, marks, pen = "", [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path += f"{pen}{x} {y}"
        marks.append(_tag("circle", cx=x, cy=y, r=2.2, class_=class_))
        pen = "L"
    return _join([_tag("path", d=path, class_=f"curve {class_}"), *marks])


def _staircase(edges: Sequence[float], heights: Sequence[float], x: _Axis, y: _Axis, class_: str) -> _Markup:
    """The outline of a histogram, filled."""
    steps = "".join(f"V{y.at(height)}H{x.at(edge)}" for height, edge in zip(heights, edges[1:], strict=True))
    return _tag("path", d=f"M{x.at(edges[0])} {BOTTOM}{steps}V{BOTTOM}Z", class_=f"curve area {class_}")


# Sections.


def _headline(report: Mapping[str, Any]) -> _Markup:
    ratio, stats = report.get("noise_floor_ratio"), report.get("stats") or {}
    shown = _finite(ratio)
    error = _finite(stats.get("noise_floor_ratio_error"))
    parts = [
        _tag("p", "Parity report", class_="kicker"),
        _tag("h1", report["model"]),
        _tag("p", _badge(report["verdict"]), class_="verdict"),
    ]
    if stats or shown is not None:
        value = "n/a" if shown is None else f"{shown:.2f}" + (f" ± {error:.2f}" if error is not None else "")
        parts += [
            _tag("p", "noise floor ratio ", _tag("strong", value), class_="ratio"),
            _tag(
                "p",
                f"The engine's error divided by the reference's own rounding error in {report['dtype']}, both measured "
                f"against {report['oracle']} in {report['truth_dtype']}: at most 1 is the goal.",
                _join([" The same for the largest errors, at p99.9: ", _tag("b", _number(stats["p999_ratio"])), "."])
                if "p999_ratio" in stats
                else "",
            ),
        ]
    if report["reasons"]:
        reasons = _tag("ul", *(_tag("li", reason) for reason in report["reasons"]))
        parts.append(_tag("div", _tag("h2", "Why it fails"), reasons, class_="reasons"))
    return _tag("header", *parts)


def _compared(report: Mapping[str, Any]) -> _Markup:
    inputs = report["inputs"]
    facts = {
        "Model": f"{report['model']} ({report['architecture']})",
        "Config hash": _tag("code", report["config_hash"]),
        "Engine": f"{report['engine']} in {report['dtype']} on {report['device']}",
        "Reference": f"{report['oracle']} in {report['truth_dtype']} as truth, in {report['dtype']} as noise floor",
        "Inputs": f"{inputs['source']}: {_number(inputs['sequences'])} sequences of {_number(inputs['prompt_len'])} + "
        f"{_number(inputs['decode_len'])} tokens, {_number(inputs['predictions'])} predictions, "
        f"vocabulary: {inputs['vocabulary']}, seed {report['seed']}",
        "Versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version),
        "Time": f"{_number(report.get('seconds'))} s",
    }
    return _section("What was compared", _definitions(facts))


def _error_by_position(report: Mapping[str, Any], stats: Mapping[str, Any]) -> _Markup:
    bins = stats["curve"]
    names = {"floor": "floor_rms", "engine": "engine_rms"}
    x = _Axis(0.0, max([1.0, *(float(one["stop"]) for one in bins)]), LEFT, RIGHT)
    y = _Axis.fit(_all_finite(one[key] for one in bins for key in names.values()), BOTTOM, TOP)

    def points(key: str) -> Iterator[tuple[float, float | None]]:
        for one in bins:
            value = _finite(one[key])
            yield x.at((one["start"] + one["stop"]) / 2), None if value is None else y.at(value)

    hovers = (
        _hover(
            x.at(one["start"]),
            x.at(one["stop"]),
            f"positions {one['start']} to {one['stop'] - 1}: "
            f"engine {_number(one['engine_rms'])}, floor {_number(one['floor_rms'])}",
        )
        for one in bins
    )
    chart = _plane(
        "Error of engine and noise floor against position in the sequence",
        x,
        y,
        "position in the sequence",
        "rms error of the log-probability (nat)",
        *(_curve(points(key), class_) for class_, key in names.items()),
        *hovers,
    )
    return _section("Error against position", _tag("figure", _legend(report), chart), _drift(stats.get("slope")))


def _drift(slope: Mapping[str, Any] | None) -> _Markup:
    if slope is None:
        return _Markup()
    drift = _with_error(slope["per_step"], slope["standard_error"])
    return _tag("p", "Slope of the error over the decode steps: ", _tag("b", drift), " per step.")


def _error_histogram(report: Mapping[str, Any], stats: Mapping[str, Any]) -> _Markup:
    outliers = stats["outliers"]
    chart = _histogram_chart(stats["histogram"], _finite(outliers["limit"]))
    count = f"{_number(outliers['count'])} ({_percent(outliers['share'])})"
    return _section(
        "Distribution of the error",
        _tag("figure", _legend(report), chart) if chart else "",
        _tag("p", f"Outliers, errors beyond {_number(outliers['limit'])} nat: ", _tag("b", count), "."),
    )


def _histogram_chart(histogram: Mapping[str, Any], limit: float | None) -> _Markup:
    """Nothing where an error that is no number left no range to draw."""
    edges = _all_finite(histogram["edges"])
    if len(edges) != len(histogram["edges"]) or not edges or not 0 < edges[0] < edges[-1]:
        return _Markup()
    shares = {name: _percentages(histogram[name]) for name in ("floor", "engine")}
    x = _Axis(edges[0], edges[-1], LEFT, RIGHT, log=True)
    y = _Axis(0.0, 1.2 * max(*shares["floor"], *shares["engine"]) or 1.0, BOTTOM, TOP)
    columns = zip(
        edges[:-1], edges[1:], *(zip(histogram[name], shares[name], strict=True) for name in shares), strict=True
    )
    return _plane(
        "Histogram of the absolute error of engine and noise floor",
        x,
        y,
        "|delta log-probability| (nat)",
        "% of predictions",
        *(_staircase(edges, heights, x, y, class_) for class_, heights in shares.items()),
        _limit(limit, x) if limit is not None and edges[0] < limit < edges[-1] else "",
        *(
            _hover(
                x.at(low),
                x.at(high),
                f"{_number(low)} to {_number(high)} nat: "
                f"engine {_number(engine)} ({engine_share:.2f} %), floor {_number(floor)} ({floor_share:.2f} %)",
            )
            for low, high, (floor, floor_share), (engine, engine_share) in columns
        ),
    )


def _limit(limit: float, x: _Axis) -> _Markup:
    at = x.at(limit)
    side, anchor = (4, "start") if at < WIDTH / 2 else (-4, "end")
    return _join([_line(at, TOP, at, BOTTOM, "limit"), _label(at + side, TOP + 10, "outliers from here", anchor)])


def _percentages(counts: Sequence[int]) -> list[float]:
    total = sum(counts) or 1
    return [100 * count / total for count in counts]


def _summary(report: Mapping[str, Any], stats: Mapping[str, Any]) -> _Markup:
    rows = {
        "engine": stats["engine"],
        "prefill": stats["engine_prefill"],
        "decode": stats["engine_decode"],
        **{f"floor {name}": summary for name, summary in stats["floor"].items()},
    }
    table = _table("Summary", ["", *SUMMARY], [[name, *_measures(one)] for name, one in rows.items() if one])
    steps = [
        ["prefill" if one["step"] == 0 else f"decode {one['step']}", *_measures(one)] for one in stats["positions"]
    ]
    note = (
        f"Log-probability of the true next token, {report['engine']} or the floor minus the truth, in nat. "
        "Quantiles are of its absolute value; agreement and flips are about the likeliest token."
    )
    per_step = _details("Per decode step", _table("Per decode step", ["step", *SUMMARY], steps)) if steps else ""
    return _section("Summary", _tag("p", note), table, per_step)


def _measures(one: Mapping[str, Any]) -> list[str]:
    """The cells of SUMMARY."""
    return [
        _number(one["n"]),
        _with_error(one["bias"], one["bias_error"]),
        *(_number(one[key]) for key in ("rms", "p50", "p95", "p999", "max", "kl_mean")),
        _percent(one["agreement"]),
        f"{_number(one['flips'])} ({_number(one['near_tie_flips'])})",
    ]


def _paths(paths: Mapping[str, Any]) -> _Markup:
    headers = ["path", "status", "bitwise", "log-prob max", "log-prob rms", "agreement", "state max", "where, why"]
    bitwise = {True: "yes", False: "no", None: "n/a"}
    rows = [
        [
            cell["path"],
            _badge(cell["status"]),
            bitwise[cell["bitwise"]],
            _number(cell["logprob_max"]),
            _number(cell["logprob_rms"]),
            _percent(cell["agreement"]),
            _number(cell["state_max"]),
            "; ".join(filter(None, (cell["state_worst"], cell["why"]))),
        ]
        for cell in paths["cells"]
    ]
    limits = _tag("p", f"Limits: {_listing(paths['limits'])}.")
    return _section(
        "Execution paths",
        _tag("p", "The engine against itself: every way to run the same tokens must agree within the limits."),
        _table("Execution paths", headers, rows, text=("status", "where, why")),
        limits,
    )


def _bisect(bisect: Mapping[str, Any]) -> _Markup:
    first, rows = bisect["first"], bisect["rows"]
    if first is None:
        finding = _tag("p", _badge("pass", "in line"), " The error of every sub-block is in line with rounding.")
    elif first.get("missing"):
        place = _tag("b", f" First out of line: {_place(first)}")
        finding = _tag("p", _badge("fail", "out of line"), place, f": the {first['missing']} does not compute it.")
    else:
        finding = _tag(
            "p",
            _badge("fail", "out of line"),
            _tag("b", f" First out of line: {_place(first)}"),
            f", position {first['position']}, channel {first['channel']}. Its rms error is {_number(first['rms'])} "
            f"where rounding explains {_number(first['explained'])} ({_times(first['ratio'])}); the largest error is "
            f"{_number(first['max'])}.",
        )
    return _section(
        "Layer by layer",
        finding,
        _tag("p", f"Run of {bisect['plan']}. For each layer, the sub-block whose error is furthest above rounding:"),
        _tag("figure", _bars(_worst_of_each_layer(rows))),
        _details("Every sub-block", _bisect_table(rows)),
    )


def _place(row: Mapping[str, Any]) -> str:
    return row["site"] if row["layer"] is None else f"layer {row['layer']}, {row['op']}"


def _worst_of_each_layer(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """In order of appearance; what is outside the layers stands for itself."""

    def badness(row: Mapping[str, Any]) -> tuple[bool, float]:
        ratio = _finite(row["ratio"])
        return row["out_of_line"], math.inf if ratio is None and row["out_of_line"] else ratio or 0.0

    worst: dict[object, Mapping[str, Any]] = {}
    for row in rows:
        key = row["site"] if row["layer"] is None else row["layer"]
        worst[key] = max(worst.get(key, row), row, key=badness)
    return list(worst.values())


def _bars(rows: Sequence[Mapping[str, Any]]) -> _Markup:
    """One bar for each row, from ratio 1 to its own."""
    ratios = [ratio for ratio in _all_finite(row["ratio"] for row in rows) if ratio > 0]
    x = _Axis(*_decades(min([0.5, *ratios]), max([2.0, *ratios])), BAR_LEFT, BAR_RIGHT, log=True)
    bottom = BAR_TOP + BAR_PITCH * len(rows)
    return _chart(
        "Worst ratio of error to rounding in each layer",
        bottom + 24,
        _label(0, 12, "rms error ÷ what rounding explains"),
        _x_ticks(x, BAR_TOP - 6, bottom),
        *(_bar(row, x, BAR_TOP + BAR_PITCH * index) for index, row in enumerate(rows)),
        _line(x.at(1.0), BAR_TOP - 6, x.at(1.0), bottom, "axis"),
    )


def _bar(row: Mapping[str, Any], x: _Axis, top: float) -> _Markup:
    ratio, out = _finite(row["ratio"]), row["out_of_line"]
    # A ratio that is no number is beyond the scale where the sub-block is out of line, and nothing to show elsewhere.
    end = x.at(ratio if ratio is not None else math.inf if out else 1.0)
    left, right = sorted((x.at(1.0), end))
    baseline, class_ = top + BAR_PITCH - 5, "out" if out else None
    name = row["site"].rsplit(".", 1)[-1] if row["layer"] is None else f"layer {row['layer']}"
    value = f"{'✗ ' if out else ''}{'' if row['layer'] is None else row['op']} {_times(row['ratio'])}"
    return _tag(
        "g",
        _tag("title", f"{row['site']}: rms {_number(row['rms'])}, {_times(row['ratio'])} what rounding explains"),
        _tag("rect", x=0, y=top, width=WIDTH, height=BAR_PITCH, class_="hover"),
        _label(BAR_LEFT - 8, baseline, name, "end", class_),
        _tag("rect", x=left, y=top + 3, width=round(right - left, 1), height=BAR_PITCH - 6, rx=1, class_="bar"),
        _label(BAR_RIGHT + 8, baseline, value.strip(), "start", class_),
        class_=class_,
    )


def _bisect_table(rows: Iterable[Mapping[str, Any]]) -> _Markup:
    headers = ["site", "status", "ratio", "rms", "explained", "relative", "max", "position", "channel"]
    cells = [
        [
            row["site"],
            _badge("fail", "out of line") if row["out_of_line"] else _badge("pass", "in line"),
            _times(row["ratio"]),
            *(_number(row[key]) for key in ("rms", "explained", "relative", "max")),
            row["position"],
            row["channel"],
        ]
        for row in rows
    ]
    return _table("Every sub-block", headers, cells, text=("status",))


def _worst_tokens(tokens: Sequence[Mapping[str, Any]]) -> _Markup:
    headers = ["delta", "context and token", "where", "truth", "engine", "likeliest token", "token"]
    rows = [
        [
            _number(token["delta"]),
            _context(token),
            f"sequence {token['sequence']}, position {token['position']}, {token['phase']}",
            _number(token["truth_logprob"]),
            _number(token["engine_logprob"]),
            _likeliest(token),
            token["token"],
        ]
        for token in tokens
    ]
    return _section(
        "Worst tokens",
        _tag("p", "Where the engine's log-probability of the marked token is furthest from the truth, in nat."),
        _table("Worst tokens", headers, rows, text=("context and token", "where", "likeliest token")),
    )


def _context(token: Mapping[str, Any]) -> _Markup:
    """What comes before, and the token marked; as ids where there is no text."""
    before, ids = token["context"], token["context_ids"]
    if before is None:
        before = "".join(f"{one} " for one in ids[-CONTEXT_IDS:])
        before = f"… {before}" if len(ids) > CONTEXT_IDS else before
    text = token["token"] if token["text"] is None else token["text"]
    return _tag("code", before, _tag("mark", text), class_="context")


def _likeliest(token: Mapping[str, Any]) -> str:
    truth, engine = token["truth_top"], token["engine_top"]
    return f"{truth}, both" if truth == engine else f"truth {truth}, engine {engine}"


def _free_running(free: Mapping[str, Any]) -> _Markup:
    overall = free["overall"]
    quantiles = ("p10", "p50", "p90", "p95", "p99", "max")
    facts = {
        "Match": _percent(overall["match"]),
        "Mean ± std": _with_error(overall["mean"], overall["std"]),
        ", ".join(quantiles): ", ".join(_number(overall[key]) for key in quantiles),
        "Outliers": f"{_number(overall['outliers'])} ({_percent(overall['outlier_share'])}), of which "
        f"{_number(overall['outliers_same_text'])} before the texts part",
    }
    if free["hazard"] is not None:
        facts["Hazard"] = f"texts that are still the same part at {_percent(free['hazard'])} of the steps"
    rows = [
        [f"step {one['step']}", _number(one["n"]), _percent(one["match"])]
        + [_number(one[key]) for key in ("mean", "p50", "p95", "max")]
        for one in free["positions"]
    ]
    return _section(
        "Free running",
        _tag(
            "p",
            "Both sides choose their own tokens, always the likeliest; differences of log-probability in nat. After "
            "the first difference they continue different texts: that, and not a growing error, is what the match "
            "loses and what most outliers are.",
        ),
        _definitions(facts),
        _table("Free running, per step", ["", "n", "match", "mean", "p50", "p95", "max"], rows),
    )


def _tolerances(tolerances: Mapping[str, Any]) -> _Markup:
    return _section("Tolerances", _definitions({name: _number(value) for name, value in tolerances.items()}))


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1b1f24; --soft: #59616b; --line: #dde2e8; --wash: #f4f6f8; --shade: #0003;
  --engine: #0a62c2; --floor: #7a828c; --pass: #00694e; --fail: #b03000; --pass-wash: #e2f4ee; --fail-wash: #fdeae2;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e4e8ec; --soft: #a0a9b3; --line: #323941; --wash: #1e2329; --shade: #000a;
    --engine: #62adff; --floor: #8b949e; --pass: #5cd0a8; --fail: #ff9468; --pass-wash: #12312a; --fail-wash: #3d2117;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: clamp(1.35rem, 5vw, 1.75rem); line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.2rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 44rem; }
code { font: .9em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.kicker { margin: 0; color: var(--soft); }
.verdict { margin: 0; font-size: 1.25rem; }
.ratio { font-size: 1.25rem; display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .6rem; }
.ratio strong { font-size: 2.25rem; line-height: 1.2; white-space: nowrap; }
.ratio, table, dd { font-variant-numeric: tabular-nums; }
.badge { padding: .1em .55em; border-radius: 1em; font-weight: 600; white-space: nowrap; background: var(--wash); }
.pass { color: var(--pass); background: var(--pass-wash); }
.fail { color: var(--fail); background: var(--fail-wash); }
.reasons { margin-top: 1rem; padding: .75rem 1rem; border-left: 4px solid var(--fail); background: var(--fail-wash); }
.reasons h2 { margin: 0; padding: 0; border: 0; font-size: 1rem; }
.reasons ul { margin: .25rem 0 0; padding-left: 1.25rem; }
dl { display: grid; grid-template-columns: fit-content(50%) 1fr; gap: .4rem 1.25rem; margin: 0; }
dl div { display: contents; }
dt { color: var(--soft); }
dd { margin: 0; }
figure { margin: 1rem 0; }
figcaption { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; margin-bottom: .5rem; }
.key::before {
  content: ""; display: inline-block; width: 1.75em; margin-right: .5em; vertical-align: .25em;
  border-top: 3px solid var(--engine);
}
.key.floor::before { border-top: 3px dashed var(--floor); }
svg { display: block; width: 100%; max-width: 44rem; height: auto; }
svg text { font-size: 10px; fill: var(--soft); }
svg .out text, svg text.out { fill: var(--fail); font-weight: 600; }
.grid { stroke: var(--line); }
.axis { stroke: var(--soft); }
.limit { stroke: var(--fail); stroke-dasharray: 3 3; }
.hover { fill: transparent; }
.hover:hover { fill: var(--shade); fill-opacity: .3; }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
path.engine { stroke: var(--engine); }
path.floor { stroke: var(--floor); stroke-dasharray: 5 3; }
circle.engine, .area.engine { fill: var(--engine); }
circle.floor, .area.floor { fill: var(--floor); }
.area { fill-opacity: .18; }
.bar { fill: var(--engine); }
.out .bar { fill: var(--fail); }
.scroll {
  overflow-x: auto; margin: .75rem 0;
  background:
    linear-gradient(to left, var(--paper), var(--paper)) right / 1rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / .75rem 100% no-repeat scroll;
}
table { border-collapse: collapse; min-width: 100%; font-size: .9375rem; line-height: 1.4; }
th, td { padding: .4rem .5rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th, .text { overflow-wrap: break-word; }
td { white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom; }
tr > :first-child { position: sticky; left: 0; padding-left: 0; background: var(--paper); }
tr > :first-child, .text { text-align: left; }
tbody th { font-weight: 500; min-width: 7rem; max-width: 12rem; }
tr:has(.context) > th { min-width: 0; }
td.text { min-width: 9rem; max-width: 24rem; white-space: normal; }
td.text:has(.context) { min-width: 16rem; }
.context { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; background: var(--wash); outline: 1px solid var(--engine); border-radius: 2px; }
summary { cursor: pointer; padding: .5rem 0; color: var(--engine); }
@media (max-width: 40rem) {
  svg text { font-size: 14px; }
}
@media print {
  :root { color-scheme: light; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; background: none; }
  table { font-size: .7rem; }
  tr, figure { break-inside: avoid; }
  details::details-content { content-visibility: visible; }
}
"""
