"""Record what became of each source: the key of its bytes, or where and why it failed.

The media table is a folder of sealed Parquet files, its parts. It only grows: each part adds rows, and of
several rows with the same source the latest counts.

    append_media(root, [MediaRecord(source="/a.jpg", key=key)], job)
    table = media_table(root)                        # one row for each source
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.errors import CorruptError
from cache.format.checksums import UNSEALED, map_sealed, seal_file
from cache.format.gate import refuse_links
from cache.format.parquet import all_hex, all_true, open_parquet, table_limits
from cache.format.spec import NAME
from cache.store.files import ROW_GROUP, new_file
from cache.store.paths import CacheRoot

STAGES = ("fetch", "verify", "decode", "encode", "write")
"""Steps at which encoding a media item can fail, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaRecord:
    """The result for one source: the key of its bytes, or where and why it failed."""

    source: str
    """URL, path, or name of embedded media, as the samples name it."""
    key: str | None = None
    """sha256 (64 hex digits) of the bytes; None if they were never read."""
    kind: str = "image"
    """image or video."""
    bytes: int = 0
    """Number of bytes."""
    width: int = 0
    """Pixels, as decoded; 0 if it was not."""
    height: int = 0
    """Pixels, as decoded; 0 if it was not."""
    duration_s: float | None = None
    """Time of a video's last frame, in seconds after the first."""
    size: int | None = None
    """Bytes of a local file when it was hashed. A file whose size, times and inode are equal to the recorded
    ones is not read again."""
    mtime_ns: int | None = None
    """Last change of a local file's content, in ns since 1970."""
    ctime_ns: int | None = None
    """Last change of a local file's inode, in ns since 1970."""
    inode: int | None = None
    """Inode number of a local file."""
    status: str = "ok"
    """ok or failed."""
    stage: str | None = None
    """Step at which it failed: one of STAGES."""
    error: str | None = None
    """Reason of the failure, in one line."""
    attempts: int = 1
    """Number of attempts."""
    note: str | None = None
    """Defect of a media item that is usable nevertheless, for example a video that ends early."""

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed"):
            raise ValueError(f"status {self.status!r} is neither ok nor failed")
        if (self.status == "failed") != (self.stage in STAGES and self.error is not None):
            raise ValueError(
                "a failed record names its stage and error, and only a failed one does"
            )


def note_subjects(note: str) -> list[str]:
    """Return what a note is about, without its figures: `ends early: 0.3 s of 2.0 s` gives `ends early`."""
    return [re.split(r" ?[:(]", part, maxsplit=1)[0] for part in note.split("; ")]


KNOWN = ("key", "bytes", "width", "height", "duration_s", "note")
"""Columns that stay true when the source can no longer be read."""


_MEDIA_TYPES = {
    **dict.fromkeys(("source", "key", "kind", "status", "stage", "error", "note"), pa.string()),
    "duration_s": pa.float64(),
}


_MEDIA_SCHEMA = pa.schema(
    [(f.name, _MEDIA_TYPES.get(f.name, pa.int64())) for f in fields(MediaRecord)]
)


def append_media(root: CacheRoot, records: Sequence[MediaRecord], job: str) -> None:
    """Add records to the media table, as one part.

    Args:
        root: the cache.
        records: at least one, or nothing is written.
        job: letters, digits and '-', different for each writer: two may write in the same nanosecond.
    """
    if records:
        append_media_table(root, records_table(records), job)


def records_table(records: Sequence[MediaRecord]) -> pa.Table:
    """Return records as rows of a media table."""
    columns = {n: [getattr(record, n) for record in records] for n in _MEDIA_SCHEMA.names}
    return pa.table(columns, _MEDIA_SCHEMA)


def append_media_table(root: CacheRoot, table: pa.Table, job: str) -> None:
    """Add rows with the columns of MediaRecord, at least one, as `append_media` does."""
    # The clock may have been set back. The new part must still be later than the others.
    newest = max((_part_ns(path) for path in _media_parts(root)), default=0)
    path = root.media_dir / f"part-{max(time.time_ns(), newest + 1):020d}-{job}.parquet"
    with new_file(path, root=root.path) as file:
        with pq.ParquetWriter(file, _MEDIA_SCHEMA, write_statistics=False) as writer:
            writer.write_table(table, row_group_size=PART_GROUP)
            writer.add_key_value_metadata({"seal": UNSEALED})
        seal_file(file)


PART_GROUP = 1 << 18
"""Rows of a row group in a part, at most: 80 MB in memory."""


