"""Find which samples have which rows of a space.

    samples of a data set ──┐
                            ├──► References   each mention of a media item by a sample     References.of
    media table ────────────┘        │
                                     ▼
                                MediaItems    each distinct (key, kind) mentioned          number_media
                                     │
    rows of a space ─────────────────┤
                                     ▼
                                MediaRows     the rows of each media item                  find_rows, all_rows

    join_samples does all of this, and tells which samples have all their rows, and of which split they are.

A mention counts only when the source gave the bytes that the sample means: see `References.mismatch`.
Everything is flat arrays, without a Python object for each media item, since a cache may hold ten million.
S samples, R references of all samples, M rows of the media table, K media items, W rows of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CorruptError
from cache.format.frame_sampling import frame_views
from cache.format.spec import ARRAY_OF
from cache.store.commits import KEY_BYTES, key_bytes
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.row_index import RowIndex, key_words
from cache.store.samples import SPLITS, samples_table, split_keys, split_texts

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MEDIA_KINDS = tuple(ARRAY_OF)
"""Media kinds. Arrays of `kinds` hold positions in this tuple."""
IMAGE, VIDEO = (MEDIA_KINDS.index(kind) for kind in ("image", "video"))
UNKNOWN_KIND = 255
"""Number of a kind that is not in MEDIA_KINDS, for example from a data set of a later version."""
NOUNS = ("image", "video")
"""What people call one media item of each kind."""

VIDEOS_AT_ONCE = 2048
"""Videos whose frames are looked up together. It bounds the memory that the names of their views take."""


# ---- what samples mention


def means_other_bytes(stated: str | None, key: str | None) -> bool:
    """Return whether a sample that states a sha256 means other bytes than those with this key.

    Where no hash is stated, or the bytes were never read, it does not.
    """
    return stated is not None and key is not None and stated != key


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """The media that the samples of one data set mention, joined with the media table."""

    counts: Ints
    """(S,) mentions of each sample. The R mentions are in sample order, then in placeholder order."""
    source: Ints
    """(R,) row in the media table; M, M + 1, ... number the distinct sources that the table lacks."""
    kind: npt.NDArray[np.uint8]
    """(R,) number in MEDIA_KINDS, or UNKNOWN_KIND."""
    mismatch: Mask
    """(R,) whether the sample means other bytes than those its source gave (`means_other_bytes`).

    It then means another image or video, whose rows must not be paired with it.
    """

    @classmethod
    def of(cls, media: pa.ChunkedArray, table: pa.Table) -> Self:
        """Join the column `media` of a samples table with the media table `table`."""
        lists = media.combine_chunks()
        mentions = pc.list_flatten(lists)
        sources = pc.struct_field(mentions, "source")
        row = pc.index_in(sources, table["source"].combine_chunks())
        stated = pc.struct_field(mentions, "sha256")
        mismatch = pc.not_equal(stated, table["key"].combine_chunks().take(row))
        kind = pc.index_in(pc.struct_field(mentions, "kind"), pa.array(MEDIA_KINDS))
        if row.null_count:
            lacking = sources.filter(pc.is_null(row))
            numbers = np.asarray(pc.index_in(lacking, lacking.unique()), np.int64)
            source = np.array(row.fill_null(-1), np.int64)
            source[source < 0] = len(table) + numbers
        else:
            source = np.asarray(row, np.int64)
        return cls(
            counts=np.asarray(pc.list_value_length(lists), np.int64),
            source=source,
            kind=np.asarray(kind.fill_null(UNKNOWN_KIND), np.uint8),
            # `means_other_bytes`; null where no hash is stated, or the bytes were never read.
            mismatch=np.asarray(mismatch.fill_null(False), bool),
        )

    @property
    def sample(self) -> Ints:
        """(R,) number of the sample that each mention belongs to."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    def count(self, flags: Mask) -> Ints:
        """Return how many mentions (R,) of each sample have a flag, as (S,)."""
        total = edges_of(flags)
        ends = np.cumsum(self.counts)
        return np.asarray(total[ends] - total[ends - self.counts], np.int64)

    def look_up(self, values: npt.NDArray[Any], missing: Any) -> npt.NDArray[Any]:
        """Return what a column (M,) of the media table says of each mention, as (R,).

        Mentions of sources that the table lacks get `missing`.
        """
        return np.append(values, np.array([missing], values.dtype))[
            np.minimum(self.source, len(values))
        ]


