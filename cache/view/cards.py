"""Images and videos of the page: each beside its features, its norms and its figures."""

from __future__ import annotations

import base64
import math
from html import escape

import numpy as np

from cache.view import thumbnails as images
from cache.view.charts import number
from cache.view.collect import Findings, Norms, Shown, Tile
from configs.console import bytes_text

SOURCES_SHOWN = 3
WIDEST = 2.0
"""Width over height (or the inverse) up to which an image keeps its shape in the page."""
NARROW_STRIP = 4
"""Frames up to which two videos stand side by side; also frames in a line on a phone."""


def gallery(kind: str, found: Findings) -> str:
    """The section of the images, or of the videos, that are shown."""
    starts = np.cumsum([0, *(len(s.tiles) * s.tiles[0].norms.size for s in found.shown)]).tolist()
    card = image_card if kind == "image" else video_card
    shown = [(at, one) for at, one in enumerate(found.shown) if one.chosen.kind == kind]
    if not shown:
        return ""
    cards = "".join(card(found, one, at, starts[at]) for at, one in shown)
    title, style = {"image": ("Images", "cards"), "frame": ("Videos", "videos")}[kind]
    rows = f"{found.reader.rows(kind):,}"
    count = f"{len(shown)} of {rows}" if kind == "image" else f"{len(shown)}, of {rows} frames"
    first = shown[0][0] == 0  # on the page: says what the colours mean
    return (
        f'<section><h2>{title} <small>{count}</small></h2><div class="legends">'
        f"{_colour_legend(found) if first else ''}{_norm_legend(found, kind)}</div>"
        f'{_touch_legend(found) if first else ""}<div class="{style}">{cards}</div></section>'
    )


def _colour_legend(found: Findings) -> str:
    shares = found.basis.shares[:3]
    each = " + ".join(f"{share:.0%}" for share in shares)
    return (
        '<p><i class="rgb"></i><span><b>Colour</b>: the three directions in which the tokens on this page '
        f"differ most, as red, green and blue: {sum(shares):.0%} of their variance ({each}). One basis "
        "for all images and videos: equal colours mean similar features.</span></p>"
    )


def _norm_legend(found: Findings, kind: str) -> str:
    norms = found.norms[kind]
    rings = any(
        tile.outliers.any() for s in found.shown if s.chosen.kind == kind for tile in s.tiles
    )
    limit = number(norms.limit)
    outliers = (
        f"Rings mark outliers, longer than {limit}."
        if rings
        else f"No token here is an outlier (longer than {limit})."
    )
    return (
        f'<p><i class="heat"></i><span><b>Norm</b>: the length of each token, dark {number(norms.low)} '
        f"to bright {number(norms.high)}. {outliers}</span></p>"
    )


def _touch_legend(found: Findings) -> str:
    if found.touch is None:
        return ""
    count = found.touch.codes.shape[1]
    return (
        '<p class="touch" hidden><b>Touch a token</b>, and every other one on the page turns brighter the '
        "more it is like it. Click to hold, click again to let go. "
        f"<small>Cosine in {count} directions, {found.touch.variance:.0%} of the variance.</small></p>"
    )


# ---- cards


def image_card(found: Findings, one: Shown, at: int, start: int) -> str:
    """An image, its features, its norms. `start`: where its tokens are in the script's data."""
    tile, fit = one.tiles[0], _square_fit(_shape(one, found.reader.spec.fit))
    features = colour_map(tile, start, f"features of image {at + 1}")
    norms = norm_map(tile, found.norms["image"], f"image {at + 1}")
    return (
        f'<article id="m{at}"><div class="pair"><div class="stage"><div {fit}>{_image(one)}</div></div>'
        f'<div class="stage"><div {fit}>{features}</div></div></div>'
        f'<div class="about"><div class="stage small"><div {fit}>{norms}</div></div>'
        f"<div>{_said(one, at)}{_figures(found, one)}</div></div></article>"
    )


