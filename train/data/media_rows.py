"""Where the features of images and videos are: one row of a space for an image, one a frame for a video.

Flat arrays, never an object a media: there may be millions. K distinct media, W rows of all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cache.format.frame_sampling import frame_views
from cache.format.spec import ARRAY_OF

Ints = npt.NDArray[np.int64]

MEDIA_KINDS = tuple(ARRAY_OF)
"""Kinds of media; their numbers stand in `kinds` arrays."""
IMAGE, VIDEO = (MEDIA_KINDS.index(kind) for kind in ("image", "video"))
NOUNS = ("image", "video")
"""What people call one of each kind."""

VIDEOS_AT_ONCE = 2048
"""Videos whose views are looked up together: what bounds the memory of their names."""


class Rows(Protocol):
    """The part of a FeatureReader a join needs."""

    path: Path

    def lookup(self, kind: str, keys: Any) -> Ints:
        """Row numbers of `keys`, -1 where there is none."""

    def lookup_pairs(self, kind: str, keys: Any, views: Any) -> Ints:
        """Row numbers of keys, each with a view of its own; -1 where there is none."""

    def times(self, kind: str, rows: Ints) -> npt.NDArray[np.float64]:
        """Where in their videos the rows are, seconds."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaRows:
    """The rows of K media; none for one that is not in the space whole."""

    starts: Ints
    """(K + 1,) media k has rows[starts[k]:starts[k + 1]]."""
    rows: Ints
    """(W,) row numbers in the array of the media's kind; a video's frames in time order."""
    times: npt.NDArray[np.float64]
    """(W,) where in its video a frame is, seconds after the first; NaN for images."""
    partial: int = 0
    """Videos with some of the frames asked for and not all: encoded with another limit."""

    @property
    def counts(self) -> Ints:
        """(K,) rows of each."""
        return np.diff(self.starts)

    def take(self, chosen: Ints) -> MediaRows:
        """Those of some media, in the order given."""
        lengths = self.counts[chosen]
        at = within(self.starts[chosen], lengths)
        return MediaRows(starts=edges_of(lengths), rows=self.rows[at], times=self.times[at])


def find_rows(
    reader: Rows,
    keys: Any,
    kinds: npt.NDArray[np.uint8],
    durations: npt.NDArray[np.float64],
    max_frames: int,
) -> MediaRows:
    """Look up K media in a space.

    Args:
        reader: of the space.
        keys: (K,) Arrow strings, 64 hex digits each.
        kinds: (K,) number in MEDIA_KINDS.
        durations: (K,) of videos, seconds; NaN where nobody knows, then it has no rows.
        max_frames: of one video, at most; decides which views it needs.
    """
    images = np.flatnonzero(kinds == IMAGE)
    found = np.asarray(
        reader.lookup(ARRAY_OF["image"], keys.take(images).to_pylist()), dtype=np.int64
    )
    whole = images[found >= 0]
    media, rows, times = [whole], [found[found >= 0]], [np.full(len(whole), np.nan)]
    videos = np.flatnonzero((kinds == VIDEO) & (durations >= 0))
    partial = 0
    for start in range(0, len(videos), VIDEOS_AT_ONCE):
        some = videos[start : start + VIDEOS_AT_ONCE]
        names = keys.take(some).to_pylist()
        which, there, when, missed = _frames(reader, names, durations[some], max_frames)
        media.append(some[which])
        rows.append(there)
        times.append(when)
        partial += missed
    of = np.concatenate(media)
    order = np.argsort(of, kind="stable")  # a video's frames stay in time order
    return MediaRows(
        starts=edges_of(np.bincount(of, minlength=len(kinds))),
        rows=np.concatenate(rows)[order],
        times=np.concatenate(times)[order],
        partial=partial,
    )


def _frames(
    reader: Rows, keys: list[str], durations: npt.NDArray[np.float64], max_frames: int
) -> tuple[Ints, Ints, npt.NDArray[np.float64], int]:
    """Of videos that are there whole: which video, row and time of each frame; how many are there in part."""
    array = ARRAY_OF["video"]
    views = [frame_views(duration, max_frames) for duration in durations.tolist()]
    lengths = np.array([len(v) for v in views], dtype=np.int64)
    rows = np.asarray(
        reader.lookup_pairs(
            array, list(_repeated(keys, lengths)), [view for video in views for view in video]
        ),
        dtype=np.int64,
    )
    video = np.repeat(np.arange(len(keys)), lengths)
    have = np.bincount(video[rows >= 0], minlength=len(keys))
    partial = int(((have > 0) & (have < lengths)).sum())
    use = (have == lengths)[video]
    video, rows = video[use], rows[use]
    times = np.asarray(reader.times(array, rows), dtype=np.float64)
    assert not np.isnan(times).any(), "a frame was stored without its time"
    # Two times asked for may have met in one frame: it stands once.
    first = np.ones(len(rows), dtype=bool)
    first[1:] = (video[1:] != video[:-1]) | (times[1:] != times[:-1])
    return video[first], rows[first], times[first], partial


def _repeated(keys: list[str], lengths: Ints) -> Iterator[str]:
    for key, length in zip(keys, lengths.tolist(), strict=True):
        for _ in range(length):
            yield key


# ---- lists of different lengths, one after the other


def edges_of(lengths: npt.NDArray[Any]) -> Ints:
    """(n,) lengths -> (n + 1,) where each list starts, and the end of the last."""
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=edges[1:])
    return edges


def within(starts: Ints, lengths: Ints) -> Ints:
    """starts[i], starts[i] + 1, ... lengths[i] of them, for each i."""
    offsets = np.arange(int(lengths.sum()))
    return offsets + np.repeat(starts - edges_of(lengths)[:-1], lengths)
