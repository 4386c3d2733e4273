"""Fill the page of `cache.view`: the figures, tables and charts that its template view.html shows.

collect.gather -> Findings -> render -> HTML
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from cache.store.ledger import STAGES
from cache.view import page, thumbnails
from cache.view.charts import Mark, Series, bar, channel_chart, cumulative, histogram, number
from cache.view.collect import Findings, Shown
from cache.view.statistics import OUTLIER
from configs.console import bytes_text

PLURALS = {"image": "images", "frame": "frames"}
STYLES = {"image": "a", "frame": "b"}
"""Array -> CSS class of its colour in charts."""

REASONS_SHOWN = 12
"""Reasons of failures that are listed; `cache.ls --failures` lists all."""

SOURCES_SHOWN = 3
"""Paths and URLs of one image or video that are listed."""


def render(found: Findings) -> str:
    """Return the HTML of the page."""
    one = found.channels
    stages = {
        stage: {
            source for group in found.failures if group.stage == stage for source in group.sources
        }
        for stage in STAGES
    }
    html = page.render(
        page.HERE / "view.html",
        title=found.reader.paths.name,
        found=found,
        images=[shown for shown in found.shown if shown.chosen.array == "image"],
        videos=[shown for shown in found.shown if shown.chosen.array == "frame"],
        summary=summary(found),
        facts=facts(found),
        pairs=neighbour_pairs(found),
        charts=[_norms(found), _errors(found), _directions(found)],
        channels=_channels(found),
        top_channels=[
            (at, f"{one.mean[at]:.3g}", f"{one.std[at]:.3g}", f"{one.energy[at]:.2%}")
            for at in one.largest
        ],
        coverage=[
            (d.name, f"{d.samples:,}", f"{d.media:,}", f"{d.failed:,}", bar(share), percent(share))
            for d in found.datasets
            for share in [d.coverage[found.reader.paths.name]]
        ],
        stages=[(stage, f"{len(sources):,}") for stage, sources in stages.items() if sources],
        reasons=[
            (group.stage, group.error, group.host, group.dataset, f"{len(group.sources):,}")
            for group in found.failures[:REASONS_SHOWN]
        ],
        # What the template calls.
        thumbnails=thumbnails,
        number=number,
        figures=figures,
        sources=sources_of,
        any_outlier=any_outlier,
    )
    return str(html)


def percent(share: float) -> str:
    """Return a share as percent: `100%` only if it is 1."""
    return "100%" if share >= 1 else f"{min(share, 0.999):.1%}"


def summary(found: Findings) -> list[tuple[str, str, str]]:
    """Return the most important figures: (value, label, explanation)."""
    reader = found.reader
    nbytes = sum(sum(index.nbytes.values()) for index in reader.index.values())
    shown = [(f"{reader.rows(array):,}", PLURALS[array], "rows") for array in found.norms]
    shown.append((bytes_text(nbytes), "on disk", f"as {reader.spec.codec}, checksums included"))
    errors = np.concatenate([one.values for one in found.errors.values()])
    if len(errors):
        shown.append((f"{errors.mean():.2%}", "codec error", f"mean; {errors.max():.2%} at most"))
    long = np.concatenate([one.values > one.limit for one in found.norms.values()])
    share = f"{long.mean():.2%}" if long.any() else "none"
    shown.append((share, "outlier tokens", f"longer than {OUTLIER:g} × the median"))
    if found.datasets:
        total = sum(one.samples for one in found.datasets)
        covered = sum(one.coverage[reader.paths.name] * one.samples for one in found.datasets)
        share = percent(covered / total if total else 1.0)
        shown.append((share, "covered", f"of {total:,} samples"))
    return shown


def facts(found: Findings) -> list[tuple[str, str]]:
    """Return (name, value) of what decides a row, and of the state of the space."""
    spec = found.reader.spec
    sizes = dict.fromkeys(bytes_text(spec.row_bytes(array)) for array in found.norms)
    listed = [
        ("encoder", f"{spec.encoder} ({spec.architecture})"),
        ("blocks, from 0", ", ".join(map(str, spec.blocks))),
        ("input", f"{spec.image_size} × {spec.image_size} px, {spec.fit}"),
        ("computed in", f"{spec.compute_dtype}, batches of {spec.batch_size}"),
        ("stored as", f"{spec.codec} in {spec.container}, {' or '.join(sizes)} a row"),
        ("newest shard", f"{found.newest:%Y-%m-%d %H:%M} UTC" if found.newest else "unknown"),
    ]
    return listed + ([("being written by", found.writer)] if found.writer else [])


# ---- images and videos


def figures(one: Shown) -> list[tuple[str, str]]:
    """Return (name, value) of what is measured on an image or a video, and what the tables say of it."""
    chosen, item, tiles = one.chosen, one.item, one.tiles
    errors = [tile.error for tile in tiles if tile.error is not None]
    norms = np.concatenate([tile.norms.ravel() for tile in tiles])
    outliers = sum(int(tile.outliers.sum()) for tile in tiles)
    length = f", {item.duration_s:.1f} s" if item.duration_s is not None else ""
    video = f"{len(tiles)} of {chosen.of} frames{length}"
    rows = {
        "view": video if chosen.array == "frame" else chosen.views[0],
        "size": item.width and f"{item.width:,} × {item.height:,} px, {bytes_text(item.nbytes)}",
        "codec error": errors and f"{np.mean(errors):.3%}",
        "norm": f"{number(float(np.median(norms)))}, max {number(float(norms.max()))}",
        "outliers": outliers and f"{outliers:,} of {norms.size:,} tokens",
        "CLS norm": ", ".join(number(tile.cls_norm) for tile in tiles if tile.cls_norm is not None),
        "data set": ", ".join(item.datasets),
        "note": item.note,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


def sources_of(one: Shown) -> list[str]:
    """Return the paths and URLs to list."""
    found = one.item.sources or ("not in the media table",)
    more = len(found) - SOURCES_SHOWN
    return [*found[:SOURCES_SHOWN], *([f"and {more:,} more"] if more > 0 else [])]


def any_outlier(shown: Sequence[Shown]) -> bool:
    """Return whether a token of these is an outlier."""
    return any(tile.outliers.any() for one in shown for tile in one.tiles)


def neighbour_pairs(found: Findings) -> list[tuple[tuple[Shown, Shown], float]]:
    """Return each image and video with its nearest neighbour, and their cosine, the most similar first.

    A pair that is mutual appears once.
    """
    pairs = {
        (min(at, one.neighbour[0]), max(at, one.neighbour[0])): one.neighbour[1]
        for at, one in enumerate(found.shown)
        if one.neighbour
    }
    ordered = sorted(pairs.items(), key=lambda pair: -pair[1])
    return [((found.shown[a], found.shown[b]), cosine) for (a, b), cosine in ordered]


# ---- charts


def _norms(found: Findings) -> Markup:
    notes = [
        f"{len(one.values):,} tokens of {one.rows:,} {PLURALS[array]}, longest "
        f"{number(float(one.values.max()))}; {one.outliers:.2%} beyond {number(one.limit)}."
        for array, one in found.norms.items()
    ]
    first = found.norms[found.channels_array]
    return histogram(
        [
            Series(label=PLURALS[array], values=one.values, style=STYLES[array])
            for array, one in found.norms.items()
        ],
        title="Token norms",
        axis="norm",
        marks=[
            Mark(value=first.median, label=f"median {number(first.median)}"),
            Mark(value=first.limit, label=f"outliers beyond {number(first.limit)}"),
        ],
        note=" ".join(notes),
    )


def _errors(found: Findings) -> Markup:
    series, notes = [], []
    marks: list[Mark] = []
    for array, one in found.errors.items():
        if not len(one.values):
            continue
        values, name = 100 * one.values, PLURALS[array]
        mean, p99 = float(values.mean()), float(np.percentile(values, 99))
        series.append(Series(label=name, values=values, style=STYLES[array]))
        notes.append(
            f"{name.capitalize()}: mean {mean:.3f}%, p99 {p99:.3f}%, max {values.max():.3f}% "
            f"({len(values):,} rows, {one.shards:,} of {one.of:,} shards)."
        )
        marks = marks or [
            Mark(value=mean, label=f"mean {mean:.3f}%"),
            Mark(value=p99, label=f"p99 {p99:.3f}%"),
        ]
    return histogram(
        series,
        title="Codec error per row",
        axis="relative error, %",
        marks=marks,
        note=" ".join(notes),
    )


def _directions(found: Findings) -> Markup:
    total = np.cumsum(found.basis.shares)
    marks = []
    if len(total) >= 3:
        marks.append(Mark(value=3, label=f"3, the colours: {total[2]:.0%}"))
    for level in (0.9, 0.99):
        count = int(np.searchsorted(total, level)) + 1
        if 3 < count <= len(total):
            marks.append(Mark(value=count, label=f"{count:,}: {level:.0%}"))
    return cumulative(
        found.basis.shares.tolist(),
        title="Variance in the first directions",
        axis="principal directions",
        marks=marks,
        note=f"Of {found.basis.tokens:,} tokens on this page, without outliers.",
    )


def _channels(found: Findings) -> Markup:
    one = found.channels
    note = (
        f"{one.constant:.0%} of the energy is the mean vector, which is equal in every token "
        f"({one.tokens:,} tokens of {PLURALS[found.channels_array]})."
    )
    return channel_chart(one.mean, one.std, one.largest, title="Channels", note=note)
