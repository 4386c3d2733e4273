"""The tables that know no encoder: samples (text, and the media it mentions) and media (source -> key).

A data set is one Parquet file, replaced whole when its content changes. The media table is also the
ledger of what could not be had; it only grows, part after part, and a later row for a source wins.
Both are sealed (see `cache.store.paths`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.store.paths import (
    UNSEALED,
    CacheRoot,
    Corrupt,
    check_seal,
    check_seal_file,
    new_file,
    seal_file,
)
from configs import UserError, nearest

ROW_GROUP = 8192
"""Samples written, and read back, at a time."""

ROLES = ("system", "user", "assistant")
STAGES = ("fetch", "verify", "decode", "encode", "write")
"""Where a media's way into the cache can end."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """Who speaks: `system`, `user` or `assistant`."""
    content: str
    """Text; each `<image>` in it stands for the sample's next media."""
    weight: float = 1.0
    """Factor on the loss of this turn's tokens (assistant turns only)."""


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """A media as a sample names it."""

    source: str
    """URL verbatim, absolute path, or hf:ID#row. The media table says which key it has."""
    kind: str = "image"
    """image or video: a key of `cache.format.spec.ARRAY_OF`."""
    sha256: str | None = None
    """What its bytes hash to, where the data set says so (64 hex); other bytes are refused."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training example."""

    id: str
    """Unique within its data set."""
    dataset: str
    """The data set's name."""
    messages: tuple[Message, ...]
    """The conversation, first turn first."""
    media: tuple[MediaRef, ...] = ()
    """What the `<image>` placeholders stand for, in order."""
    weight: float = 1.0
    """Factor on the loss of the whole sample."""
    task: str = ""
    """Type of question, for reports."""


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

_SAMPLE_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "dataset": pa.string(),
        "messages": pa.list_(
            pa.struct({"role": pa.string(), "content": pa.string(), "weight": pa.float64()})
        ),
        "media": pa.list_(
            pa.struct({"source": pa.string(), "kind": pa.string(), "sha256": pa.string()})
        ),
        "weight": pa.float64(),
        "task": pa.string(),
    }
)
_MEDIA_TYPES = {
    **dict.fromkeys(("source", "key", "kind", "status", "stage", "error", "note"), pa.string()),
    "duration_s": pa.float64(),
}
_MEDIA_SCHEMA = pa.schema(
    [(f.name, _MEDIA_TYPES.get(f.name, pa.int64())) for f in fields(MediaRecord)]
)


# ---- samples


class _Unchanged(Exception):  # noqa: N818 - leaves a `with` block, reports nothing
    pass


def write_samples(root: CacheRoot, dataset: str, samples: Iterable[Sample]) -> bool:
    """Make `samples` the content of `dataset`; False when they are that already.

    Streams: memory holds one row group. The digest is of the content, not of Parquet's bytes, so that
    another version of the library changes nothing.
    """
    path = root.samples(dataset)
    digest = hashlib.sha256()
    remaining = iter(samples)
    try:
        with new_file(path) as file:
            with pq.ParquetWriter(
                file, _SAMPLE_SCHEMA, compression="zstd", write_statistics=False
            ) as writer:
                while group := [_plain(sample) for sample in islice(remaining, ROW_GROUP)]:
                    for row in group:
                        digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                    writer.write_table(pa.Table.from_pylist(group, _SAMPLE_SCHEMA))
                writer.add_key_value_metadata({"content": digest.hexdigest(), "seal": UNSEALED})
            seal_file(file)
            if _intact_digest(path) == digest.hexdigest():
                raise _Unchanged
    except _Unchanged:
        return False
    return True


def samples_digest(root: CacheRoot, dataset: str) -> str:
    """sha256 (hex) of the content of a data set: of its samples in their order."""
    return _content(_samples_file(root, dataset))


def read_samples(root: CacheRoot, dataset: str) -> Iterator[Sample]:
    """The samples of a data set in their order, a row group in memory at a time."""
    with pq.ParquetFile(_samples_file(root, dataset)) as file:
        for batch in file.iter_batches(batch_size=ROW_GROUP):
            for row in batch.to_pylist():
                messages = tuple(Message(**message) for message in row.pop("messages"))
                media = tuple(MediaRef(**ref) for ref in row.pop("media"))
                yield Sample(messages=messages, media=media, **row)


def samples_table(root: CacheRoot, dataset: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The same as one Arrow table: id, dataset, messages, media, weight, task; or some of these."""
    with pq.ParquetFile(_samples_file(root, dataset)) as file:
        return file.read(columns)


def dataset_names(root: CacheRoot) -> list[str]:
    """Names of the data sets whose samples are here, sorted."""
    return sorted(path.parent.name for path in root.samples_dir.glob("*/part-00000.parquet"))


def _plain(sample: Sample) -> dict[str, Any]:
    """The same as `dataclasses.asdict`, at a tenth of its time."""
    return {
        **vars(sample),
        "messages": [vars(message) for message in sample.messages],
        "media": [vars(ref) for ref in sample.media],
    }


def _samples_file(root: CacheRoot, dataset: str) -> Path:
    """The checked file of a data set."""
    path = root.samples(dataset)
    if not path.exists():
        names = dataset_names(root)
        raise UserError(
            f"no data set {dataset!r} under {root.path}/samples (there: {', '.join(names) or 'none'})"
            f"{nearest(dataset, names)}. Make it: python -m encode.run --dataset {dataset} "
            f"--features {root.path}"
        )
    check_seal_file(path)
    return path


def _content(path: Path) -> str:
    return str(pq.read_metadata(path).metadata[b"content"], "ascii")


def _intact_digest(path: Path) -> str | None:
    """The content digest of what lies at `path`; None when nothing does, or nothing intact."""
    try:
        check_seal_file(path)
    except (FileNotFoundError, Corrupt):
        return None
    return _content(path)


# ---- media


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
