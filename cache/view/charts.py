"""The charts of a page about features, as inline SVG: colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 440, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 22, 54, 30
BINS = 48
"""Of a histogram, at most."""

TAG_APART = 0.08
"""Of a chart's width: channels nearer than that to a louder one go without their number."""

Values = npt.NDArray[np.floating]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One of the distributions in a histogram."""

    label: str
    values: Values
    """(n,) finite."""
    style: str
    """CSS class of its colour: a or b."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A value pointed out on the x axis."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Bins:
    """Where a histogram's bins are, and what lies beyond the last one."""

    edges: Values
    """(n + 1,) ascending, equally far apart, at round values."""
    beyond: int
    """Values past the last edge."""

    def shares(self, values: Values) -> Values:
        """(n,) share of `values` in each bin."""
        counts, _ = np.histogram(values, self.edges)
        return counts / max(1, len(values))


def bins(values: Values) -> Bins:
    """Bins for values (n,), at least one: a few stragglers do not press all the others into one bin."""
    low, high = float(values.min()), float(values.max())
    bulk_low, bulk_high = (float(end) for end in np.percentile(values, [0.5, 99.5]))
    if bulk_high > bulk_low:
        high = min(high, bulk_high + 1.5 * (bulk_high - bulk_low))
    if high <= low:  # all are equal: a bin around them
        low, high = low - (abs(low) or 1.0) / 20, high + (abs(high) or 1.0) / 20
    about = max(4, min(BINS, round(2 * len(values) ** (1 / 3))))  # Rice's rule
    edges = np.array(nice_ticks(low, high, about=about))
    return Bins(edges=edges, beyond=int((values > edges[-1]).sum()))


def histogram(
    series: Sequence[Series], *, title: str, axis: str, marks: Sequence[Mark] = (), note: str = ""
) -> str:
    """Distributions over one axis, each as shares of its own values."""
    series = [one for one in series if len(one.values)]
    if not series:
        return _empty(title)
    found = bins(np.concatenate([one.values for one in series]))
    low, high = float(found.edges[0]), float(found.edges[-1])
    shares = [found.shares(one.values) for one in series]
    ticks = nice_ticks(0, max(float(s.max()) for s in shares), about=4)
    frame = _Frame(low=low, high=high, bottom=0.0, top=ticks[-1])
    parts = [frame.y_tick(tick, f"{100 * tick:g}%") for tick in ticks]
    parts += [
        frame.x_tick(tick, number(tick)) for tick in nice_ticks(low, high) if low <= tick <= high
    ]
    for one, share in zip(series, shares, strict=True):
        path = f"M{frame.x(low):.1f} {frame.y(0):.1f}"
        for at, value in enumerate(share):
            left, right = frame.x(float(found.edges[at])), frame.x(float(found.edges[at + 1]))
            path += f"L{left:.1f} {frame.y(value):.1f}L{right:.1f} {frame.y(value):.1f}"
        parts.append(
            f'<path class="area {one.style}" d="{path}L{frame.x(high):.1f} {frame.y(0):.1f}Z"/>'
        )
    parts += _marks(frame, [mark for mark in marks if low <= mark.value <= high])
    if found.beyond:
        note = f"{note} {found.beyond:,} beyond the right edge.".strip()
    legend = "".join(
        f'<span class="legend {one.style}">{escape(one.label)}</span>' for one in series
    )
    said = "; ".join(f"{mark.label} {number(mark.value)}" for mark in marks)
    return _figure(title, legend, parts, axis=axis, note=note, said=said)


def curve(
    shares: Sequence[float], *, title: str, axis: str, marks: Sequence[Mark], note: str
) -> str:
    """A cumulative share, 0 to 1, over 1, 2, 3, ... on a logarithmic axis."""
    if not len(shares):
        return _empty(title)
    total = np.cumsum(shares)
    frame = _Frame(low=0.0, high=max(math.log10(len(total)), 1e-9), bottom=0.0, top=1.0)
    parts = [frame.y_tick(tick, f"{tick:.0%}") for tick in (0, 0.25, 0.5, 0.75, 1)]
    powers = [f * 10**e for e in range(5) for f in (1, 2, 5)]
    parts += [frame.x_tick(math.log10(k), f"{k:,}") for k in powers if k <= len(total)]
    ks = np.unique(np.geomspace(1, len(total), 160).round().astype(int))
    points = [f"{frame.x(math.log10(k)):.1f} {frame.y(float(total[k - 1])):.1f}" for k in ks]
    line = "M" + "L".join(points)
    ends = f"L{frame.x(frame.high):.1f} {frame.y(0):.1f}L{frame.x(0):.1f} {frame.y(0):.1f}Z"
    parts.append(f'<path class="area a bare" d="{line}{ends}"/><path class="line a" d="{line}"/>')
    for mark in marks:
        x, y = frame.x(math.log10(mark.value)), frame.y(float(total[int(mark.value) - 1]))
        parts.append(f'<circle class="dot a" cx="{x:.1f}" cy="{y:.1f}" r="4"/>')
    parts += _marks(frame, [Mark(value=math.log10(m.value), label=m.label) for m in marks])
    said = "; ".join(mark.label for mark in marks)
    return _figure(title, "", parts, axis=axis, note=note, said=said)


