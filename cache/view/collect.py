"""Read and measure everything that the page of one space shows; sections.py puts it into HTML.

The tokens of a row are g × g cells of the patch grid, row by row from the top left. A CLS token, if the space
keeps one, is before them. T tokens, W values a token.
"""

from __future__ import annotations

import base64
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
from cache.view import sampling, statistics
from cache.view.media import MediaItem, look_up, thumbnail
from cache.view.sampling import Chosen, Errors
from cache.view.statistics import Basis, Channels, Floats
from configs import UserError

MAX_CODE_BYTES = 1 << 20
"""Bytes of token directions in the page, at most. The script compares tokens by them."""

MIN_DIRECTIONS, MAX_DIRECTIONS = 8, 32
"""Principal directions that the script uses. With fewer than the minimum, the page has no comparison."""

WIDEST = 2.0
"""Width over height, or height over width, up to which an image keeps its shape on the page."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Norms:
    """Lengths of the tokens in the sampled rows of one array, without CLS tokens."""

    values: Floats
    """(T,)"""
    rows: int
    """Rows that were sampled."""
    median: float
    limit: float
    """Longer tokens are outliers: `statistics.OUTLIER` times the median."""
    low: float
    """Norm that maps show as dark."""
    high: float
    """Norm that maps show as bright."""

    @property
    def outliers(self) -> float:
        """Share of tokens that are outliers, 0 to 1."""
        return float((self.values > self.limit).mean())


@dataclass(frozen=True, kw_only=True, eq=False)
class Tile:
    """One row as small images."""

    view: str
    """`full`, or `t:<microseconds>` for a frame."""
    time_s: float | None
    """Seconds after the video's first frame; None for an image."""
    error: float | None
    """Relative error of the codec; None if it was not measured."""
    colours: npt.NDArray[np.uint8]
    """(g, g, 3) red, green, blue."""
    norms: Floats
    """(g, g)"""
    outliers: npt.NDArray[np.bool_]
    """(g, g)"""
    cls_norm: float | None
    """Length of the CLS token; None if the space keeps none."""
    start: int
    """Position of the first token in `TokenCodes.codes`."""

    def rings(self) -> list[list[int]]:
        """Return [row, column] of each outlier."""
        cells: list[list[int]] = np.argwhere(self.outliers).tolist()
        return cells