def _image(one: Shown) -> str:
    if one.thumbnail is None:
        return f'<span class="absent">{escape("image " + one.absent)}</span>'
    alt = one.medium.said or "the image as the encoder saw it"
    return f'<img class="thumb" alt="{escape(alt)}" src="{images.jpeg(one.thumbnail)}">'


def video_card(found: Findings, one: Shown, at: int, start: int) -> str:
    """The features of a video as a strip of frames in time order, norms and times below."""
    width, height = _shape(one, found.reader.spec.fit)
    fit = f'style="aspect-ratio:{width:.4g}/{height:.4g}"'
    frames = []
    for i, tile in enumerate(one.tiles):
        when = f"{tile.time_s:.2f} s" if math.isfinite(tile.time_s) else tile.view
        what = f"video {at + 1} at {when}"
        error = f"<small>{tile.error:.2%}</small>" if math.isfinite(tile.error) else ""
        frames.append(
            f"<li><div {fit}>{colour_map(tile, start + i * tile.norms.size, f'features of {what}')}</div>"
            f'<div class="below"><div {fit}>{norm_map(tile, found.norms["frame"], what)}</div>'
            f"<span>{escape(when)}{error}</span></div></li>"
        )
    count = len(frames)
    style = f"--n:{count};--m:{min(count, NARROW_STRIP)}"
    wide = ' class="wide"' if count > NARROW_STRIP else ""
    return (
        f'<article id="m{at}"{wide}><ol class="strip" style="{style}">{"".join(frames)}</ol>'
        f'<div class="about"><div>{_said(one, at)}{_figures(found, one)}</div></div></article>'
    )


def _shape(one: Shown, fit: str) -> tuple[float, float]:
    """Width and height of what the patch grid covers: the image's own where it was squashed."""
    if fit != "squash" or not one.medium.width or not one.medium.height:
        return 1.0, 1.0
    shape = one.medium.width / one.medium.height
    return (shape, 1.0) if 1 / WIDEST <= shape <= WIDEST else (1.0, 1.0)


def _square_fit(shape: tuple[float, float]) -> str:
    """Style of a box of that shape, as large as a square allows."""
    width, height = shape
    share = 100 * min(1.0, width / height)
    return f'style="width:{share:.1f}%;aspect-ratio:{width:.4g}/{height:.4g}"'


def colour_map(tile: Tile, start: int, label: str) -> str:
    """The tokens as colours, outliers ringed."""
    side = len(tile.norms)
    return (
        f'<div class="map" data-at="{start}" data-side="{side}"><img alt="{escape(label)}, as colours" '
        f'src="{images.png(tile.colours)}">{_rings(tile, side)}</div>'
    )


def _rings(tile: Tile, side: int) -> str:
    places = np.argwhere(tile.outliers).tolist()
    if not places:
        return ""
    ring = "".join(f'<circle cx="{x}.5" cy="{y}.5" r=".46"/>' for y, x in places)
    return (
        f'<svg viewBox="0 0 {side} {side}" preserveAspectRatio="none" role="img" '
        f'aria-label="{len(places)} outlier tokens"><g class="under">{ring}</g>{ring}</svg>'
    )


def norm_map(tile: Tile, norms: Norms, what: str) -> str:
    """The lengths of the tokens, dark to bright."""
    pixels = images.heat(tile.norms, norms.low, norms.high)
    low, high = (number(float(end)) for end in (tile.norms.min(), tile.norms.max()))
    label = f"token norms of {what}, {low} to {high}"
    return f'<div class="map"><img alt="{escape(label)}" src="{images.png(pixels)}"></div>'


def _said(one: Shown, at: int) -> str:
    asked = f"<small>{escape(one.medium.asked)}</small> " if one.medium.asked else ""
    said = f'<p class="said">{asked}{escape(one.medium.said)}</p>' if one.medium.said else ""
    return f"<h3>{name_of(one).capitalize()} {at + 1}</h3>{said}"


