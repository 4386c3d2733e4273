"""Draw charts as inline SVG: histograms, lines, channels.

Each function computes positions and fills charts.html; colours come from style.css. `style` is one or more
CSS classes: `a`, `b` or `band` for a colour; `thin`, `faint` or `dash` for a line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

from cache.view.page import HERE, render

WIDTH, WIDE, HEIGHT = 540, 1120, 270
"""SVG units of a chart, of one as wide as two and the gap between them, and of both."""

TOP, MARKED_TOP = 14, 56
"""Upper edge of a plot, and of one with marks: three rows of labels are above it."""

BINS = 48
"""Bins of a histogram, at most."""

MAX_POINTS = 480
"""Points of a line, at most: more cannot be seen, and a long run has 100,000 steps."""

SMALLEST, LARGEST = 1e-300, 1e300
"""Values that are drawn."""

Values = npt.NDArray[np.floating]
Point = tuple[float, float]


class Series(NamedTuple):
    """One distribution of a histogram."""

    label: str
    values: Values
    """(n,) finite, n > 0."""
    style: str


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a line chart."""

    points: Sequence[Point]
    """(x, y) with rising x; points whose y is not finite are not drawn."""
    style: str
    label: str = ""
    """Text in the legend; empty for none."""
    dots: bool = False
    """Mark every point: for lines of few points."""


