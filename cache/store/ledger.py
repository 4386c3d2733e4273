"""cache.store.ledger."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.format.checksums import UNSEALED, check_seal, seal_file
from cache.store.files import ROW_GROUP, new_file
from cache.store.paths import CacheRoot

STAGES = ("fetch", "verify", "decode", "encode", "write")
"""Where a media's way into the cache can end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaRecord:
    """What became of one source: the key of its bytes, or where and why it failed."""

    source: str
    """As the samples name it."""
    key: str | None = None
    """sha256 (64 hex) of the bytes; None when they never came."""
    kind: str = "image"
    """image or video."""
    bytes: int = 0
    """Length of what was hashed."""
    width: int = 0
    """Pixels, as decoded."""
    height: int = 0
    """Pixels, as decoded."""
    duration_s: float | None = None
    """Videos: time of the last frame, seconds after the first."""
    size: int | None = None
    """Local files: size, times and inode when hashed. All equal means: not read again."""
    mtime_ns: int | None = None
    """Local files: last change of the content."""
    ctime_ns: int | None = None
    """Local files: last change of the inode."""
    inode: int | None = None
    """Local files: inode number."""
    status: str = "ok"
    """ok or failed."""
    stage: str | None = None
    """Where it failed: one of STAGES."""
    error: str | None = None
    """Why it failed, in one line."""
    attempts: int = 1
    """Times it was tried."""
    note: str | None = None
    """What is odd about a media that is usable all the same, as a video that ends early."""

    def __post_init__(self) -> None:
        if self.status not in ("ok", "failed"):
            raise ValueError(f"status {self.status!r} is neither ok nor failed")
        if (self.status == "failed") != (self.stage in STAGES and self.error is not None):
            raise ValueError("a failed media names its stage and error, and only a failed one does")


KNOWN = ("key", "bytes", "width", "height", "duration_s", "note")
"""What stays true of a media when its source is gone."""


_MEDIA_TYPES = {
    **dict.fromkeys(("source", "key", "kind", "status", "stage", "error", "note"), pa.string()),
    "duration_s": pa.float64(),
}


_MEDIA_SCHEMA = pa.schema(
    [(f.name, _MEDIA_TYPES.get(f.name, pa.int64())) for f in fields(MediaRecord)]
)


def append_media(root: CacheRoot, records: Sequence[MediaRecord], job: str) -> None:
    """Add one part to the media table. `job` (letters, digits, '-') tells writers of one instant apart."""
    if records:
        append_media_table(root, _media_rows(records), job)


def append_media_table(root: CacheRoot, table: pa.Table, job: str) -> None:
    """The same for rows of another media table, columns as MediaRecord; at least one."""
    # A clock set back must not make this part older than those it follows.
    newest = max((_part_ns(path) for path in _media_parts(root)), default=0)
    path = root.media_dir / f"part-{max(time.time_ns(), newest + 1):020d}-{job}.parquet"
    with new_file(path) as file:
        with pq.ParquetWriter(file, _MEDIA_SCHEMA, write_statistics=False) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({"seal": UNSEALED})
        seal_file(file)


def media_table(root: CacheRoot, *, stamped: bool = False) -> pa.Table:
    """One row a source, the latest, with the columns of MediaRecord; `stamped`: and `ns`, when entered.

    Links rot and files go, features stay: a source that could not be had any more keeps the key, size and
    length it had when it last came, so that spaces made of it then go on knowing it. Not a file that is
    there and cannot be read: it may hold other bytes by now.
    """
    parts = [_MEDIA_SCHEMA.empty_table()]
    stamps = [np.empty(0, np.int64)]
    for path in _media_parts(root):
        data = path.read_bytes()
        check_seal(data, path)
        parts.append(pq.read_table(pa.BufferReader(data), schema=_MEDIA_SCHEMA))
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
    """`latest`, what is gone with the KNOWN columns of its newest row in `table` that has a key."""
    gone = pc.and_(pc.equal(latest["stage"], "fetch"), pc.is_null(latest["key"]))
    gone = pc.and_(gone, pc.is_null(latest["inode"])).fill_null(False)
    if not pc.any(gone).as_py():
        return latest
    sources = latest["source"].filter(gone)
    known = table.filter(pc.and_(pc.is_valid(table["key"]), pc.is_in(table["source"], sources)))
    newest = known.take(pa.array(np.arange(len(known))[::-1]))
    at = pc.index_in(latest["source"], newest["source"].combine_chunks())  # the first: the newest
    same = pc.equal(newest["kind"].take(at), latest["kind"]).fill_null(False)
    take = pc.and_(gone, same)
    for name in KNOWN:
        column = pc.if_else(take, newest[name].take(at), latest[name])
        latest = latest.set_column(latest.schema.get_field_index(name), name, column)
    return latest


def read_media(root: CacheRoot) -> dict[str, MediaRecord]:
    """source -> its latest record."""
    records = {}
    for batch in media_table(root).to_batches(max_chunksize=ROW_GROUP):
        columns = (column.to_pylist() for column in batch.columns)
        for values in zip(*columns, strict=True):
            record = dict(zip(_MEDIA_SCHEMA.names, values, strict=True))
            # One string for millions of records.
            record |= {n: sys.intern(record[n]) for n in ("kind", "status", "stage") if record[n]}
            records[record["source"]] = MediaRecord(**record)
    return records


def _media_rows(records: Sequence[MediaRecord]) -> pa.Table:
    columns = {n: [getattr(record, n) for record in records] for n in _MEDIA_SCHEMA.names}
    return pa.table(columns, _MEDIA_SCHEMA)


def media_sizes(root: CacheRoot) -> dict[str, tuple[int, int]]:
    """source -> (width, height), pixels, of all media that were decoded."""
    table = media_table(root).select(["source", "status", "width", "height"])
    known = pc.and_(pc.equal(table["status"], "ok"), pc.greater(table["width"], 0))
    columns = (table.filter(known)[name].to_pylist() for name in ("source", "width", "height"))
    return {source: (width, height) for source, width, height in zip(*columns, strict=True)}


def _media_parts(root: CacheRoot) -> list[Path]:
    """All parts, oldest first."""
    return sorted(root.media_dir.glob("part-*.parquet"))


def _part_ns(path: Path) -> int:
    return int(path.name.split("-")[1])
