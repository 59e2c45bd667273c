"""Charts of the report page, as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamella.parity.report.markup import Markup, join_markup, number_text, tag

# Charts are drawn in these units and scale with the page. Left of LEFT stand the labels of the y axis.
WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 56, 468, 26, 222

LOG_FROM = 30  # values that differ by more than this factor get a logarithmic axis


# Charts.


@dataclass(frozen=True)
class Axis:
    """Axis that maps values from `low` to `high` to coordinates from `start` to `stop`; values beyond are clamped."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @classmethod
    def fit(cls, values: Sequence[float], start: float, stop: float) -> Axis:
        """Return an axis from 0 for the values, or a logarithmic axis over whole decades if they differ widely."""
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        if high > LOG_FROM * low:
            return cls(*decades(low, high), start, stop, log=True)
        return cls(0.0, high * 1.08, start, stop)

    def at(self, value: float) -> float:
        """Return the coordinate of a value."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (self.stop - self.start) * (value - low) / (high - low), 1)

    def ticks(self) -> list[float]:
        """Return round values between the ends, at most about seven so that their labels fit."""
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


def decades(low: float, high: float) -> tuple[float, float]:
    """Return the powers of ten around a range, at least one decade apart."""
    first = math.floor(math.log10(low))
    return 10.0**first, 10.0 ** max(math.ceil(math.log10(high)), first + 1)


def svg(label: str, height: float, *children: object) -> Markup:
    """Return a chart of the given height."""
    return tag("svg", *children, viewBox=f"0 0 {WIDTH} {height}", role="img", aria_label=label)


def svg_line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def svg_text(x: float, y: float, text: str, anchor: str = "start", class_: str | None = None) -> Markup:
    """Return a text."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_)


def x_ticks(axis: Axis, top: float, bottom: float) -> Markup:
    """Return the ticks and grid lines of the x axis."""
    return join_markup(
        part
        for tick in axis.ticks()
        for part in (
            svg_line(axis.at(tick), top, axis.at(tick), bottom, "grid"),
            svg_text(axis.at(tick), bottom + 17, number_text(tick), "middle"),
        )
    )


def y_ticks(axis: Axis) -> Markup:
    """Return the ticks and grid lines of the y axis."""
    return join_markup(
        part
        for tick in axis.ticks()
        for part in (
            svg_line(LEFT, axis.at(tick), RIGHT, axis.at(tick), "grid"),
            svg_text(LEFT - 6, axis.at(tick) + 4, number_text(tick), "end"),
        )
    )


def plane(label: str, x: Axis, y: Axis, x_label: str, y_label: str, *content: object) -> Markup:
    """Return a chart with two labelled axes and `content` drawn over them."""
    return svg(
        label,
        HEIGHT,
        x_ticks(x, TOP, BOTTOM),
        y_ticks(y),
        svg_line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"),
        svg_text(0, 12, y_label),
        svg_text(RIGHT, HEIGHT - 8, x_label, "end"),
        *content,
    )


def hover(left: float, right: float, tooltip: str) -> Markup:
    """Return an invisible column over the plane that shows a tooltip."""
    width = round(right - left, 1)
    return tag("rect", tag("title", tooltip), x=left, y=TOP, width=width, height=BOTTOM - TOP, class_="hover")


def chart_legend(report: Mapping[str, Any]) -> Markup:
    """Return the legend: the colours of engine and noise floor."""
    return tag(
        "figcaption",
        tag("span", f"{report['engine']} (engine)", class_="key engine"),
        tag("span", f"{report['oracle']} in {report['dtype']} (floor)", class_="key floor"),
    )


def curve(points: Iterable[tuple[float, float | None]], class_: str) -> Markup:
    """Return a line through points in drawing units, interrupted where y is None."""
    path, marks, pen = "", [], "M"
    for x, y in points:
        if y is None:
            pen = "M"
            continue
        path += f"{pen}{x} {y}"
        marks.append(tag("circle", cx=x, cy=y, r=2.2, class_=class_))
        pen = "L"
    return join_markup([tag("path", d=path, class_=f"curve {class_}"), *marks])


def staircase(edges: Sequence[float], heights: Sequence[float], x: Axis, y: Axis, class_: str) -> Markup:
    """Return the filled outline of a histogram."""
    steps = "".join(f"V{y.at(height)}H{x.at(edge)}" for height, edge in zip(heights, edges[1:], strict=True))
    return tag("path", d=f"M{x.at(edges[0])} {BOTTOM}{steps}V{BOTTOM}Z", class_=f"curve area {class_}")
