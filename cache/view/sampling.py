"""Choose the rows of a space that a page shows and measures, read them, and look up their codec errors.

A space may hold millions of rows. A few are read, spread evenly over all of them; a seed decides which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from cache.format import codec
from cache.store.commits import read_commit
from cache.store.paths import SpacePaths
from cache.store.reader import FeatureReader
from cache.store.row_index import RowIndex
from cache.store.space import read_info

FRAMES = 8
"""Frames shown of one video, evenly from its first to its last."""

SAMPLE_ROWS = 256
"""Rows of each array that distributions are measured on, at most."""

SAMPLE_BYTES = 128 << 20
"""Bytes of these rows as float16, at most: a bound on memory."""

SAMPLE_SHARDS = 256
"""Commits whose recorded errors are read, at most: each takes 2 ms."""

ITEMS_PER_VIDEO = 4
"""One of this many shown items is a video, if the space has images and videos."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The rows of one image, or some rows of one video."""

    array: str
    """The array that holds the rows: image or frame."""
    key: str
    """sha256 (hex) of the file's bytes."""
    views: tuple[str, ...]
    """View of each row, in time order."""
    rows: npt.NDArray[np.int64]
    """(n,) row numbers."""
    times: npt.NDArray[np.float64]
    """(n,) seconds after the first frame; NaN for an image."""
    of: int
    """Rows that the space has of it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """Relative errors of the codec, measured when the rows were packed."""

    values: npt.NDArray[np.float64]
    """(n,) of the rows whose error was measured."""
    shards: int
    """Shards whose errors were read."""
    of: int
    """Shards of the array."""


def spread(count: int, total: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return up to `count` of the numbers 0 to total - 1, ascending: one from each of equal stretches."""
    edges = np.linspace(0, total, min(count, total) + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def choose(reader: FeatureReader, count: int, seed: int) -> list[Chosen]:
    """Choose up to `count` different images and videos, evenly over the rows; images come first."""
    rng = np.random.default_rng(seed)
    images, frames = reader.index["image"], reader.index["frame"]
    video_count = count
    if len(images):
        video_count = max(count // ITEMS_PER_VIDEO, count - len(images))
    videos = [_video(reader, at) for at in _distinct(frames, video_count, rng)]
    positions = _distinct(images, count - len(videos), rng)
    return [_chosen(reader, "image", np.array([at]), of=1) for at in positions] + videos


def _distinct(index: RowIndex, count: int, rng: np.random.Generator) -> list[int]:
    """Return positions of rows of up to `count` different keys."""
    found: dict[str, int] = {}
    # Rows of one key are adjacent, so a draw of few rows may hit a key twice: then draw more.
    for factor in (1, 16):
        for position in spread(factor * count, len(index), rng).tolist():
            if len(found) < count:
                found.setdefault(index.identity(position)[0], position)
    return sorted(found.values())


def _video(reader: FeatureReader, position: int) -> Chosen:
    """Choose frames of the video that has a row at `position` of the index; its rows are adjacent."""
    index = reader.index["frame"]
    key, _ = index.identity(position)
    first = last = position
    while first > 0 and index.identity(first - 1)[0] == key:
        first -= 1
    while last + 1 < len(index) and index.identity(last + 1)[0] == key:
        last += 1
    positions = np.arange(first, last + 1)
    times = reader.times("frame", index.rows(positions))
    positions = positions[np.argsort(times, kind="stable")]
    some = np.unique(np.linspace(0, len(positions) - 1, FRAMES).round().astype(np.int64))
    return _chosen(reader, "frame", positions[some], of=len(positions))


def _chosen(reader: FeatureReader, array: str, positions: npt.NDArray[np.int64], of: int) -> Chosen:
    index = reader.index[array]
    rows = index.rows(positions)
    identities = [index.identity(position) for position in positions.tolist()]
    return Chosen(
        array=array,
        key=identities[0][0],
        views=tuple(view for _, view in identities),
        rows=rows,
        times=reader.times(array, rows),
        of=of,
    )


def sample_rows(reader: FeatureReader, array: str, seed: int) -> npt.NDArray[np.int64]:
    """Return row numbers (n,) to measure distributions on: all rows of a small space, else some."""
    row_bytes = 2 * reader.spec.tokens(array) * reader.spec.width
    count = max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // row_bytes))
    index = reader.index[array]
    return index.rows(spread(count, len(index), np.random.default_rng(seed)))


def read_rows(
    reader: FeatureReader, array: str, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Return the features (n, tokens, width) of rows (n,), every byte checked.

    Raises:
        CorruptError: a row differs from what was written.
    """
    packed = np.empty((len(rows), reader.geometry[array].row_bytes), np.uint8)
    reader.read_into(array, rows, packed)
    tokens, width = reader.spec.tokens(array), reader.spec.width
    return codec.unpack(packed, reader.spec.codec, tokens, width).astype(np.float32)


def row_errors(
    reader: FeatureReader, array: str, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Return the relative codec errors (n,) of rows (n,); NaN where none was measured."""
    shards, slots = np.divmod(rows, reader.geometry[array].slots)
    errors = _shard_errors(reader, array, np.unique(shards))
    pairs = zip(shards.tolist(), slots.tolist(), strict=True)
    return np.array([errors[shard][slot] for shard, slot in pairs], np.float64)


def sample_errors(reader: FeatureReader, array: str, seed: int) -> Errors:
    """Return the errors of all rows of up to `SAMPLE_SHARDS` shards."""
    shards = reader.index[array].shards
    drawn = shards[spread(SAMPLE_SHARDS, len(shards), np.random.default_rng(seed))]
    values = np.concatenate(list(_shard_errors(reader, array, drawn).values()))
    return Errors(values=values[np.isfinite(values)], shards=len(drawn), of=len(shards))


def _shard_errors(
    reader: FeatureReader, array: str, shards: npt.NDArray[np.int64]
) -> dict[int, npt.NDArray[np.float64]]:
    """Return shard -> the errors that its commit records, one a row."""
    info = read_info(reader.paths)
    return {
        shard: read_commit(reader.paths, info, array, shard).table["error"].to_numpy()
        for shard in shards.tolist()
    }


def newest_commit(paths: SpacePaths, arrays: Sequence[str]) -> datetime | None:
    """Return when the newest shard was committed: the time of the highest commit file."""
    shards = {array: paths.committed(array) for array in arrays}
    last = [
        paths.commit(array, found[-1]).stat().st_mtime for array, found in shards.items() if found
    ]
    return datetime.fromtimestamp(max(last), UTC) if last else None
