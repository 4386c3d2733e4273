"""Everything a page about one space shows, read and measured; `cache.view.page` puts it into HTML.

g x g tokens of a row lie on the patch grid, row by row from the top left; a CLS token stands before them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.format.spec import ARRAYS
from cache.maintenance.inventory import DatasetSummary, Failures, list_failures, summarise_datasets
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.view import statistics as figures
from cache.view.media import Medium, look_up, thumbnail
from cache.view.sampling import Chosen, Errors, Recorded, choose, newest_commit, read_rows, sample
from cache.view.statistics import Basis, Channels, Floats
from configs import UserError

TOUCH_BYTES = 1 << 20
"""Of the directions that the page's script compares patches in."""

TOUCH_DIRECTIONS = (8, 32)
"""At least, else there is nothing to touch; at most."""


WIDEST = 2.0
"""Width over height, or height over width, up to which an image keeps its shape on the page."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Norms:
    """The lengths of the tokens of one kind, on the sampled rows."""

    values: Floats
    """(n,) CLS tokens are not among them."""
    rows: int
    """Rows they are of."""
    median: float
    limit: float
    """What is longer is an outlier: `view_figures.OUTLIER` times the median."""
    low: float
    high: float
    """What the maps show as dark and as bright."""

    @property
    def outliers(self) -> float:
        """Share of the tokens."""
        return float((self.values > self.limit).mean()) if len(self.values) else 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One row as small images."""

    view: str
    """Which view."""
    time_s: float
    """Where in its video; NaN for an image."""
    error: float
    """Relative error of the codec; NaN where it was not measured."""
    colours: npt.NDArray[np.uint8]
    """(g, g, 3)"""
    norms: Floats
    """(g, g)"""
    outliers: npt.NDArray[np.bool_]
    """(g, g)"""
    cls_norm: float | None
    """Length of the CLS token, where one is kept."""
    start: int
    """Its first token in `Touch.codes`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """One image or video."""

    number: int
    """From 1, in the order of the page."""
    chosen: Chosen
    """Its rows."""
    medium: Medium
    """What the tables say of it."""
    thumbnail: Image.Image | None
    """What the encoder saw, small; None for videos, and where there is none to be had."""
    absent: str
    """Why not."""
    aspect: float
    """Width over height of what the patch grid covers."""
    tiles: tuple[Tile, ...]
    """One a row, in time order."""
    neighbour: tuple[int, float] | None
    """Position of the most similar other one in `Findings.shown`, and the cosine of their mean features."""

    @property
    def name(self) -> str:
        """`image 1`, `video 2`."""
        return f"{'video' if self.chosen.kind == 'frame' else 'image'} {self.number}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Touch:
    """Directions of every shown token, for the page's script: unit vectors, times 127."""

    codes: npt.NDArray[np.int8]
    """(tokens, directions), tile after tile."""
    variance: float
    """Share of the variance those directions hold."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """All of it."""

    reader: FeatureReader
    """Of the space."""
    images: int
    """Media asked for."""
    seed: int
    """Of the draw."""
    newest: datetime | None
    """When its last shard was committed."""
    writer: str | None
    """The job that writes to it now."""
    shown: tuple[Shown, ...]
    """Images first."""
    basis: Basis
    """What the colours mean."""
    touch: Touch | None
    """None where so much is shown that it would not fit."""
    norms: dict[str, Norms]
    """By kind, of the kinds that have rows."""
    channels: Channels
    """Of the kind named beside it."""
    channels_kind: str
    errors: dict[str, Errors]
    """By kind, of the kinds that have rows."""
    datasets: list[DatasetSummary]
    failures: list[Failures]


def gather(
    root: CacheRoot, reader: FeatureReader, *, images: int, seed: int, keep: Path | None
) -> Findings:
    """Read and measure a space.

    Args:
        root: the cache it is in.
        reader: of the space, checked.
        images: media to show, at most.
        seed: of the draw.
        keep: folder of kept downloads.

    Raises:
        UserError: the space has no rows yet, or a file of it is damaged.
    """
    kinds = [kind for kind in ARRAYS if reader.rows(kind)]
    if not kinds:
        raise UserError(
            f"{reader.path} has no rows yet: nothing to show. Encode something: "
            f"python -m encode.run --dataset NAME --features {root.path}"
        )
    norms, channels = {}, None
    for kind in kinds:
        norms[kind], of_kind = _distributions(reader, kind, seed)
        channels = channels or of_kind
    assert channels is not None
    recorded = Recorded(reader)
    chosen = choose(reader, images, seed)
    shown, basis, touch = _show(root, reader, chosen, norms, recorded, keep)
    return Findings(
        reader=reader,
        images=images,
        seed=seed,
        newest=newest_commit(reader.paths, kinds),
        writer=driver_holder(reader.paths),
        shown=shown,
        basis=basis,
        touch=touch,
        norms=norms,
        channels=channels,
        channels_kind=kinds[0],
        errors={kind: recorded.spread(kind, seed) for kind in kinds},
        datasets=summarise_datasets(root, {reader.paths.name: reader}),
        failures=list_failures(root),
    )


def _distributions(reader: FeatureReader, kind: str, seed: int) -> tuple[Norms, Channels]:
    rows = sample(reader, kind, seed)
    tokens = patches(read_rows(reader, kind, rows), reader).reshape(-1, reader.spec.width)
    values = figures.norms(tokens)
    median = float(np.median(values))
    limit = figures.OUTLIER * median
    usual = values[values <= limit]
    low, high = (float(end) for end in np.percentile(usual, [0.5, 99.5]))
    found = Norms(values=values, rows=len(rows), median=median, limit=limit, low=low, high=high)
    return found, figures.channels(tokens)


def patches(features: Floats, reader: FeatureReader) -> Floats:
    """Rows (n, tokens, W) without their CLS token."""
    return features[:, int(reader.spec.keep_cls) :]


def _show(
    root: CacheRoot,
    reader: FeatureReader,
    chosen: Sequence[Chosen],
    norms: dict[str, Norms],
    recorded: Recorded,
    keep: Path | None,
) -> tuple[tuple[Shown, ...], Basis, Touch | None]:
    """The media with their images; the basis fitted to all of them; the script's directions."""
    features = [read_rows(reader, one.kind, one.rows) for one in chosen]
    by_medium = [patches(rows, reader).reshape(-1, reader.spec.width) for rows in features]
    limits = np.repeat([norms[one.kind].limit for one in chosen], list(map(len, by_medium)))
    tokens = np.concatenate(by_medium)
    lengths = figures.norms(tokens)
    outliers = lengths > limits
    basis = figures.fit_basis(tokens, outliers)
    colours = basis.colours(tokens)
    alike = figures.neighbours(np.stack([some.mean(axis=0) for some in by_medium]))
    media = look_up(root, [one.key for one in chosen])
    shown, start = [], 0
    for at, (one, rows) in enumerate(zip(chosen, features, strict=True)):
        image, absent = None, "videos are shown by their features"
        if one.kind == "image":
            image, absent = thumbnail(media[one.key], one.key, reader.spec, keep)
        errors = recorded.of_rows(one.kind, one.rows).tolist()
        side = math.isqrt(len(by_medium[at]) // len(rows))
        tiles = []
        for i, view in enumerate(one.views):
            here = slice(start, start + side * side)
            tiles.append(
                Tile(
                    view=view,
                    time_s=float(one.times[i]),
                    error=errors[i],
                    colours=colours[here].reshape(side, side, 3),
                    norms=lengths[here].reshape(side, side),
                    outliers=outliers[here].reshape(side, side),
                    cls_norm=float(figures.norms(rows[i, 0])) if reader.spec.keep_cls else None,
                    start=start,
                )
            )
            start = here.stop
        shown.append(
            Shown(
                number=at + 1,
                chosen=one,
                medium=media[one.key],
                thumbnail=image,
                absent=absent,
                aspect=_aspect(media[one.key], reader.spec.fit),
                tiles=tuple(tiles),
                neighbour=alike[at] if alike else None,
            )
        )
    return tuple(shown), basis, _touch(tokens, basis)


def _aspect(medium: Medium, fit: str) -> float:
    """Return width over height of what the patch grid covers: of the image itself where it was squashed."""
    if fit != "squash" or not medium.width or not medium.height:
        return 1.0
    aspect = medium.width / medium.height
    return aspect if 1 / WIDEST <= aspect <= WIDEST else 1.0


def _touch(tokens: Floats, basis: Basis) -> Touch | None:
    fewest, most = TOUCH_DIRECTIONS
    count = min(most, TOUCH_BYTES // len(tokens))
    if count < fewest:
        return None
    count = min(count, len(basis.directions))
    if not count:  # all tokens are equal
        return None
    vectors = basis.project(tokens, count)
    lengths = np.maximum(figures.norms(vectors), 1e-12)[:, None]
    codes = (vectors / lengths * 127).round().astype(np.int8)
    return Touch(codes=codes, variance=float(basis.shares[:count].sum()))