def read_references(root: CacheRoot, dataset: str, table: pa.Table) -> References:
    """Read what the samples of a data set mention, and join it with the media table `table`.

    Raises:
        NotFoundError: there is no such data set.
        CorruptError: its file is damaged.
    """
    return References.of(samples_table(root, dataset, ["media"])["media"], table)


# ---- media items


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaItems:
    """K distinct media items. The same bytes taken as an image and as a video are two of them."""

    keys: npt.NDArray[np.uint8]
    """(K, 32) sha256 of their bytes."""
    kinds: npt.NDArray[np.uint8]
    """(K,) number in MEDIA_KINDS."""
    durations: Floats
    """(K,) length of a video in seconds; NaN where it is not known."""

    def key(self, item: int) -> str:
        """Return the key of one media item, 64 hex digits."""
        return self.keys[item].tobytes().hex()


def number_media(
    references: Sequence[References], table: pa.Table
) -> tuple[MediaItems, list[Ints]]:
    """Number the distinct media items that several data sets mention.

    Returns:
        The media items; and for each of `references`, (R,) the number of the media item that each mention
        means. It is -1 where the key is not known, the kind is not, or the bytes mismatch.
    """
    coded = table["key"].combine_chunks().dictionary_encode()
    of_source = np.asarray(coded.indices.fill_null(-1), np.int64)
    durations = np.full(len(coded.dictionary), np.nan)
    recorded = np.asarray(table["duration_s"].fill_null(np.nan), np.float64)
    timed = (of_source >= 0) & ~np.isnan(recorded)
    durations[of_source[timed]] = recorded[timed]

    kinds = len(MEDIA_KINDS)
    codes = []  # (key, kind) as one number: key * kinds + kind
    for one in references:
        key = one.look_up(of_source, -1)
        usable = (key >= 0) & ~one.mismatch & (one.kind != UNKNOWN_KIND)
        codes.append(np.where(usable, key * kinds + one.kind, -1))
    mentioned = np.zeros(len(coded.dictionary) * kinds + 1, bool)
    for code in codes:
        mentioned[code] = True
    mentioned[-1] = False  # where the code -1 went
    used = np.flatnonzero(mentioned)
    number = np.full(len(mentioned), -1, np.int64)
    number[used] = np.arange(len(used))
    media = MediaItems(
        keys=_key_column(coded.dictionary.take(pa.array(used // kinds))),
        kinds=(used % kinds).astype(np.uint8),
        durations=durations[used // kinds],
    )
    return media, [number[code] for code in codes]


def _key_column(keys: pa.StringArray) -> npt.NDArray[np.uint8]:
    """Return K keys of 64 hex digits as (K, 32) bytes, without a Python string for each."""
    digits = 2 * KEY_BYTES
    if not len(keys) or not pc.all(pc.equal(pc.binary_length(keys), digits)).as_py():
        return key_bytes(keys.to_pylist())  # none, or a ValueError
    text = np.frombuffer(keys.buffers()[2], np.uint8, digits * len(keys), digits * keys.offset)
    text = text.reshape(-1, digits)
    nibbles = np.where(text < ord("a"), text - ord("0"), text - ord("a") + 10)
    return (nibbles[:, 0::2] << 4 | nibbles[:, 1::2]).astype(np.uint8)


# ---- their rows


@dataclass(frozen=True, kw_only=True, eq=False)
class MediaRows:
    """The rows of K media items."""

    starts: Ints
    """(K + 1,) media item k has rows[starts[k]:starts[k + 1]]."""
    rows: Ints
    """(W,) row numbers in the array of the item's kind; the frames of a video are in time order."""
    times: Floats
    """(W,) time of a frame in seconds after the first; NaN for images."""
    partial: int = 0
    """Videos that have some of the frames asked for, but not all: encoded with another limit."""

    @property
    def counts(self) -> Ints:
        """(K,) rows of each media item."""
        return np.diff(self.starts)

    def of(self, item: int) -> Ints:
        """Return the row numbers of one media item."""
        return self.rows[self.starts[item] : self.starts[item + 1]]

    def take(self, chosen: Ints) -> MediaRows:
        """Return the rows of the chosen media items, in the order given."""
        lengths = self.counts[chosen]
        at = within(self.starts[chosen], lengths)
        return MediaRows(starts=edges_of(lengths), rows=self.rows[at], times=self.times[at])


def find_rows(reader: FeatureReader, media: MediaItems, max_frames: int) -> MediaRows:
    """Look up the rows that a training needs of each media item: its image, or the frames of its video.

    A video without all of its frames has no rows here, and neither has one of unknown duration.

    Args:
        reader: of the space.
        media: K media items.
        max_frames: most frames of one video. With its duration, it decides which views are needed.
    """
    images = np.flatnonzero(media.kinds == IMAGE)
    found = reader.lookup(ARRAY_OF["image"], media.keys[images])
    whole = images[found >= 0]
    items, rows, times = [whole], [found[found >= 0]], [np.full(len(whole), np.nan)]
    videos = np.flatnonzero((media.kinds == VIDEO) & (media.durations >= 0))
    partial = 0
    for start in range(0, len(videos), VIDEOS_AT_ONCE):
        some = videos[start : start + VIDEOS_AT_ONCE]
        which, there, when, missed = _frames(
            reader, media.keys[some], media.durations[some], max_frames
        )
        items.append(some[which])
        rows.append(there)
        times.append(when)
        partial += missed
    item = np.concatenate(items)
    order = np.argsort(item, kind="stable")  # the frames of a video stay in time order
    return MediaRows(
        starts=edges_of(np.bincount(item, minlength=len(media.kinds))),
        rows=np.concatenate(rows)[order],
        times=np.concatenate(times)[order],
        partial=partial,
    )


def _frames(
    reader: FeatureReader, keys: npt.NDArray[np.uint8], durations: Floats, max_frames: int
) -> tuple[Ints, Ints, Floats, int]:
    """Return video, row and time of each frame of the complete videos; and how many are incomplete."""
    array = ARRAY_OF["video"]
    views = [frame_views(duration, max_frames) for duration in durations.tolist()]
    lengths = np.array([len(of_video) for of_video in views], np.int64)
    names = [view for of_video in views for view in of_video]
    rows = reader.lookup_pairs(array, np.repeat(keys, lengths, axis=0), names)
    video = np.repeat(np.arange(len(keys)), lengths)
    have = np.bincount(video[rows >= 0], minlength=len(keys))
    partial = int(((have > 0) & (have < lengths)).sum())
    use = (have == lengths)[video]
    video, rows = video[use], rows[use]
    times = reader.times(array, rows)
    if np.isnan(times).any():
        raise CorruptError(reader.path, "a frame was stored without its time")
    # Two times that were asked for may have met in the same frame, which then counts once.
    first = np.ones(len(rows), bool)
    first[1:] = (video[1:] != video[:-1]) | (times[1:] != times[:-1])
    return video[first], rows[first], times[first], partial


def all_rows(reader: FeatureReader, media: MediaItems) -> MediaRows:
    """Return every row of each media item that counts, whatever its view."""
    items, rows, times = [_NO_ROWS], [_NO_ROWS], [np.empty(0)]
    for kind, array in enumerate(ARRAY_OF.values()):
        index, of_kind = reader.index[array], np.flatnonzero(media.kinds == kind)
        item, position = _positions(index, media.keys[of_kind])
        items.append(of_kind[item])
        rows.append(index.rows(position))
        times.append(index.times[position])
    item, row, time = np.concatenate(items), np.concatenate(rows), np.concatenate(times)
    order = np.lexsort((row, time, item))
    return MediaRows(
        starts=edges_of(np.bincount(item, minlength=len(media.kinds))),
        rows=row[order],
        times=time[order],
    )


def _positions(index: RowIndex, keys: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Return (which key, position) of every row that counts of K keys (K, 32)."""
    stored, wanted = key_words(index.keys), key_words(keys)
    order = np.argsort(stored[:, 0])
    heads = stored[order, 0]
    start = np.searchsorted(heads, wanted[:, 0], "left")
    length = np.searchsorted(heads, wanted[:, 0], "right") - start
    which, position = np.repeat(np.arange(len(keys)), length), order[within(start, length)]
    same = ~np.isin(position, index.doubled)
    for word in range(1, stored.shape[1]):  # two keys may share their first 8 bytes
        same &= stored[position, word] == wanted[which, word]
    return which[same], position[same]


_NO_ROWS = np.empty(0, np.int64)


# ---- which samples can be used, and for what


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleRows:
    """The samples of one data set, joined with the rows of a space."""

    references: References
    """What they mention: R mentions by S samples."""
    items: Ints
    """(R,) media item of each mention; -1: none, see `number_media`."""
    present: Mask
    """(S,) whether all media have their rows."""
    failed: Mask
    """(S,) whether a media item failed, according to the ledger, and has no rows here.

    The ledger serves all spaces: media that failed for one may have their rows in this one.
    """
    split: npt.NDArray[np.uint8]
    """(S,) number in SPLITS."""


def join_samples(
    tables: Sequence[pa.Table],
    ledger: pa.Table,
    reader: FeatureReader,
    *,
    held_out: float,
    max_frames: int,
) -> tuple[MediaItems, MediaRows, list[SampleRows]]:
    """Join the samples of data sets with their rows, and tell which can be used, and for what.

    Args:
        tables: the columns `id`, `media` and `choice` of each data set.
        ledger: the media table.
        reader: of the space.
        held_out: share of the media in the split `val`, and the same share in `test`.
        max_frames: most frames of one video.

    Raises:
        ValueError: `held_out` is not in [0, 0.5).
    """
    references = [References.of(table["media"], ledger) for table in tables]
    media, numbers = number_media(references, ledger)
    found = find_rows(reader, media, max_frames)
    here = np.append(found.counts > 0, False)  # -1, no media item, is not here
    broken = np.asarray(pc.equal(ledger["status"], "failed"), dtype=bool)
    parts = []
    for table, one, items in zip(tables, references, numbers, strict=True):
        absent = ~here[items]
        failed = (one.look_up(broken, False) | one.mismatch) & absent
        parts.append(
            SampleRows(
                references=one,
                items=items,
                present=one.count(absent) == 0,
                failed=one.count(failed) > 0,
                split=split_samples(table, one, items, media.keys, held_out),
            )
        )
    return media, found, parts


def split_samples(
    table: pa.Table,
    references: References,
    items: Ints,
    keys: npt.NDArray[np.uint8],
    held_out: float,
) -> npt.NDArray[np.uint8]:
    """Return the split of each sample, (S,) numbers in SPLITS.

    A sample with a media item of `test` is in `test`; otherwise with one of `val` in `val`. So no media item
    of `train` is in another split, and `val` has none of `test`, whichever data sets mention it. A sample
    without media is split by its id, or by its question if it is one of several answers. Data added later
    moves no sample.

    Args:
        table: the columns `id` and `choice` of S samples.
        references: R mentions by those samples.
        items: (R,) media item of each mention; -1: none, which has no say.
        keys: (K, 32) of the media items.
        held_out: share of the media in `val`, and the same share in `test`.

    Raises:
        ValueError: `held_out` is not in [0, 0.5).
    """
    side = np.append(split_keys(keys, held_out), np.uint8(0))[items]
    result = np.zeros(len(references.counts), np.uint8)
    for number in range(1, len(SPLITS)):  # the last one wins
        result[references.count(side == number) > 0] = number
    text_only = np.flatnonzero(references.counts == 0)
    result[text_only] = split_texts(table.take(pa.array(text_only)), held_out)
    return result


# ---- lists of different lengths, one after the other


def edges_of(lengths: npt.NDArray[Any]) -> Ints:
    """Return where each of n lists starts, and the end of the last: (n,) lengths -> (n + 1,)."""
    edges = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    return edges


def within(starts: Ints, lengths: Ints) -> Ints:
    """Return starts[i], starts[i] + 1, ..., lengths[i] numbers, for each i."""
    offsets = np.arange(int(lengths.sum()))
    return offsets + np.repeat(starts - edges_of(lengths)[:-1], lengths)