def _figures(found: Findings, one: Shown) -> str:
    medium, tiles = one.medium, one.tiles
    errors = [tile.error for tile in tiles if math.isfinite(tile.error)]
    norms = np.concatenate([tile.norms.ravel() for tile in tiles])
    outliers = sum(int(tile.outliers.sum()) for tile in tiles)
    rows = [("key", key_code(one.chosen.key)), ("view", escape(_views(one)))]
    if medium.width:
        rows.append(
            ("size", f"{medium.width:,} × {medium.height:,} px, {bytes_text(medium.nbytes)}")
        )
    if errors:
        rows.append(("codec error", f"{np.mean(errors):.3%}"))
    median, longest = number(float(np.median(norms))), number(float(norms.max()))
    rows.append(("norm", f"{median}, max {longest}"))
    if outliers:
        rows.append(("outliers", f"{outliers:,} of {norms.size:,} tokens"))
    if tiles[0].cls_norm is not None:
        rows.append(("CLS norm", ", ".join(number(tile.cls_norm or 0.0) for tile in tiles)))
    if one.neighbour:
        other, cosine = one.neighbour
        name = f"{name_of(found.shown[other])} {other + 1}"
        rows.append(("most like", f'<a href="#m{other}">{name}</a>, {cosine:.2f}'))
    if medium.datasets:
        rows.append(("data set", escape(", ".join(medium.datasets))))
    if medium.note:
        rows.append(("note", escape(medium.note)))
    rows.append(("source", _sources(one)))
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in rows)
    return f"<dl>{cells}</dl>"


def name_of(one: Shown) -> str:
    """What to call it."""
    return "video" if one.chosen.kind == "frame" else "image"


def _views(one: Shown) -> str:
    if one.chosen.kind == "image":
        return one.chosen.views[0]
    length = f", {one.medium.duration_s:.1f} s" if one.medium.duration_s is not None else ""
    return f"{len(one.tiles)} of {one.chosen.of} frames{length}"


def _sources(one: Shown) -> str:
    texts = list(one.medium.sources[:SOURCES_SHOWN]) or ["in no table any more"]
    more = len(one.medium.sources) - SOURCES_SHOWN
    texts += [f"and {more:,} more"] if more > 0 else []
    return "".join(f'<span class="source">{escape(text)}</span>' for text in texts)


def key_code(text: str) -> str:
    """64 hex digits, cut short for the eye; one click selects all of them."""
    return f'<code class="key" title="{escape(text)}">{escape(text)}</code>'


# ---- likeness


def neighbours(found: Findings) -> str:
    """Each media with the one most like it, the most similar first; a mutual pair stands once."""
    pairs = {
        (min(at, one.neighbour[0]), max(at, one.neighbour[0])): one.neighbour[1]
        for at, one in enumerate(found.shown)
        if one.neighbour
    }
    if not pairs:
        return ""

    def image(at: int) -> str:
        one = found.shown[at]
        label = f"{name_of(one)} {at + 1}"
        image, style = one.thumbnail, ""
        if image is None:
            source, style = images.png(one.tiles[0].colours), ' class="pixels"'
        else:
            source = images.stamp(image)
        return f'<a href="#m{at}"><img alt="{label}"{style} src="{source}"></a>'

    cells = "".join(
        f"<li>{image(a)}{image(b)}<span>{cosine:.2f}</span></li>"
        for (a, b), cosine in sorted(pairs.items(), key=lambda pair: -pair[1])
    )
    return (
        '<section><h2>Nearest neighbours</h2><p class="hint">Each of the above beside the one whose mean '
        "feature is most similar: their cosine, after what all of them share is taken off. An encoder "
        "that sees puts like beside like; random weights go by colour and brightness.</p>"
        f'<ul class="pairs">{cells}</ul></section>'
    )


def touch_data(found: Findings) -> str:
    """What the script needs to compare tokens: no script itself."""
    if found.touch is None:
        return ""
    text = base64.b64encode(found.touch.codes.tobytes()).decode()
    count = found.touch.codes.shape[1]
    return f'<script type="text/plain" id="tokens" data-k="{count}">{text}</script>'
