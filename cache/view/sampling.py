"""Which rows of a space a page shows and measures, drawn by a seed, and what their commits say of them.

A space may hold millions of rows: a few are read, spread evenly over all of them; nothing is read whole.
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
"""Rows of each kind that the distributions are measured on."""

SAMPLE_BYTES = 128 << 20
"""The same as a limit on memory: of these rows' values as float16."""

SAMPLE_SHARDS = 256
"""Commits whose recorded errors are looked at: 2 ms each."""

VIDEOS_OF = 4
"""One video to show for so many media, where a space has both kinds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """One image, or some frames of one video."""

    kind: str
    """The array its rows are in: image or frame."""
    key: str
    """sha256 (hex) of its bytes."""
    views: tuple[str, ...]
    """Of each row, in time order."""
    rows: npt.NDArray[np.int64]
    """(n,) row numbers."""
    times: npt.NDArray[np.float64]
    """(n,) seconds after the first frame; NaN for an image."""
    of: int
    """Rows it has in the space, of which these are some."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Errors:
    """Relative errors of the row codec, as measured when the rows were packed."""

    values: npt.NDArray[np.float64]
    """(n,) of the rows looked at; those that were not measured are left out."""
    shards: int
    """Shards looked at."""
    of: int
    """Shards there are."""


def spread(count: int, total: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """At most `count` of the numbers 0 to total - 1, ascending: one from each of equal stretches."""
    edges = np.linspace(0, total, min(count, total) + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def choose(reader: FeatureReader, count: int, seed: int) -> list[Chosen]:
    """At most `count` different media, images first, evenly over the rows of each kind."""
    rng = np.random.default_rng(seed)
    images, frames = reader.index["image"], reader.index["frame"]
    video_count = count
    if len(images):
        video_count = max(count // VIDEOS_OF, count - len(images))
    videos = [_video(reader, at) for at in _distinct(frames, video_count, rng)]
    shown = [_image(reader, at) for at in _distinct(images, count - len(videos), rng)]
    return shown + videos


def _distinct(index: RowIndex, count: int, rng: np.random.Generator) -> list[int]:
    """Positions of rows of different media; a finer net where the first one caught some twice."""
    found: dict[str, int] = {}
    for fine in (1, 16):
        for position in spread(fine * count, len(index), rng).tolist():
            if len(found) < count:
                found.setdefault(index.identity(position)[0], position)
    return sorted(found.values())


def _image(reader: FeatureReader, position: int) -> Chosen:
    return _chosen(reader, "image", np.array([position]), of=1)


def _video(reader: FeatureReader, position: int) -> Chosen:
    """The video that the row at `position` is of: its rows lie side by side."""
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


def _chosen(reader: FeatureReader, kind: str, positions: npt.NDArray[np.int64], of: int) -> Chosen:
    index = reader.index[kind]
    rows = index.rows(positions)
    identities = [index.identity(position) for position in positions.tolist()]
    return Chosen(
        kind=kind,
        key=identities[0][0],
        views=tuple(view for _, view in identities),
        rows=rows,
        times=reader.times(kind, rows),
        of=of,
    )


def sample(reader: FeatureReader, kind: str, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers (n,) for the distributions: all rows of a small space, else some of everywhere."""
    row_bytes = 2 * reader.spec.tokens(kind) * reader.spec.width
    count = max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // row_bytes))
    index = reader.index[kind]
    if len(index) <= count:
        return index.rows(np.arange(len(index)))
    return index.rows(spread(count, len(index), np.random.default_rng(seed)))


def read_rows(
    reader: FeatureReader, kind: str, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Rows (n,) -> their features (n, tokens, width), every byte of them checked.

    Raises:
        CorruptError: a row is not what was written.
    """
    packed = np.empty((len(rows), reader.geometry[kind].row_bytes), np.uint8)
    reader.read_into(kind, rows, packed)
    tokens, width = reader.spec.tokens(kind), reader.spec.width
    return codec.unpack(packed, reader.spec.layout, tokens, width).astype(np.float32)


class Recorded:
    """Codec errors as the commits of a space record them, each commit read once."""

    def __init__(self, reader: FeatureReader):
        self._reader = reader
        self._info = read_info(reader.paths)
        self._errors: dict[tuple[str, int], npt.NDArray[np.float64]] = {}

    def of_rows(self, kind: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Relative codec error (n,) of rows (n,); NaN where it was not measured."""
        slots = self._reader.geometry[kind].slots
        shards, at = np.divmod(rows, slots)
        pairs = zip(shards.tolist(), at.tolist(), strict=True)
        return np.array([self._shard(kind, shard)[slot] for shard, slot in pairs], np.float64)

    def spread(self, kind: str, seed: int) -> Errors:
        """The errors of all rows of some shards: of all shards, where there are few."""
        index, slots = self._reader.index[kind], self._reader.geometry[kind].slots
        # Through rows, since those alone say which shards exist.
        some = spread(64 * SAMPLE_SHARDS, len(index), np.random.default_rng(seed))
        shards = np.unique(index.rows(some) // slots)
        looked_at = shards[spread(SAMPLE_SHARDS, len(shards), np.random.default_rng(seed))]
        found = [self._shard(kind, shard) for shard in looked_at.tolist()]
        values = np.concatenate([np.empty(0), *found])
        return Errors(
            values=values[np.isfinite(values)],
            shards=len(looked_at),
            of=len(index.shards),
        )

    def _shard(self, kind: str, shard: int) -> npt.NDArray[np.float64]:
        if (kind, shard) not in self._errors:
            commit = read_commit(self._reader.paths, self._info, kind, shard)
            self._errors[kind, shard] = commit.table["error"].to_numpy().astype(np.float64)
        return self._errors[kind, shard]


def newest_commit(paths: SpacePaths, kinds: Sequence[str]) -> datetime | None:
    """When the last shard became visible, as its file says."""
    numbers = {kind: paths.committed(kind) for kind in kinds}
    last = [
        paths.commit(kind, found[-1]).stat().st_mtime for kind, found in numbers.items() if found
    ]
    return datetime.fromtimestamp(max(last), UTC) if last else None
