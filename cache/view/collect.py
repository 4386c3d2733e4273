"""Read and measure everything that the page of one space shows; sections.py puts it into HTML.

The tokens of a row are g × g cells of the patch grid, row by row from the top left. A CLS token, if the space
keeps one, is before them. T tokens, W values a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.format.spec import ARRAYS
from cache.maintenance.encode_command import encode_command
from cache.maintenance.inventory import DatasetSummary, Failures, list_failures, summarise_datasets
from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import MediaRecord
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.view import sampling, statistics
from cache.view.media import MediaItem, look_up, thumbnail
from cache.view.sampling import Chosen
from cache.view.statistics import Basis, Channels, Floats
from configs import UserError, load

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
class Shown:
    """One image or video on the page, with n rows: one of an image, some frames of a video."""

    number: int
    """From 1, in the order of the page."""
    chosen: Chosen
    """Its rows."""
    item: MediaItem
    """What the tables say of it."""
    thumbnail: Image.Image | None
    """The image as the encoder saw it, small; None for a video, and if there is no file to show."""
    absent: str
    """Why an image has no thumbnail."""
    aspect: float
    """Width over height of what the patch grid covers."""
    colours: npt.NDArray[np.uint8]
    """(n, g, g, 3) red, green, blue of each token."""
    norms: Floats
    """(n, g, g)"""
    outliers: npt.NDArray[np.bool_]
    """(n, g, g)"""
    cls_norms: Floats
    """(n, 1) lengths of the CLS tokens; (n, 0) if the space keeps none."""
    start: int
    """Position of its first token in `Findings.token_codes`."""
    neighbour: tuple[int, float] | None
    """Position in `Findings.shown` of the most similar other one, and the cosine of their mean features."""

    @property
    def name(self) -> str:
        """`image 1`, `video 2`."""
        return f"{'video' if self.chosen.array == 'frame' else 'image'} {self.number}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Findings:
    """Everything that the page of one space shows."""

    reader: FeatureReader
    images: int
    """Images and videos that were asked for."""
    seed: int
    """Seed of the draw."""
    newest: datetime
    """When the newest shard was committed."""
    writer: str | None
    """The job that writes to the space now; None if there is none."""
    shown: tuple[Shown, ...]
    """Images before videos."""
    basis: Basis
    """Principal directions of all shown tokens: what the colours mean."""
    token_codes: npt.NDArray[np.int8]
    """(T, directions) unit vectors of all shown tokens, times 127, for the page's script to compare. There
    are no directions if the tokens are too many for `MAX_CODE_BYTES`."""
    norms: dict[str, Norms]
    """Array -> its token norms, for each array that has rows."""
    channels: Channels
    """Statistics of the channels of `channels_array`."""
    channels_array: str
    """The first array that has rows."""
    datasets: list[DatasetSummary]
    """Coverage of each data set of the cache."""
    not_opened: str
    """About the first media file that was not opened because the cache alone names it; empty if none."""
    failures: list[Failures]
    """Failures in the whole cache, the most frequent first."""


def gather(
    root: CacheRoot,
    reader: FeatureReader,
    *,
    images: int,
    seed: int,
    keep: Path | None = None,
    media: Path | None = None,
) -> Findings:
    """Read and measure a space.

    Args:
        root: the cache that holds the space.
        reader: a reader of the space that checks rows.
        images: images and videos to show, at most.
        seed: seed of the draw.
        keep: folder of kept downloads.
        media: folder of media that are opened beside those that this machine encoded.

    Raises:
        UserError, CacheError: there is no folder `media`, the space has no rows yet, or one of its files is
            damaged.
    """
    arrays = [array for array in ARRAYS if reader.rows(array)]
    if not arrays:
        raise UserError(
            f"{reader.path} has no rows yet: nothing to show. Encode something: "
            + encode_command(root, None, reader, load("encoders"))
        )
    measured = {array: _measure(reader, array, seed) for array in arrays}
    norms = {array: found for array, (found, _) in measured.items()}
    local = LocalMedia(root, media=media, folders=[keep] if keep is not None else [])
    shown, basis, token_codes = _show(
        root, reader, sampling.choose(reader, images, seed), norms, local, keep
    )
    last = [reader.paths.commit(array, int(reader.index[array].shards[-1])) for array in arrays]
    return Findings(
        reader=reader,
        images=images,
        seed=seed,
        newest=datetime.fromtimestamp(max(path.stat().st_mtime for path in last), UTC),
        writer=driver_holder(reader.paths),
        shown=shown,
        basis=basis,
        token_codes=token_codes,
        norms=norms,
        not_opened=local.note(),
        channels=measured[arrays[0]][1],
        channels_array=arrays[0],
        datasets=summarise_datasets(root, {reader.paths.name: reader}),
        failures=list_failures(root),
    )


def _measure(reader: FeatureReader, array: str, seed: int) -> tuple[Norms, Channels]:
    rows = sampling.sample_rows(reader, array, seed)
    features = sampling.read_rows(reader, array, rows)
    tokens = features[:, int(reader.spec.keep_cls) :].reshape(-1, reader.spec.width)
    values = statistics.norms(tokens)
    median = float(np.median(values))
    limit = statistics.OUTLIER * median
    # Outliers would make all other tokens equally dark.
    low, high = (float(end) for end in np.percentile(values[values <= limit], [0.5, 99.5]))
    found = Norms(values=values, rows=len(rows), median=median, limit=limit, low=low, high=high)
    return found, statistics.channels(tokens)


def _show(
    root: CacheRoot,
    reader: FeatureReader,
    chosen: Sequence[Chosen],
    norms: dict[str, Norms],
    local: LocalMedia,
    keep: Path | None,
) -> tuple[tuple[Shown, ...], Basis, npt.NDArray[np.int8]]:
    """Read the chosen rows; the basis is fitted to the tokens of all of them."""
    spec = reader.spec
    features = [sampling.read_rows(reader, one.array, one.rows) for one in chosen]
    grids = []  # (n, g, g, W) of each
    for one, rows in zip(chosen, features, strict=True):
        side = spec.grid // spec.pool(one.array)
        grids.append(rows[:, int(spec.keep_cls) :].reshape(-1, side, side, spec.width))
    lengths = [statistics.norms(grid) for grid in grids]
    outliers = [some > norms[one.array].limit for one, some in zip(chosen, lengths, strict=True)]
    tokens = np.concatenate([grid.reshape(-1, spec.width) for grid in grids])
    basis = statistics.fit_basis(tokens, np.concatenate([some.ravel() for some in outliers]))
    alike = statistics.neighbours(np.stack([grid.mean(axis=(0, 1, 2)) for grid in grids]))
    items = look_up(root, [one.key for one in chosen])
    shown, start = [], 0
    for at, one in enumerate(chosen):
        item, image, absent = items[one.key], None, ""
        if one.array == "image":
            image, absent = thumbnail(item.sources, one.key, spec, local, keep)
        shown.append(
            Shown(
                number=at + 1,
                chosen=one,
                item=item,
                thumbnail=image,
                absent=absent,
                aspect=_aspect(item.record, spec.fit),
                colours=basis.colours(grids[at]),
                norms=lengths[at],
                outliers=outliers[at],
                cls_norms=statistics.norms(features[at][:, : int(spec.keep_cls)]),
                start=start,
                neighbour=alike[at] if alike else None,
            )
        )
        start += lengths[at].size
    return tuple(shown), basis, _token_codes(tokens, basis)


def _aspect(record: MediaRecord | None, fit: str) -> float:
    """Return the image's own width over height if it was squashed into the square of the encoder."""
    if fit != "squash" or record is None or not record.width or not record.height:
        return 1.0
    aspect = record.width / record.height
    return aspect if 1 / WIDEST <= aspect <= WIDEST else 1.0


def _token_codes(tokens: Floats, basis: Basis) -> npt.NDArray[np.int8]:
    count = min(MAX_DIRECTIONS, MAX_CODE_BYTES // len(tokens))
    if count < MIN_DIRECTIONS:
        count = 0
    vectors = basis.project(tokens, min(count, len(basis.directions)))
    lengths = np.maximum(statistics.norms(vectors), 1e-12)[:, None]
    return (vectors / lengths * 127).round().astype(np.int8)