class Mark(NamedTuple):
    """A vertical line with a label at a value of the x axis."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The range of values that a chart shows, and where they are in SVG units."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: int = WIDTH
    log_x: bool = False
    log_y: bool = False
    top: int = TOP
    """Upper edge of the plot."""

    height, left, bottom = HEIGHT, 52, HEIGHT - 30

    @property
    def right(self) -> int:
        """Right edge of the plot."""
        return self.width - 18

    def x(self, value: float) -> float:
        """Return where a value of the x axis is."""
        return _position(value, self.x_range, self.log_x, self.left, self.right)

    def y(self, value: float) -> float:
        """Return where a value of the y axis is."""
        return _position(value, self.y_range, self.log_y, self.bottom, self.top)

    def path(self, points: Iterable[Point]) -> str:
        """Return an SVG path through the points."""
        return "M" + "L".join(f"{self.x(x)} {self.y(y)}" for x, y in points)


def _position(value: float, ends: Point, log: bool, start: int, stop: int) -> float:
    """Return `start` for a value at the lower end, `stop` at the upper one."""
    low, high = ends
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return round(start + (stop - start) * (value - low) / max(high - low, 1e-12), 1)


def histogram(
    series: Sequence[Series], *, title: str, axis: str, marks: Sequence[Mark] = (), note: str = ""
) -> Markup:
    """Draw distributions over one axis, each as shares of its own values."""
    edges = bins(np.concatenate([one.values for one in series]))
    low, high = float(edges[0]), float(edges[-1])
    shares = [np.histogram(one.values, edges)[0] / len(one.values) for one in series]
    y_ticks = nice_ticks(0, max(float(s.max()) for s in shares), about=4)
    axes = Axes(x_range=(low, high), y_range=(0, y_ticks[-1]), top=MARKED_TOP)
    shapes = []
    for one, share in zip(series, shares, strict=True):
        heights = [0.0, *np.repeat(share, 2).tolist(), 0.0]
        corners = zip(np.repeat(edges, 2).tolist(), heights, strict=True)
        shapes.append((f"area {one.style}", axes.path(corners) + "Z"))
    beyond = sum(int((one.values > high).sum()) for one in series)
    return _draw(
        axes,
        title=title,
        axis=axis,
        x_ticks=[(tick, number(tick)) for tick in nice_ticks(low, high) if low <= tick <= high],
        y_ticks=[(tick, f"{100 * tick:g}%") for tick in y_ticks],
        shapes=shapes,
        marks=[mark for mark in marks if low <= mark.value <= high],
        legend=[(one.style, one.label) for one in series],
        note=f"{note} {beyond:,} beyond the right edge.".strip() if beyond else note,
    )


def bins(values: Values) -> Values:
    """Return edges (b + 1,) of bins for values (n,), n > 0: evenly spaced, at round values.

    Values far above all others may be beyond the last edge: they would press the rest into one bin.
    """
    low, high = float(values.min()), float(values.max())
    bulk_low, bulk_high = (float(end) for end in np.percentile(values, [0.5, 99.5]))
    if bulk_high > bulk_low:
        high = min(high, bulk_high + 1.5 * (bulk_high - bulk_low))
    if high <= low:  # all are equal: a bin around them
        low, high = low - (abs(low) or 1.0) / 20, high + (abs(high) or 1.0) / 20
    about = max(4, min(BINS, round(2 * len(values) ** (1 / 3))))  # Rice's rule
    return np.array(nice_ticks(low, high, about=about))


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    axis: str = "step",
    wide: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    marks: Sequence[Mark] = (),
    note: str = "",
) -> Markup:
    """Draw lines over an axis from 0, or from 1 if it is logarithmic; `wide` over the whole page."""
    drawn = [(line, thinned(finite(line.points, positive=log_y))) for line in lines]
    shown = [(line, points) for line, points in drawn if points]
    values = [y for _, points in shown for _, y in points]
    if not values:
        return _draw(None, title=title, wide=wide)
    first, last = int(log_x), max(x for _, points in shown for x, _ in points)
    x_ticks = (log_ticks if log_x else nice_ticks)(first, last)
    y_ticks = (log_ticks if log_y else nice_ticks)(min(values), max(values))
    axes = Axes(
        x_range=(first, last),
        y_range=(min(*values, y_ticks[0]), max(*values, y_ticks[-1])),
        width=WIDE if wide else WIDTH,
        log_x=log_x,
        log_y=log_y,
        top=MARKED_TOP if marks else TOP,
    )
    return _draw(
        axes,
        title=title,
        wide=wide,
        axis=axis,
        x_ticks=[(tick, number(tick)) for tick in x_ticks if tick <= last],
        y_ticks=[(tick, number(tick)) for tick in y_ticks],
        shapes=[(f"line {line.style}", axes.path(points)) for line, points in shown],
        dots=[(line.style, x, y) for line, points in shown if line.dots for x, y in points],
        marks=marks,
        legend=[(line.style, line.label) for line, _ in shown if line.label],
        note=note,
    )


def channel_chart(mean: Values, std: Values, *, title: str, note: str) -> Markup:
    """Draw mean (C,) as spikes and mean ± std (C,) as a band over C channels."""
    low, high = mean - std, mean + std
    y_ticks = nice_ticks(min(float(low.min()), 0.0), max(float(high.max()), 0.0))
    axes = Axes(x_range=(-0.5, len(mean) - 0.5), y_range=(y_ticks[0], y_ticks[-1]), width=WIDE)
    band = [*enumerate(high.tolist()), *reversed(list(enumerate(low.tolist())))]
    spikes = [axes.path([(at, 0), (at, value)]) for at, value in enumerate(mean.tolist())]
    return _draw(
        axes,
        title=title,
        wide=True,
        axis="channel",
        x_ticks=[(tick, number(tick)) for tick in nice_ticks(0, len(mean)) if tick < len(mean)],
        y_ticks=[(tick, number(tick)) for tick in y_ticks],
        shapes=[("area band", axes.path(band) + "Z"), ("line thin a", "".join(spikes))],
        legend=[("a", "mean"), ("band", "± standard deviation")],
        note=note,
    )


def bar(share: float, mark: float | None = None) -> Markup:
    """Return a bar over `share` (0 to 1) of a table cell; `mark` (0 to 1) adds a line across it."""
    line = "" if mark is None else Markup('<i style="left:{:.2%}"></i>').format(mark)
    return Markup('<div class="bar"><b style="width:{:.2%}"></b>{}</div>').format(share, line)


def _draw(axes: Axes | None, *, title: str, note: str = "", **values: object) -> Markup:
    """Fill charts.html.

    Args:
        axes: None for a chart without values.
        title: text above the chart.
        note: text below the chart.
        values: any of `wide` (as wide as the page), `axis` (name of the x axis), `x_ticks` and `y_ticks`
            (value, label), `shapes` (CSS classes, SVG path), `dots` (CSS class, x value, y value), `marks`
            (of `Mark`) and `legend` (CSS class, label).
    """
    note = note if axes else "Nothing recorded."
    return render(HERE / "charts.html", axes=axes, title=title, note=note, **values)


# ---- values


def finite(points: Sequence[Point], *, positive: bool = False) -> list[Point]:
    """Return the points that can be drawn: finite, and above 0 where `positive`.

    Near the limits of floats an axis has no ticks: beyond 1e300 counts as infinite, below 1e-300 as 0.
    """
    values = [(x, y if abs(y) >= SMALLEST else 0.0) for x, y in points if abs(y) <= LARGEST]
    return [(x, y) for x, y in values if y > 0 or not positive]


def thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most `MAX_POINTS` points: means of equal stretches."""
    if len(points) <= MAX_POINTS:
        return list(points)
    groups = np.array_split(np.array(points), MAX_POINTS)
    return [(float(x), float(y)) for x, y in (group.mean(axis=0) for group in groups)]


def smoothed(points: Sequence[Point], half_life: float | None = None) -> list[Point]:
    """Return the exponential mean of points, without bias at the start.

    The weight of a point is halved after `half_life` further points; None: a 150th of all, at least 2.
    """
    keep = 0.5 ** (1.0 / (half_life or max(2.0, len(points) / 150)))
    result, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1.0
        result.append((x, total / weight))
    return result


def number(value: float) -> str:
    """Return a short label: `0.25`, `1,000`, `2e-05`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2g}"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round values that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    # The slack keeps a rounding error from adding a tick.
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten that cover [low, high], with 2 and 5 between them if those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]
