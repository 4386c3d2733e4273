"""Write data sets with their text and features to WebDataset tars, which need nothing else for training.

One sample of a tar is one tuple of media items with all samples of the data set that show it, so an image
with six annotations is stored once:

    <name>.json     dataset, media, samples
    <name>.0.npy    features of the first item: float16 (views, tokens, width), or uint8 (views, row_bytes)
    <name>.1.npy    features of the second item, ...

The name is the key of a single media item, else a hash of the items, or of the data set and the sample's id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from cache.export.rows import FILE_BYTES, FILE_ROWS, OutputFile, Positions, Source
from cache.format.spec import ARRAY_OF
from cache.format.tar_shard import BLOCK, END, member_header, npy_header, padded
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import (
    MEDIA_KINDS,
    MediaItems,
    MediaRows,
    References,
    all_rows,
    edges_of,
    number_media,
)
from cache.store.samples import samples_table


@dataclass(kw_only=True, eq=False)
class Group:
    """The samples of a data set that show the same tuple of media."""

    media: list[int]
    """Numbers of the media items, in the order of their placeholders."""
    samples: list[int] = field(default_factory=list)
    """Numbers of the samples in the data set's table."""


@dataclass(kw_only=True, eq=False)
class ExportedDataset:
    """One data set, ready to be written."""

    name: str
    """Name of the data set."""
    table: pa.Table
    """Its samples."""
    media: MediaItems
    """The media items that its samples refer to."""
    rows: MediaRows
    """Every row of these media."""
    groups: list[Group]
    """Samples by their media, in the order of their first samples."""
    lacking: int
    """Samples left out because one of their media has no features."""
    mismatched: int
    """Samples left out because a source gave other bytes than the sha256 that they state."""

    def array(self, item: int) -> str:
        """Return the array that holds the rows of one media item."""
        return ARRAY_OF[MEDIA_KINDS[self.media.kinds[item]]]


def gather_dataset(root: CacheRoot, dataset: str, reader: FeatureReader) -> ExportedDataset:
    """Group the samples of a data set whose media have features by their media.

    Raises:
        CacheError: there is no such data set.
    """
    table, ledger = samples_table(root, dataset), media_table(root)
    references = References.of(table["media"], ledger)
    media, (items,) = number_media([references], ledger)
    rows = all_rows(reader, media)
    mismatched = references.count(references.mismatch) > 0
    lacking = references.count(~np.append(rows.counts > 0, False)[items]) > 0
    edges = edges_of(references.counts)
    groups: dict[object, Group] = {}
    for sample in np.flatnonzero(~lacking).tolist():
        of_sample = items[edges[sample] : edges[sample + 1]]
        # Samples without media are not grouped: each gets a group of its own.
        group = groups.setdefault(of_sample.tobytes() or sample, Group(media=of_sample.tolist()))
        group.samples.append(sample)
    return ExportedDataset(
        name=dataset,
        table=table,
        media=media,
        rows=rows,
        groups=list(groups.values()),
        lacking=int((lacking & ~mismatched).sum()),
        mismatched=int(mismatched.sum()),
    )


def exported_rows(reader: FeatureReader, array: str, data: Sequence[ExportedDataset]) -> Positions:
    """Return the positions in `array` of the rows of all media items that these data sets export."""
    numbers = [np.empty(0, np.int64)]
    for one in data:
        exported = {
            item for group in one.groups for item in group.media if one.array(item) == array
        }
        numbers.append(one.rows.take(np.array(sorted(exported), np.int64)).rows)
    return reader.index[array].positions(np.unique(np.concatenate(numbers)))