def spikes(mean: Values, std: Values, named: Sequence[int], *, title: str, note: str) -> str:
    """A value with its spread for each of many channels: the mean as a spike, +- std as a band."""
    low = min(float((mean - std).min()), 0.0)
    high = max(float((mean + std).max()), 0.0, low + 1e-12)
    total = len(mean)

    def y(value: float) -> float:
        return 100 * (high - value) / (high - low)

    band = "".join(
        f"M{i} {y(m - s):.2f}V{y(m + s):.2f}"
        for i, (m, s) in enumerate(zip(mean, std, strict=True))
    )
    spike = "".join(f"M{i} {y(0):.2f}V{y(m):.2f}" for i, m in enumerate(mean))
    tagged: list[int] = []
    for at in named:
        if all(abs(at - other) > TAG_APART * total for other in tagged):
            tagged.append(at)
    labels = "".join(
        f'<span class="tag" style="left:{100 * (i + 0.5) / total:.2f}%">{i}</span>' for i in tagged
    )
    return (
        f'<figure class="wide"><figcaption><b>{escape(title)}</b><span class="legend a">mean</span>'
        f'<span class="legend faint">± standard deviation</span></figcaption>'
        f'<div class="spikes"><span class="top">{number(high)}</span>'
        f'<span class="zero" style="top:{y(0):.1f}%">0</span><span class="bottom">{number(low)}</span>'
        f'<svg viewBox="-0.5 0 {total} 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(title)}: {escape(note)}"><path class="spread" d="{band}"/>'
        f'<path class="axis" d="M-0.5 {y(0):.2f}H{total - 0.5}"/><path class="spike" d="{spike}"/></svg>'
        f'<div class="tags">{labels}</div></div><p class="note">{escape(note)}</p></figure>'
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """The plotted range, and where its values lie in the picture."""

    low: float
    high: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def y_tick(self, value: float, label: str) -> str:
        y = self.y(value)
        return (
            f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>'
        )

    def x_tick(self, value: float, label: str) -> str:
        return (
            f'<text class="tick" x="{self.x(value):.1f}" y="{HEIGHT - BOTTOM + 17}" '
            f'text-anchor="middle">{label}</text>'
        )


def _marks(frame: _Frame, marks: Sequence[Mark]) -> list[str]:
    """Vertical lines, the labels in three rows above the plot so that neighbours do not touch."""
    parts = []
    for at, mark in enumerate(sorted(marks, key=lambda mark: mark.value)):
        x, y = frame.x(mark.value), 12 + 15 * (at % 3)
        anchor = "end" if x > 0.62 * WIDTH else "start"
        shift = -4 if anchor == "end" else 4
        parts.append(
            f'<path class="mark" d="M{x:.1f} {y - 9}V{HEIGHT - BOTTOM}"/>'
            f'<text class="label" x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">'
            f"{escape(mark.label)}</text>"
        )
    return parts


def _figure(
    title: str, legend: str, parts: Sequence[str], *, axis: str, note: str, said: str
) -> str:
    label = escape(f"{title}. {said}" if said else title)
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f'<p class="axis-name">{escape(axis)}</p>{note}</figure>'
    )


def _empty(title: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b></figcaption>"
        '<p class="note">Nothing recorded.</p></figure>'
    )


def number(value: float) -> str:
    """A short label: `0.25`, `1,000`, `2e-05`."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:.2g}"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        high = low + (abs(low) * 0.1 or 1.0)
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw)
    count = math.ceil(high / step - 1e-9) - math.floor(low / step + 1e-9)
    first = math.floor(low / step + 1e-9)
    return [round((first + i) * step, 12) for i in range(count + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten around [low, high], with 2 and 5 between them when it is narrow."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    ticks = [f * 10.0**e for e in range(first, last + 1) for f in factors]
    below = max((t for t in ticks if t <= low), default=ticks[0])
    above = min((t for t in ticks if t >= high), default=ticks[-1])
    return [t for t in ticks if below <= t <= above]