class MediaRows:
    """All rows of the media table in the order in which they were written, also those that no longer count.

    Memory holds one row group at a time, 80 MB at most, where `media_table` holds the whole table.

        for table in MediaRows(root): ...      # of rows with the same source, the last one counts
    """

    def __init__(self, root: CacheRoot):
        self._root = root

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rows of each row group.

        Raises:
            CorruptError: a part is damaged.
        """
        for path in _media_parts(self._root):
            yield from _row_groups(path, self._root)


def media_table(root: CacheRoot, *, stamped: bool = False) -> pa.Table:
    """Return the latest row of each source, with the columns of MediaRecord.

    A link may die and a file may be removed, while the features remain. Such a source keeps the key, size
    and duration that it had when it was last read, so that its rows are still found. A file that exists and
    cannot be read does not: it may hold other bytes now.

    Args:
        root: the cache.
        stamped: whether to add the column `ns`: when the row was written, in ns since 1970.

    Raises:
        CorruptError: a part is damaged.
    """
    parts = [_MEDIA_SCHEMA.empty_table()]
    stamps = [np.empty(0, np.int64)]
    for path in _media_parts(root):
        parts.append(_read_part(path, root))
        stamps.append(np.full(len(parts[-1]), _part_ns(path)))
    table = pa.concat_tables(parts)
    if stamped:
        table = table.append_column("ns", pa.array(np.concatenate(stamps)))
    number = pa.array(np.arange(len(table)))
    latest = pa.table({"source": table["source"], "number": number}).group_by("source")
    return _keep_known(
        table.take(latest.aggregate([("number", "max")])["number_max"].sort()), table
    )


def _keep_known(latest: pa.Table, table: pa.Table) -> pa.Table:
    """Return `latest`; a source that is gone gets the KNOWN columns of its newest row that has a key."""
    gone = pc.and_(pc.equal(latest["stage"], "fetch"), pc.is_null(latest["key"]))
    gone = pc.and_(gone, pc.is_null(latest["inode"])).fill_null(False)
    if not pc.any(gone).as_py():
        return latest
    sources = latest["source"].filter(gone)
    known = table.filter(pc.and_(pc.is_valid(table["key"]), pc.is_in(table["source"], sources)))
    newest = known.take(pa.array(np.arange(len(known))[::-1]))
    # The first match is the newest row.
    at = pc.index_in(latest["source"], newest["source"].combine_chunks())
    same = pc.equal(newest["kind"].take(at), latest["kind"]).fill_null(False)
    take = pc.and_(gone, same)
    for name in KNOWN:
        column = pc.if_else(take, newest[name].take(at), latest[name])
        latest = latest.set_column(latest.schema.get_field_index(name), name, column)
    return latest


def read_media(root: CacheRoot) -> dict[str, MediaRecord]:
    """Return source -> its latest record. One Python object for each source: use `media_table` for many."""
    return {record.source: record for record in records_of(media_table(root))}


def records_of(table: pa.Table) -> Iterator[MediaRecord]:
    """Yield the rows of a media table as records."""
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        columns = (column.to_pylist() for column in batch.columns)
        for values in zip(*columns, strict=True):
            record = dict(zip(_MEDIA_SCHEMA.names, values, strict=True))
            # All records share one string of each kind, status and stage.
            record |= {n: sys.intern(record[n]) for n in ("kind", "status", "stage") if record[n]}
            yield MediaRecord(**record)


def media_sizes(root: CacheRoot) -> dict[str, tuple[int, int]]:
    """Return source -> (width, height) in pixels of all media that were decoded."""
    table = media_table(root).select(["source", "status", "width", "height"])
    known = pc.and_(pc.equal(table["status"], "ok"), pc.greater(table["width"], 0))
    columns = (table.filter(known)[name].to_pylist() for name in ("source", "width", "height"))
    return {source: (width, height) for source, width, height in zip(*columns, strict=True)}


def check_part(path: Path, root: CacheRoot) -> None:
    """Check every value of one part of the media table.

    Raises:
        CorruptError: it is damaged, or not what this program writes.
    """
    _part_ns(path)
    _read_part(path, root)


def _read_part(path: Path, root: CacheRoot) -> pa.Table:
    return pa.concat_tables([_MEDIA_SCHEMA.empty_table(), *_row_groups(path, root)])


def _row_groups(path: Path, root: CacheRoot) -> Iterator[pa.Table]:
    """Yield the checked rows of each row group of a part."""
    data = map_sealed(path, root.path)
    with open_parquet(data, path, _MEDIA_SCHEMA, table_limits(data)) as file:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            _check_rows(table)
            yield table.replace_schema_metadata()


def _check_rows(table: pa.Table) -> None:
    """Raise ValueError or an error of Arrow for rows that this program does not write."""
    table.validate(full=True)  # UTF-8 among others
    for name in _NEVER_NULL:
        if table[name].null_count:
            raise ValueError(f"a record without {name}")
    for name in _COUNTS:
        if not all_true(pc.greater_equal(table[name], 0)):
            raise ValueError(f"a record with {name} below 0")
    length = table["duration_s"]
    if not all_true(pc.and_(pc.greater_equal(length, 0), pc.less(length, MAX_DURATION_S))):
        raise ValueError("a record with no valid duration_s")
    if not all_hex(table["key"]):
        raise ValueError("a key is no 64 hex digits")
    failed = pc.equal(table["status"], "failed")
    why = pc.and_(pc.is_in(table["stage"], pa.array(STAGES)), pc.is_valid(table["error"]))
    if not all_true(pc.or_(failed, pc.equal(table["status"], "ok"))) or not all_true(
        pc.equal(failed, why)
    ):
        raise ValueError("a record neither is ok nor says why it failed")


_NEVER_NULL = ("source", "kind", "bytes", "width", "height", "status", "attempts")
_COUNTS = ("bytes", "width", "height", "attempts", "size", "inode")
MAX_DURATION_S = 1e9
"""Seconds below which a video's length is: 32 years."""


def _media_parts(root: CacheRoot) -> list[Path]:
    """Return all parts, the oldest first."""
    refuse_links(root.media_dir, root.path)
    return sorted(root.media_dir.glob("part-*.parquet"))


_PART = re.compile(rf"part-([0-9]{{20}})-{NAME.pattern}\.parquet")
MAX_PART_NS = 1 << 62
"""A number of a part that its clock cannot have been at: it is in the year 2116."""


def _part_ns(path: Path) -> int:
    """Return when a part was written, in ns since 1970."""
    found = _PART.fullmatch(path.name)
    if not found or int(found[1]) >= MAX_PART_NS:
        raise CorruptError(path, "it has a name that no part of the media table has")
    return int(found[1])
