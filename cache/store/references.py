"""Where the features of images and videos are: one row of a space for an image, one a frame for a video.

Flat arrays, never an object a media: there may be millions. K distinct media, W rows of all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views
from cache.format.spec import ARRAY_OF
from cache.store.commits import key_bytes
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.row_index import Identities, RowIndex
from cache.store.samples import samples_digest, samples_table
from cache.store.space import Space
from configs import UserError

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


Mask = npt.NDArray[np.bool_]


Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """What the samples of one data set mention."""

    samples: int
    """S."""
    sample: Numbers
    """(R,) number of the sample."""
    media: Numbers
    """(R,) row in the media table, -1 for a source it does not know."""
    other: Mask
    """(R,) whether the sample says another hash than the bytes have that came: it is about another media."""
    sources: pa.Array
    """(D,) distinct sources."""
    rows: Numbers
    """(D,) their rows in the media table, -1 likewise."""
    videos: Mask
    """(D,) whether the samples take them for videos."""


def find_references(root: CacheRoot, dataset: str, media: pa.Table) -> References:
    """Of a data set, into `media`."""
    table = samples_table(root, dataset, ["media"])
    lists = table["media"].combine_chunks()
    refs = pc.list_flatten(lists)
    sources = pc.struct_field(refs, "source")
    rows = np.asarray(
        pc.index_in(sources, media["source"].combine_chunks()).fill_null(-1), np.int64
    )
    keys = media["key"].combine_chunks().take(pa.array(rows, mask=rows < 0))
    other = pc.not_equal(pc.struct_field(refs, "sha256"), keys)  # null where one of them is unknown
    distinct = sources.unique()
    first = np.asarray(pc.index_in(distinct, sources), np.int64)
    kinds = pc.struct_field(refs, "kind").take(pa.array(first))
    return References(
        samples=len(table),
        sample=np.asarray(pc.list_parent_indices(lists), np.int64),
        media=rows,
        other=np.asarray(other.fill_null(False), bool),
        sources=distinct,
        rows=rows[first],
        videos=np.asarray(pc.equal(kinds, "video"), bool),
    )


def _rows_of(reader: FeatureReader, array: str, first: Numbers) -> Numbers:
    """How many rows the media have whose first rows (n,) are given."""
    index = reader.index[array]
    heads = np.ascontiguousarray(index.keys[:, :8]).view(np.uint64).reshape(-1)  # of sha256: unique
    distinct, counts = np.unique(heads, return_counts=True)
    return counts[np.searchsorted(distinct, heads[index.positions(first)])]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One data set's table, joined with media but not yet filtered."""

    digest: str
    """Of its texts."""
    ids: Any
    """Arrow strings."""
    weight: npt.NDArray[np.float32]
    task: Any
    """Arrow strings."""
    counts: Ints
    """Media of each sample."""
    source: Ints
    """(R,) row in the media table; -1 where it has none."""
    other: npt.NDArray[np.bool_]
    """(R,) what is known by that source hashes to something else than this data set says: not its image."""
    kind: npt.NDArray[np.uint8]
    """(R,) number in MEDIA_KINDS."""
    media: Ints
    """(R,) number among the media mentioned here; -1 unknown."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Media:
    """The K media that samples mention."""

    keys: npt.NDArray[np.uint8]
    """(K, 32) sha256 of their bytes."""
    kinds: npt.NDArray[np.uint8]
    """(K,) number in MEDIA_KINDS."""
    rows: MediaRows
    """Where their features are."""


def read_part(root: CacheRoot, name: str, ledger: pa.Table) -> Part:
    """Ids, weights and media of a data set: everything but its texts."""
    digest = samples_digest(root, name)  # checks the seal of the whole file
    table = pq.read_table(root.samples(name), columns=["id", "media", "weight", "task"])
    media = table["media"].combine_chunks()
    flat = media.flatten()
    kind = pc.index_in(flat.field("kind"), value_set=pa.array(MEDIA_KINDS))
    if kind.null_count:
        odd = sorted(map(str, set(pc.unique(flat.field("kind")).to_pylist()) - set(MEDIA_KINDS)))
        raise UserError(
            f"data set {name}: holds {', '.join(odd)} media; only images and videos can be trained "
            f"on: python -m encode.run --dataset {name} writes it again"
        )
    at = pc.index_in(flat.field("source"), value_set=ledger["source"].combine_chunks())
    other = pc.not_equal(flat.field("sha256"), ledger["key"].combine_chunks().take(at))
    return Part(
        digest=digest,
        ids=table["id"].combine_chunks(),
        weight=np.asarray(table["weight"], dtype=np.float32),
        task=table["task"].combine_chunks(),
        counts=np.asarray(media.value_lengths(), dtype=np.int64),
        source=np.asarray(at.fill_null(-1), dtype=np.int64),
        other=np.asarray(other.fill_null(False), dtype=bool),
        kind=np.asarray(kind, dtype=np.uint8),
        media=np.empty(0, dtype=np.int64),
    )


def _key_bytes(keys: Any) -> npt.NDArray[np.uint8]:
    """(K, 32) from K hex strings, at the speed of numpy: there may be ten million."""
    text = np.frombuffer("".join(keys.to_pylist()).encode(), dtype=np.uint8).reshape(-1, 64)
    nibbles = np.where(text < ord("a"), text - ord("0"), text - ord("a") + 10)
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)


class Keys(Collection[str]):
    """The keys of the images in an index: no string is held for any of them."""

    def __init__(self, index: RowIndex):
        self._identities = Identities(index)

    def __contains__(self, key: object) -> bool:
        return (key, FULL) in self._identities

    def __iter__(self) -> Iterator[str]:
        return (key for key, view in self._identities if view == FULL)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Present:
    """A space's rows as they were when this was made."""

    def __init__(
        self,
        images: Collection[str] = frozenset(),
        frames: RowIndex | None = None,
        *,
        max_frames: int = MAX_FRAMES,
    ):
        self.images = images
        """Keys."""
        self._frames, self._max_frames = frames, max_frames

    @classmethod
    def of(cls, space: Space, *, max_frames: int = MAX_FRAMES) -> Self:
        """What is committed in `space` now."""
        frames = space.index(ARRAY_OF["video"])
        return cls(
            Keys(space.index(ARRAY_OF["image"])),
            frames if len(frames) else None,
            max_frames=max_frames,
        )

    def has(self, kind: str, key: str | None, duration_s: float | None) -> bool:
        """Whether every view of this media is here. A video of unknown length never is."""
        if key is None:
            return False
        if kind == "image":
            return key in self.images
        return duration_s is not None and not self.missing(
            key, frame_views(duration_s, self._max_frames)
        )

    def missing(self, key: str, views: Sequence[str]) -> list[str]:
        """Those of a video's views that are not here."""
        if self._frames is None:
            return list(views)
        keys = key_bytes([key]).repeat(len(views), axis=0)
        rows = self._frames.lookup_pairs(keys, views).tolist()
        return [view for view, row in zip(views, rows, strict=True) if row < 0]