@dataclass(frozen=True, kw_only=True, eq=False)
class Shown:
    """One image or video on the page."""

    number: int
    """From 1, in the order of the page."""
    chosen: Chosen
    """Its rows."""
    item: MediaItem
    """What the tables say of it."""
    thumbnail: Image.Image | None
    """The image as the encoder saw it, small; None for a video, and if there is no file to show."""
    absent: str
    """Why there is no thumbnail."""
    aspect: float
    """Width over height of what the patch grid covers."""
    tiles: tuple[Tile, ...]
    """One a row, in time order."""
    neighbour: tuple[int, float] | None
    """Position in `Findings.shown` of the most similar other one, and the cosine of their mean features."""

    @property
    def name(self) -> str:
        """`image 1`, `video 2`."""
        return f"{'video' if self.chosen.array == 'frame' else 'image'} {self.number}"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCodes:
    """Directions of all shown tokens, for the page's script to compare."""

    codes: npt.NDArray[np.int8]
    """(T, directions) unit vectors, times 127, tile after tile."""
    variance: float
    """Share of the variance in these directions, 0 to 1."""

    def base64(self) -> str:
        """Return the codes as text."""
        return base64.b64encode(self.codes.tobytes()).decode()


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Everything that the page of one space shows."""

    reader: FeatureReader
    images: int
    """Images and videos that were asked for."""
    seed: int
    """Seed of the draw."""
    newest: datetime | None
    """When the newest shard was committed."""
    writer: str | None
    """The job that writes to the space now; None if there is none."""
    shown: tuple[Shown, ...]
    """Images before videos."""
    basis: Basis
    """Principal directions of all shown tokens: what the colours mean."""
    token_codes: TokenCodes | None
    """None if the shown tokens are too many for `MAX_CODE_BYTES`."""
    norms: dict[str, Norms]
    """Array -> its token norms, for each array that has rows."""
    channels: Channels
    """Statistics of the channels of `channels_array`."""
    channels_array: str
    """The first array that has rows."""
    errors: dict[str, Errors]
    """Array -> its codec errors, for each array that has rows."""
    datasets: list[DatasetSummary]
    """Coverage of each data set of the cache."""
    failures: list[Failures]
    """Failures in the whole cache, the most frequent first."""


def gather(
    root: CacheRoot, reader: FeatureReader, *, images: int, seed: int, keep: Path | None
) -> Findings:
    """Read and measure a space.

    Args:
        root: the cache that holds the space.
        reader: a reader of the space that checks rows.
        images: images and videos to show, at most.
        seed: seed of the draw.
        keep: folder of kept downloads.

    Raises:
        UserError, CacheError: the space has no rows yet, or one of its files is damaged.
    """
    arrays = [array for array in ARRAYS if reader.rows(array)]
    if not arrays:
        raise UserError(
            f"{reader.path} has no rows yet: nothing to show. Encode something: "
            f"python -m encode.run --dataset NAME --features {root.path}"
        )
    measured = {array: _measure(reader, array, seed) for array in arrays}
    norms = {array: found for array, (found, _) in measured.items()}
    shown, basis, token_codes = _show(
        root, reader, sampling.choose(reader, images, seed), norms, keep
    )
    return Findings(
        reader=reader,
        images=images,
        seed=seed,
        newest=sampling.newest_commit(reader.paths, arrays),
        writer=driver_holder(reader.paths),
        shown=shown,
        basis=basis,
        token_codes=token_codes,
        norms=norms,
        channels=measured[arrays[0]][1],
        channels_array=arrays[0],
        errors={array: sampling.sample_errors(reader, array, seed) for array in arrays},
        datasets=summarise_datasets(root, {reader.paths.name: reader}),
        failures=list_failures(root),
    )


def _measure(reader: FeatureReader, array: str, seed: int) -> tuple[Norms, Channels]:
    rows = sampling.sample_rows(reader, array, seed)
    tokens = _patches(sampling.read_rows(reader, array, rows), reader).reshape(
        -1, reader.spec.width
    )
    values = statistics.norms(tokens)
    median = float(np.median(values))
    limit = statistics.OUTLIER * median
    # Outliers would make all other tokens equally dark.
    low, high = (float(end) for end in np.percentile(values[values <= limit], [0.5, 99.5]))
    found = Norms(values=values, rows=len(rows), median=median, limit=limit, low=low, high=high)
    return found, statistics.channels(tokens)


def _patches(features: Floats, reader: FeatureReader) -> Floats:
    """Return rows (n, tokens, W) without their CLS token."""
    return features[:, int(reader.spec.keep_cls) :]


def _show(
    root: CacheRoot,
    reader: FeatureReader,
    chosen: Sequence[Chosen],
    norms: dict[str, Norms],
    keep: Path | None,
) -> tuple[tuple[Shown, ...], Basis, TokenCodes | None]:
    """Read the chosen rows; the basis is fitted to the tokens of all of them."""
    features = [sampling.read_rows(reader, one.array, one.rows) for one in chosen]
    by_item = [_patches(rows, reader).reshape(-1, reader.spec.width) for rows in features]
    limits = np.repeat([norms[one.array].limit for one in chosen], list(map(len, by_item)))
    tokens = np.concatenate(by_item)
    lengths = statistics.norms(tokens)
    outliers = lengths > limits
    basis = statistics.fit_basis(tokens, outliers)
    colours = basis.colours(tokens)
    alike = statistics.neighbours(np.stack([some.mean(axis=0) for some in by_item]))
    items = look_up(root, [one.key for one in chosen])
    shown, start = [], 0
    for at, (one, rows) in enumerate(zip(chosen, features, strict=True)):
        item = items[one.key]
        image, absent = None, "videos are shown by their features"
        if one.array == "image":
            image, absent = thumbnail(item, one.key, reader.spec, keep)
        errors = sampling.row_errors(reader, one.array, one.rows).tolist()
        side = math.isqrt(len(by_item[at]) // len(rows))
        tiles = []
        for i, view in enumerate(one.views):
            here = slice(start, start + side * side)
            tiles.append(
                Tile(
                    view=view,
                    time_s=_finite(one.times[i]),
                    error=_finite(errors[i]),
                    colours=colours[here].reshape(side, side, 3),
                    norms=lengths[here].reshape(side, side),
                    outliers=outliers[here].reshape(side, side),
                    cls_norm=float(statistics.norms(rows[i, 0])) if reader.spec.keep_cls else None,
                    start=start,
                )
            )
            start = here.stop
        shown.append(
            Shown(
                number=at + 1,
                chosen=one,
                item=item,
                thumbnail=image,
                absent=absent,
                aspect=_aspect(item, reader.spec.fit),
                tiles=tuple(tiles),
                neighbour=alike[at] if alike else None,
            )
        )
    return tuple(shown), basis, _token_codes(tokens, basis)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _aspect(item: MediaItem, fit: str) -> float:
    """Return the image's own width over height if it was squashed into the square of the encoder."""
    if fit != "squash" or not item.width or not item.height:
        return 1.0
    aspect = item.width / item.height
    return aspect if 1 / WIDEST <= aspect <= WIDEST else 1.0


def _token_codes(tokens: Floats, basis: Basis) -> TokenCodes | None:
    count = min(MAX_DIRECTIONS, MAX_CODE_BYTES // len(tokens))
    if count < MIN_DIRECTIONS:
        return None
    count = min(count, len(basis.directions))
    if not count:  # all tokens are equal
        return None
    vectors = basis.project(tokens, count)
    lengths = np.maximum(statistics.norms(vectors), 1e-12)[:, None]
    codes = (vectors / lengths * 127).round().astype(np.int8)
    return TokenCodes(codes=codes, variance=float(basis.shares[:count].sum()))
