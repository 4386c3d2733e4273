"""Line charts as inline SVG: no library, no script, colours from the page's CSS variables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from cache.view.charts import log_ticks, nice_ticks, number

Point = tuple[float, float]

HEIGHT = 260
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 28
MOST_POINTS = 480
"""A line is thinned to this: more cannot be seen, and a long run has 100,000 steps."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve."""

    label: str
    points: Sequence[Point]
    """(step, value), steps rising; values that are not finite are left out."""
    style: str
    """CSS class: `a` or `b` for a colour, `faint` for the raw values behind a smoothed line."""
    dots: bool = False
    """Mark every point: for few of them."""


def chart(lines: Sequence[Line], *, title: str, width: int, log: bool = False) -> str:
    """An SVG of lines over steps, `width` units wide; `log` for a logarithmic y axis."""
    shown = [(line, thinned(finite(line.points, positive=log))) for line in lines]
    values = [y for _, points in shown for _, y in points]
    if not values:
        return f'<p class="empty">{escape(title)}: nothing recorded.</p>'
    steps = [x for _, points in shown for x, _ in points]
    y_ticks = log_ticks(min(values), max(values)) if log else nice_ticks(min(values), max(values))
    low, high = min(*values, y_ticks[0]), max(*values, y_ticks[-1])
    last = max(steps)

    def x_at(step: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * step / max(last, 1e-9)

    def y_at(value: float) -> float:
        scaled = [math.log10(v) for v in (value, low, high)] if log else [value, low, high]
        share = (scaled[0] - scaled[1]) / max(scaled[2] - scaled[1], 1e-12)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    parts = [
        f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        *(_y_tick(y_at(tick), tick, width) for tick in y_ticks),
        *(_x_tick(x_at(tick), tick) for tick in nice_ticks(0, last) if tick <= last),
    ]
    for line, points in shown:
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if line.dots:
            parts += (
                f'<circle class="dot {line.style}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="2.6"/>'
                for x, y in points
            )
    legend = "".join(
        f'<span class="key {line.style}">{escape(line.label)}</span>'
        for line, _ in shown
        if line.label
    )
    return f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>{''.join(parts)}</svg></figure>"


def _y_tick(y: float, value: float, width: int) -> str:
    return (
        f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    )


def _x_tick(x: float, value: float) -> str:
    return (
        f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
        f"{number(value)}</text>"
    )


def finite(points: Sequence[Point], *, positive: bool = False) -> list[Point]:
    """Points that can be drawn."""
    return [(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not positive)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most MOST_POINTS: means of equal stretches."""
    if len(points) <= MOST_POINTS:
        return list(points)
    edges = [round(i * len(points) / MOST_POINTS) for i in range(MOST_POINTS + 1)]
    groups = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def smoothed(points: Sequence[Point], half_life: float) -> list[Point]:
    """Exponential mean that forgets half after `half_life` points, without the bias of its start."""
    keep = 0.5 ** (1.0 / half_life)
    result, total, weight = [], 0.0, 0.0
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1.0
        result.append((x, total / weight))
    return result
