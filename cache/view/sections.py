"""Fill the page of `cache.view`: the figures, tables and charts that its template view.html shows.

collect.gather -> Findings -> render -> HTML
"""

from __future__ import annotations

import base64
from collections import defaultdict

import numpy as np
from markupsafe import Markup

from cache.maintenance.inventory import codec_errors
from cache.store.ledger import MediaRecord
from cache.view import page, thumbnails
from cache.view.charts import Line, Mark, Series, bar, channel_chart, histogram, line_chart, number
from cache.view.collect import Findings, Shown
from cache.view.statistics import OUTLIER
from configs.console import bytes_text

PLURALS = {"image": "images", "frame": "frames"}
STYLES = {"image": "a", "frame": "b"}
"""Array -> CSS class of its colour in charts."""

REASONS_SHOWN = 12
"""Reasons of failures that are listed; `cache.ls --failures` lists all."""


def render(found: Findings) -> str:
    """Return the HTML of the page."""
    one, space = found.channels, found.reader.paths.name
    stages: dict[str, set[str]] = defaultdict(set)
    for group in found.failures:
        stages[group.stage].update(group.sources)
    return page.render(
        page.HERE / "view.html",
        title=space,
        found=found,
        summary=summary(found),
        facts=facts(found),
        pairs=neighbour_pairs(found),
        charts=[_norms(found), _errors(found), _directions(found)],
        channels=channel_chart(
            one.mean,
            one.std,
            title="Channels",
            note=f"{one.constant:.0%} of the energy is the mean vector, which is equal in every token "
            f"({one.tokens:,} tokens of {PLURALS[found.channels_array]}).",
        ),
        top_channels=[
            (at, f"{one.mean[at]:.3g}", f"{one.std[at]:.3g}", f"{one.energy[at]:.2%}")
            for at in one.largest
        ],
        coverage=[
            (d.name, f"{d.samples:,}", f"{d.media:,}", f"{d.failed:,}", bar(share), percent(share))
            for d in found.datasets
            for share in [d.coverage[space]]
        ],
        stages=[(stage, f"{len(sources):,}") for stage, sources in stages.items()],
        reasons=[
            (group.stage, group.error, group.host, group.dataset, f"{len(group.sources):,}")
            for group in found.failures[:REASONS_SHOWN]
        ],
        codes=base64.b64encode(found.token_codes.tobytes()).decode(),
        # What the template calls.
        thumbnails=thumbnails,
        number=number,
        figures=figures,
        zip=zip,
    )


def percent(share: float) -> str:
    """Return a share as percent: `100%` only if it is 1."""
    return "100%" if share >= 1 else f"{min(share, 0.999):.1%}"


def summary(found: Findings) -> list[tuple[str, str, str]]:
    """Return the most important figures: (value, label, explanation)."""
    reader = found.reader
    indexes = [reader.index[array] for array in found.norms]
    nbytes = sum(sum(index.nbytes.values()) for index in indexes)
    errors = np.concatenate([index.errors for index in indexes])
    mean = errors.mean(dtype=np.float64)
    long = np.concatenate([one.values > one.limit for one in found.norms.values()])
    share = f"{long.mean():.2%}" if long.any() else "none"
    shown = [
        *((f"{reader.rows(array):,}", PLURALS[array], "rows") for array in found.norms),
        (bytes_text(nbytes), "on disk", f"as {reader.spec.codec}, checksums included"),
        (f"{mean:.2%}", "codec error", f"mean; {errors.max():.2%} at most"),
        (share, "outlier tokens", f"longer than {OUTLIER:g} × the median"),
    ]
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
    reduced = ", large JPEGs decoded at a reduced scale" if spec.decode == "reduced" else ""
    listed = [
        ("encoder", f"{spec.encoder} ({spec.architecture})"),
        ("blocks, from 0", ", ".join(map(str, spec.blocks))),
        ("input", f"{spec.image_size} × {spec.image_size} px, {spec.fit}{reduced}"),
        ("computed in", f"{spec.compute_dtype}, batches of {spec.batch_size}"),
        ("stored as", f"{spec.codec} in {spec.container}, {' or '.join(sizes)} a row"),
        ("newest shard", f"{found.newest:%Y-%m-%d %H:%M} UTC"),
    ]
    return listed + ([("being written by", found.writer)] if found.writer else [])


# ---- images and videos


def figures(one: Shown) -> list[tuple[str, str]]:
    """Return (name, value) of what is measured on an image or a video, and what the tables say of it."""
    chosen, norms = one.chosen, one.norms
    known = one.item.record or MediaRecord(source="")
    outliers = int(one.outliers.sum())
    length = f", {known.duration_s:.1f} s" if known.duration_s is not None else ""
    video = f"{len(chosen.rows)} of {chosen.of} frames{length}"
    rows = {
        "view": video if chosen.array == "frame" else chosen.views[0],
        "size": known.width and f"{known.width:,} × {known.height:,} px, {bytes_text(known.bytes)}",
        "codec error": f"{chosen.errors.mean():.3%}",
        "norm": f"{number(float(np.median(norms)))}, max {number(float(norms.max()))}",
        "outliers": outliers and f"{outliers:,} of {norms.size:,} tokens",
        "CLS norm": ", ".join(number(norm) for norm in one.cls_norms.ravel().tolist()),
        "data set": ", ".join(one.item.datasets),
        "note": known.note,
    }
    return [(name, str(value)) for name, value in rows.items() if value]


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
        [Series(PLURALS[array], one.values, STYLES[array]) for array, one in found.norms.items()],
        title="Token norms",
        axis="norm",
        marks=[
            Mark(first.median, f"median {number(first.median)}"),
            Mark(first.limit, f"outliers beyond {number(first.limit)}"),
        ],
        note=" ".join(notes),
    )


def _errors(found: Findings) -> Markup:
    reader, errors = found.reader, codec_errors(found.reader)
    notes = [
        f"{PLURALS[array].capitalize()}: mean {one.mean:.3%}, p99 {one.p99:.3%}, "
        f"max {one.largest:.3%} ({reader.rows(array):,} rows)."
        for array, one in errors.items()
    ]
    first = errors[found.channels_array]
    return histogram(
        [
            Series(PLURALS[array], 100 * reader.index[array].errors, STYLES[array])
            for array in errors
        ],
        title="Codec error per row",
        axis="relative error, %",
        marks=[
            Mark(100 * first.mean, f"mean {first.mean:.3%}"),
            Mark(100 * first.p99, f"p99 {first.p99:.3%}"),
        ],
        note=" ".join(notes),
    )


def _directions(found: Findings) -> Markup:
    total = 100 * np.cumsum(found.basis.shares)
    marks = [Mark(3, f"3, the colours: {total[2]:.0f}%")] if len(total) >= 3 else []
    for level in (90, 99):
        count = int(np.searchsorted(total, level)) + 1
        if 3 < count <= len(total):
            marks.append(Mark(count, f"{count:,}: {level}%"))
    # Points at even distances on the logarithmic axis.
    counts = np.unique(np.geomspace(1, max(1, len(total)), 160).round().astype(int))[: len(total)]
    points = list(zip(counts.tolist(), total[counts - 1].tolist(), strict=True))
    return line_chart(
        [Line(points=points, style="a")],
        title="Variance in the first directions, %",
        axis="principal directions",
        log_x=True,
        marks=marks,
        note=f"Of {found.basis.tokens:,} tokens on this page, without outliers.",
    )
