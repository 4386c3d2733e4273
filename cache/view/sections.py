"""Fill the page of `cache.view`: the charts and figures that its template view.html shows.

collect.gather -> Findings -> render -> HTML
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from cache.store.ledger import STAGES
from cache.view import page
from cache.view.charts import Mark, Series, cumulative, histogram, number, spikes
from cache.view.collect import Findings, Shown
from cache.view.statistics import OUTLIER
from cache.view.thumbnails import HEAT, heat, jpeg, png, stamp
from configs.console import bytes_text

PLURALS = {"image": "images", "frame": "frames"}
STYLES = {"image": "a", "frame": "b"}
"""Array -> CSS class of its colour in charts."""

LIMITS = {
    "BANNER": 12,  # maps of features across the top
    "NARROW_STRIP": 4,  # frames up to which two videos are side by side, and frames in a line on a phone
    "REASONS_SHOWN": 12,  # reasons of failures
    "SOURCES_SHOWN": 3,  # paths and URLs of one image or video
}
"""How much view.html shows."""


def render(found: Findings) -> str:
    """Return the HTML of the page."""
    functions = (zip, figures, any_outlier, percent, number, png, jpeg, stamp, heat)
    failed = {
        stage: {source for one in found.failures if one.stage == stage for source in one.sources}
        for stage in STAGES
    }
    html = page.render(
        page.HERE / "view.html",
        title=found.reader.paths.name,
        found=found,
        images=[one for one in found.shown if one.chosen.kind == "image"],
        videos=[one for one in found.shown if one.chosen.kind == "frame"],
        boxes=boxes(found),
        facts=facts(found),
        pairs=neighbour_pairs(found),
        charts={
            "norms": _norms(found),
            "errors": _errors(found),
            "directions": _directions(found),
            "channels": _channels(found),
        },
        failed={stage: sources for stage, sources in failed.items() if sources},
        base64=lambda codes: base64.b64encode(codes).decode(),
        HEAT=HEAT,
        **LIMITS,
        **{one.__name__: one for one in functions},
    )
    return str(html)


def percent(share: float) -> str:
    """Return a share as percent: never `100%` below 1."""
    return "100%" if share >= 1 else f"{min(share, 0.999):.1%}"


def boxes(found: Findings) -> list[tuple[str, str, str]]:
    """Return the most important figures: (value, label, explanation)."""
    reader = found.reader
    nbytes = sum(sum(index.nbytes.values()) for index in reader.index.values())
    shown = [(f"{reader.rows(kind):,}", PLURALS[kind], "rows") for kind in found.norms]
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
    sizes = dict.fromkeys(bytes_text(spec.row_bytes(kind)) for kind in found.norms)
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
    chosen, medium, tiles = one.chosen, one.medium, one.tiles
    errors = [tile.error for tile in tiles if math.isfinite(tile.error)]
    norms = np.concatenate([tile.norms.ravel() for tile in tiles])
    outliers = sum(int(tile.outliers.sum()) for tile in tiles)
    length = f", {medium.duration_s:.1f} s" if medium.duration_s is not None else ""
    video = f"{len(tiles)} of {chosen.of} frames{length}"
    rows = {
        "view": video if chosen.kind == "frame" else chosen.views[0],
        "size": medium.width
        and f"{medium.width:,} × {medium.height:,} px, {bytes_text(medium.nbytes)}",
        "codec error": errors and f"{np.mean(errors):.3%}",
        "norm": f"{number(float(np.median(norms)))}, max {number(float(norms.max()))}",
        "outliers": outliers and f"{outliers:,} of {norms.size:,} tokens",
        "CLS norm": ", ".join(number(tile.cls_norm) for tile in tiles if tile.cls_norm is not None),
        "data set": ", ".join(medium.datasets),
        "note": medium.note,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


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
        f"{len(one.values):,} tokens of {one.rows:,} {PLURALS[kind]}, longest "
        f"{number(float(one.values.max()))}; {one.outliers:.2%} beyond {number(one.limit)}."
        for kind, one in found.norms.items()
    ]
    first = found.norms[found.channels_kind]
    return histogram(
        [
            Series(label=PLURALS[kind], values=one.values, style=STYLES[kind])
            for kind, one in found.norms.items()
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
    for kind, one in found.errors.items():
        if not len(one.values):
            continue
        mean, p99 = float(one.values.mean()), float(np.percentile(one.values, 99))
        series.append(Series(label=PLURALS[kind], values=100 * one.values, style=STYLES[kind]))
        notes.append(
            f"{PLURALS[kind].capitalize()}: mean {mean:.3%}, p99 {p99:.3%}, max {one.values.max():.3%} "
            f"({len(one.values):,} rows, {one.shards:,} of {one.of:,} shards)."
        )
        marks = marks or [
            Mark(value=100 * mean, label=f"mean {mean:.3%}"),
            Mark(value=100 * p99, label=f"p99 {p99:.3%}"),
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
        f"({one.tokens:,} tokens of {PLURALS[found.channels_kind]})."
    )
    return spikes(one.mean, one.std, one.largest, title="Channels", note=note)
