"""Choose the rows of a space that a page shows and measures, and read them.

A space may hold millions of rows. A few are read, spread evenly over all of them; a seed decides which.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.format import codec
from cache.store.reader import FeatureReader
from cache.store.row_index import RowIndex, key_words

FRAMES = 8
"""Frames shown of one video, evenly from its first to its last."""

SAMPLE_ROWS = 256
"""Rows of each array whose tokens are measured, at most."""

SAMPLE_BYTES = 128 << 20
"""Bytes of these rows as float16, at most: a bound on memory."""

ITEMS_PER_VIDEO = 4
"""One of this many shown items is a video, if the space has images and videos."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The row of one image, or some rows of one video."""

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
    errors: npt.NDArray[np.float32]
    """(n,) relative errors of the row codec."""
    of: int
    """Rows that the space has of it."""


def spread(count: int, total: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return up to `count` of the numbers 0 to total - 1, ascending: one from each of equal stretches."""
    edges = np.linspace(0, total, min(count, total) + 1).astype(np.int64)
    return rng.integers(edges[:-1], edges[1:])


def choose(reader: FeatureReader, count: int, seed: int) -> list[Chosen]:
    """Choose up to `count` different images and videos, evenly over the rows; images come first."""
    rng = np.random.default_rng(seed)
    images, frames = reader.index["image"], reader.index["frame"]
    # Videos also take the places that too few images leave empty.
    videos = _distinct(frames, max(count // ITEMS_PER_VIDEO, count - len(images)), rng)
    chosen = {"image": _distinct(images, count - len(videos), rng), "frame": videos}
    return [_chosen(reader.index[array], array, at) for array in chosen for at in chosen[array]]


def _distinct(index: RowIndex, count: int, rng: np.random.Generator) -> list[int]:
    """Return positions of rows of up to `count` different keys."""
    found: dict[str, int] = {}
    # Rows of one key are adjacent, so a draw of few rows may hit a key twice: then draw more.
    for factor in (1, 16):
        for position in index.numbered(spread(factor * count, len(index), rng)).tolist():
            if len(found) < count:
                found.setdefault(index.identity(position)[0], position)
    return sorted(found.values())


def _chosen(index: RowIndex, array: str, position: int) -> Chosen:
    """Choose up to `FRAMES` rows of the image or video that has the row at `position` of the index."""
    words = key_words(index.keys)
    # First by 8 bytes of the key: 30 times faster than by all 32, in a space of millions of rows.
    positions = np.flatnonzero(words[:, 0] == words[position, 0])
    positions = positions[(words[positions] == words[position]).all(axis=1)]
    positions = positions[~np.isin(positions, index.doubled)]
    positions = positions[np.argsort(index.times[positions], kind="stable")]
    shown = np.unique(np.linspace(0, len(positions) - 1, FRAMES).round().astype(np.int64))
    some = positions[shown]
    identities = [index.identity(at) for at in some.tolist()]
    return Chosen(
        array=array,
        key=identities[0][0],
        views=tuple(view for _, view in identities),
        rows=index.rows(some),
        times=index.times[some],
        errors=index.columns.errors[some],
        of=len(positions),
    )


def sample_rows(reader: FeatureReader, array: str, seed: int) -> npt.NDArray[np.int64]:
    """Return row numbers (n,) to measure tokens on: all rows of a small space, else some."""
    row_bytes = 2 * reader.spec.tokens(array) * reader.spec.width
    count = max(1, min(SAMPLE_ROWS, SAMPLE_BYTES // row_bytes))
    index = reader.index[array]
    return index.rows(index.numbered(spread(count, len(index), np.random.default_rng(seed))))


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