def sample_files(source: Source, data: ExportedDataset) -> Iterator[OutputFile]:
    """Yield the tars of one data set."""
    text = data.table.nbytes // max(1, len(data.table))

    def size(group: Group) -> int:
        total = 2 * BLOCK + padded(len(group.samples) * text + 1024)
        for item in group.media:
            total += 2 * BLOCK + len(data.rows.of(item)) * source.row_bytes(data.array(item))
        return total

    def tar(number: int, some: Sequence[Group], nbytes: int) -> OutputFile:
        return OutputFile(f"{data.name}-{number:06d}.tar", nbytes, _tar_blocks(source, data, some))

    number, nbytes = 0, 0
    some: list[Group] = []
    for group in data.groups:
        more = size(group)
        if some and (nbytes + more > FILE_BYTES or len(some) == FILE_ROWS):
            yield tar(number, some, nbytes)
            number, some, nbytes = number + 1, [], 0
        some.append(group)
        nbytes += more
    if some:
        yield tar(number, some, nbytes)


def _tar_blocks(
    source: Source, data: ExportedDataset, groups: Sequence[Group]
) -> Iterator[bytes | memoryview]:
    for group in groups:
        for name, contents in _members(source, data, group):
            nbytes = sum(map(len, contents))
            yield from (member_header(name, nbytes), *contents, bytes(padded(nbytes) - nbytes))
    yield END


def _members(
    source: Source, data: ExportedDataset, group: Group
) -> list[tuple[str, tuple[bytes | memoryview, ...]]]:
    """Return the name and the contents of each file of one sample."""
    name, about = _name(data, group), []
    members: list[tuple[str, tuple[bytes | memoryview, ...]]] = []
    mentions = data.table["media"][group.samples[0]].as_py()
    for number, (item, mention) in enumerate(zip(group.media, mentions, strict=True)):
        array = data.array(item)
        positions = source.reader.index[array].positions(data.rows.of(item))
        rows = source.rows(array, positions)
        dtype = "<f2" if source.codec == "fp16" else "|u1"
        header = npy_header(dtype, (len(rows), *source.shape(array)))
        members.append((f"{name}.{number}.npy", (header, rows.data.cast("B"))))
        facts = [
            source.facts(array, p, row) for p, row in zip(positions.tolist(), rows, strict=True)
        ]
        about.append(
            {
                "source": mention["source"],
                "kind": mention["kind"],
                "key": data.media.key(item),
                "tokens": source.reader.spec.tokens(array),
                "views": [fact.view for fact in facts],
                "time_s": [fact.time_s for fact in facts],
                "crc32c": [fact.crc for fact in facts],
            }
        )
    values = {
        "dataset": data.name,
        "codec": source.codec,
        "width": source.reader.spec.width,
        "media": about,
        # Without dataset and media, which are equal for all samples of the group.
        "samples": data.table.select(["id", "messages", "weight", "task", "choice"])
        .take(pa.array(group.samples, pa.int64()))
        .to_pylist(),
    }
    text = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    return [(f"{name}.json", (text,)), *members]


def _name(data: ExportedDataset, group: Group) -> str:
    """Return the name of a group in the tar: 64 hex digits, unique in the data set."""
    keys = [data.media.key(item) for item in group.media]
    if len(keys) == 1:
        return keys[0]
    if keys:
        kinds = (MEDIA_KINDS[data.media.kinds[item]] for item in group.media)
        text = "\n".join(f"{kind} {key}" for kind, key in zip(kinds, keys, strict=True))
    else:
        text = f"text {data.name} {data.table['id'][group.samples[0]].as_py()}"
    return hashlib.sha256(text.encode()).hexdigest()


def json_lines(data: ExportedDataset) -> Iterator[bytes]:
    """Yield one line of JSON for each exported sample, with the keys of its media."""
    media = {number: group.media for group in data.groups for number in group.samples}
    numbers = sorted(media)
    columns = ["id", "messages", "media", "weight", "task", "choice"]
    for start in range(0, len(numbers), 4096):
        some = numbers[start : start + 4096]
        samples = data.table.select(columns).take(pa.array(some, pa.int64())).to_pylist()
        for number, sample in zip(some, samples, strict=True):
            sample["media"] = [
                {"source": ref["source"], "kind": ref["kind"], "key": data.media.key(item)}
                for ref, item in zip(sample["media"], media[number], strict=True)
            ]
            yield json.dumps(sample, ensure_ascii=False, allow_nan=False).encode() + b"\n"
