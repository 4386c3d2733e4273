"""Distributions, coverage and failures of the page: charts and tables."""

from __future__ import annotations

from html import escape

import numpy as np

from cache.format.spec import ARRAYS
from cache.store.ledger import STAGES
from cache.view.charts import Mark, Series, curve, histogram, number, spikes
from cache.view.collect import Findings

KIND_NAMES = {"image": "images", "frame": "frames"}
STYLES = {"image": "a", "frame": "b"}
"""Kind -> its colour in the charts."""

REASONS_SHOWN = 12
"""Of failures."""


def percent(share: float) -> str:
    """Never `100%` unless it is."""
    return "100%" if share >= 1 else f"{min(share, 0.999):.1%}"


# ---- distributions


def distributions(found: Findings) -> str:
    """Charts of norms, codec errors, directions and channels."""
    charts = (_norms(found), _errors(found), _directions(found), _loudest(found), _channels(found))
    return f'<section><h2>Distributions</h2><div class="charts">{"".join(charts)}</div></section>'


def _norms(found: Findings) -> str:
    series, notes = [], []
    for kind, one in found.norms.items():
        series.append(Series(label=KIND_NAMES[kind], values=one.values, style=STYLES[kind]))
        notes.append(
            f"{len(one.values):,} tokens of {one.rows:,} {KIND_NAMES[kind]}, longest "
            f"{number(float(one.values.max()))}; {one.outliers:.2%} beyond {number(one.limit)}."
        )
    first = found.norms[found.channels_kind]
    marks = [
        Mark(value=first.median, label=f"median {number(first.median)}"),
        Mark(value=first.limit, label=f"outliers beyond {number(first.limit)}"),
    ]
    return histogram(series, title="Token norms", axis="norm", marks=marks, note=" ".join(notes))


def _errors(found: Findings) -> str:
    series, notes = [], []
    marks: list[Mark] = []
    for kind in ARRAYS:
        if kind not in found.errors or not len(found.errors[kind].values):
            continue
        one, name = found.errors[kind], KIND_NAMES[kind]
        mean, p99 = float(one.values.mean()), float(np.percentile(one.values, 99))
        series.append(Series(label=name, values=100 * one.values, style=STYLES[kind]))
        notes.append(
            f"{name.capitalize()}: mean {mean:.3%}, p99 {p99:.3%}, max {one.values.max():.3%} "
            f"({len(one.values):,} rows, {one.shards:,} of {one.of:,} shards)."
        )
        marks = marks or [
            Mark(value=100 * mean, label=f"mean {mean:.3%}"),
            Mark(value=100 * p99, label=f"p99 {p99:.3%}"),
        ]
    return histogram(
        series,
        title="Codec error by row",
        axis="relative error, %",
        marks=marks,
        note=" ".join(notes),
    )


def _directions(found: Findings) -> str:
    shares = found.basis.shares
    total = np.cumsum(shares)
    marks = []
    if len(total) >= 3:
        marks.append(Mark(value=3, label=f"3, the colours: {total[2]:.0%}"))
    for level in (0.9, 0.99):
        count = int(np.searchsorted(total, level)) + 1
        if 3 < count <= len(total):
            marks.append(Mark(value=count, label=f"{count:,}: {level:.0%}"))
    note = f"Of {found.basis.tokens:,} tokens on this page; outliers are left out."
    return curve(
        shares.tolist(),
        title="Variance in the first directions",
        axis="principal directions",
        marks=marks,
        note=note,
    )


def _loudest(found: Findings) -> str:
    one = found.channels
    rows = "".join(
        f'<tr><th scope="row">{at}</th><td>{one.mean[at]:.3g}</td><td>{one.std[at]:.3g}</td>'
        f"<td>{one.energy[at]:.2%}</td></tr>"
        for at in one.largest
    )
    even = 1 / len(one.energy)
    return (
        "<figure><figcaption><b>Loudest channels</b></figcaption><table><thead><tr>"
        '<th scope="col">channel</th><th scope="col">mean</th><th scope="col">std</th>'
        f'<th scope="col">energy</th></tr></thead><tbody>{rows}</tbody></table>'
        f'<p class="note">Share of the mean square; an even one would be {even:.2%}.</p></figure>'
    )


def _channels(found: Findings) -> str:
    one = found.channels
    note = (
        f"{one.constant:.0%} of the energy is the mean vector, the same in every token "
        f"({one.tokens:,} tokens of {KIND_NAMES[found.channels_kind]})."
    )
    return spikes(one.mean, one.std, one.largest, title="Channels", note=note)


# ---- coverage


def coverage(found: Findings) -> str:
    """How much of each data set has features here."""
    if not found.datasets:
        return '<section><h2>Coverage</h2><p class="hint">No data sets in this cache.</p></section>'
    name = found.reader.paths.name
    rows = "".join(
        f'<tr><th scope="row">{escape(one.name)}</th><td>{one.samples:,}</td><td>{one.media:,}</td>'
        f'<td>{one.failed:,}</td><td class="bar"><div><b style="width:{one.coverage[name]:.2%}"></b>'
        f"</div></td><td>{percent(one.coverage[name])}</td></tr>"
        for one in found.datasets
    )
    left_out = "".join(
        f'<p class="hint">{escape(one.name)}: {one.mismatched:,} '
        + ("sample" if one.mismatched == 1 else "samples")
        + " left out, whose source has another sha256 than "
        + ("it states.</p>" if one.mismatched == 1 else "they state.</p>")
        for one in found.datasets
        if one.mismatched
    )
    return (
        '<section><h2>Coverage</h2><p class="hint">A sample is covered when all its images and videos have '
        'rows here.</p><div class="scroll"><table><thead><tr><th scope="col">data set</th>'
        '<th scope="col">samples</th><th scope="col">media</th><th scope="col">failed</th>'
        '<th scope="colgroup" colspan="2">covered</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{left_out}</section>"
    )


def failures(found: Findings) -> str:
    """What could not be had, by stage, and the most frequent reasons."""
    if not found.failures:
        return '<section><h2>Failures</h2><p class="hint">None in this cache.</p></section>'
    by_stage: dict[str, set[str]] = {stage: set() for stage in STAGES}
    for group in found.failures:
        by_stage[group.stage].update(group.sources)
    counts = "".join(
        f'<tr><th scope="row">{stage}</th><td>{len(sources):,}</td></tr>'
        for stage, sources in by_stage.items()
        if sources
    )
    reasons = "".join(
        f'<tr><th scope="row">{escape(one.stage)}</th><td class="text">{escape(one.error)}</td>'
        f'<td class="text">{escape(one.host)}</td><td class="text">{escape(one.dataset)}</td>'
        f"<td>{len(one.sources):,}</td></tr>"
        for one in found.failures[:REASONS_SHOWN]
    )
    more = len(found.failures) - REASONS_SHOWN
    rest = f" {more:,} rarer reasons are left out." if more > 0 else ""
    return (
        '<section><h2>Failures</h2><p class="hint">Of the whole cache. All of them: '
        f"<code>python -m cache.ls --failures</code>.{rest}</p>"
        '<div class="failures"><div><table><thead><tr><th scope="col">stage</th><th scope="col">media</th>'
        f'</tr></thead><tbody>{counts}</tbody></table></div><div class="scroll"><table><thead><tr>'
        '<th scope="col">stage</th><th scope="col" class="text">reason</th>'
        '<th scope="col" class="text">host</th><th scope="col" class="text">data set</th>'
        f'<th scope="col">media</th></tr></thead><tbody>{reasons}</tbody></table></div></div></section>'
    )
