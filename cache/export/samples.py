"""Data sets with their features, as WebDataset tars that train elsewhere by themselves.

One sample of the tars is one tuple of media with everything a data set says of it, so that an image with
six annotations is stored once:

    <name>.json     dataset, media, samples
    <name>.0.npy    features of the first media: float16 (views, tokens, width), or uint8 (views, row_bytes)
    <name>.1.npy    of the second, ...

The name is the media's key; of several media, or of none, a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.export.rows import FILE_BYTES, FILE_ROWS, Part, Positions, Progress, Source
from cache.format.spec import ARRAY_OF, ARRAYS
from cache.format.tar_shard import BLOCK, END, member_header, npy_header, padded
from cache.store.ledger import media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import samples_table


class Media(NamedTuple):
    """An image or video of a sample, with features."""

    kind: str
    """image or video."""
    key: str
    """64 hex digits."""


@dataclass(kw_only=True)
class Group:
    """What a data set says of one tuple of media."""

    media: tuple[Media, ...]
    """In the order of their placeholders."""
    sources: tuple[str, ...]
    """As the first of the samples names them."""
    samples: list[int] = field(default_factory=list)
    """Numbers of the samples in the data set's table."""


@dataclass(kw_only=True)
class Exported:
    """One data set, ready to be written."""

    name: str
    """Of the data set."""
    table: pa.Table
    """Its samples."""
    groups: list[Group]
    """In the order of their first samples."""
    lacking: int
    """Samples left out, because a media of theirs has no features."""


class Views:
    """key -> positions of all its rows in one array, in time order."""

    def __init__(self, reader: FeatureReader, kind: str):
        self._index = reader.index[kind]
        order = self._index.by_identity()
        again = np.array([second for _, second in self._index.duplicates()], np.int64)
        self._order = order[~np.isin(order, again)]
        self._keys = np.ascontiguousarray(self._index.keys[self._order]).view("S32").reshape(-1)

    def __contains__(self, key: str) -> bool:
        return len(self.positions(key)) > 0

    def positions(self, key: str) -> Positions:
        """(views,), empty when there are none."""
        wanted = np.frombuffer(bytes.fromhex(key), "S32")[0]
        start, stop = (np.searchsorted(self._keys, wanted, side) for side in ("left", "right"))
        found = self._order[start:stop]
        return found[np.argsort(self._index.times[found], kind="stable")]


def all_views(reader: FeatureReader) -> dict[str, Views]:
    """Kind of array -> its rows by key."""
    return {kind: Views(reader, kind) for kind in ARRAYS}


def keys_of(root: CacheRoot, table: pa.Table) -> dict[str, str]:
    """Source -> key of the media that these samples mention, where it is known."""
    sources = pc.struct_field(pc.list_flatten(table["media"].combine_chunks()), "source").unique()
    media = media_table(root).select(["source", "key"])
    known = media.filter(pc.and_(pc.is_in(media["source"], sources), pc.is_valid(media["key"])))
    return dict(zip(*(column.to_pylist() for column in known.columns), strict=True))


def gather(root: CacheRoot, dataset: str, views: dict[str, Views]) -> Exported:
    """The samples of a data set whose media have features, by their media.

    Raises:
        UserError: there is no such data set.
    """
    table = samples_table(root, dataset)
    keys = keys_of(root, table)
    groups: dict[object, Group] = {}
    lacking = 0
    batches = table.select(["media"]).to_batches(max_chunksize=8192)
    mentions = (refs for batch in batches for refs in batch["media"].to_pylist())
    for number, refs in enumerate(mentions):
        media = tuple(Media(ref["kind"], keys.get(ref["source"], "")) for ref in refs)
        if not all(one.key and one.key in views[ARRAY_OF[one.kind]] for one in media):
            lacking += 1
            continue
        sources = tuple(ref["source"] for ref in refs)
        group = Group(media=media, sources=sources)
        groups.setdefault(media or number, group).samples.append(number)
    return Exported(name=dataset, table=table, groups=list(groups.values()), lacking=lacking)


def sample_parts(source: Source, views: dict[str, Views], data: Exported) -> Iterator[Part]:
    """The tars of one data set."""
    text = data.table.nbytes // max(1, len(data.table))

    def size(group: Group) -> int:
        total = 2 * BLOCK + padded(len(group.samples) * text + 1024)
        for one in group.media:
            kind = ARRAY_OF[one.kind]
            total += 2 * BLOCK + len(views[kind].positions(one.key)) * source.row_bytes(kind)
        return total

    def part(number: int, some: Sequence[Group], nbytes: int) -> Part:
        def write(file: BinaryIO, progress: Progress) -> None:
            for group in some:
                progress(_write_group(file, source, views, data, group))
            file.write(END)

        return Part(f"{data.name}-{number:06d}.tar", nbytes, write)

    number, nbytes = 0, 0
    some: list[Group] = []
    for group in data.groups:
        more = size(group)
        if some and (nbytes + more > FILE_BYTES or len(some) == FILE_ROWS):
            yield part(number, some, nbytes)
            number, some, nbytes = number + 1, [], 0
        some.append(group)
        nbytes += more
    if some:
        yield part(number, some, nbytes)


def _write_group(
    file: BinaryIO, source: Source, views: dict[str, Views], data: Exported, group: Group
) -> int:
    """One sample of the tar; its bytes."""
    name, about = _name(data, group), []
    members: list[tuple[str, tuple[Any, ...]]] = []
    for number, (one, where) in enumerate(zip(group.media, group.sources, strict=True)):
        kind = ARRAY_OF[one.kind]
        positions = views[kind].positions(one.key)
        rows = source.rows(kind, positions)
        dtype = "<f2" if source.layout == "fp16" else "|u1"
        header = npy_header(dtype, (len(rows), *source.shape(kind)))
        members.append((f"{name}.{number}.npy", (header, rows.data.cast("B"))))
        facts = [
            source.facts(kind, p, row) for p, row in zip(positions.tolist(), rows, strict=True)
        ]
        about.append(
            {
                "source": where,
                "kind": one.kind,
                "key": one.key,
                "tokens": source.reader.spec.tokens(kind),
                "views": [fact.view for fact in facts],
                "time_s": [fact.time_s for fact in facts],
                "crc32c": [fact.crc for fact in facts],
            }
        )
    values = {
        "dataset": data.name,
        "codec": source.layout,
        "width": source.reader.spec.width,
        "media": about,
        "samples": _samples(data.table, group.samples),
    }
    text = json.dumps(values, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    members.insert(0, (f"{name}.json", (text,)))
    return sum([_write_member(file, member, contents) for member, contents in members])


def _write_member(file: BinaryIO, name: str, contents: tuple[Any, ...]) -> int:
    """One file of a tar; the bytes it takes."""
    nbytes = sum(map(len, contents))
    file.writelines((member_header(name, nbytes), *contents, bytes(padded(nbytes) - nbytes)))
    return BLOCK + padded(nbytes)


def _samples(table: pa.Table, numbers: Sequence[int]) -> list[dict[str, Any]]:
    """What is said, without what is the same for all of the group."""
    columns = ["id", "messages", "weight", "task"]
    return list(table.select(columns).take(pa.array(numbers, pa.int64())).to_pylist())


def _name(data: Exported, group: Group) -> str:
    """64 hex digits, the only ones of this data set."""
    if len(group.media) == 1:
        return group.media[0].key
    if group.media:
        text = "\n".join(f"{one.kind} {one.key}" for one in group.media)
    else:
        text = f"text {data.name} {data.table['id'][group.samples[0]].as_py()}"
    return hashlib.sha256(text.encode()).hexdigest()


def texts(root: CacheRoot, data: Exported) -> Iterator[bytes]:
    """The samples of a data set, a line of JSON each, with the keys of their media."""
    keys = keys_of(root, data.table)
    numbers = sorted(number for group in data.groups for number in group.samples)
    columns = ["id", "messages", "media", "weight", "task"]
    for start in range(0, len(numbers), 4096):
        some = pa.array(numbers[start : start + 4096], pa.int64())
        for sample in data.table.select(columns).take(some).to_pylist():
            media = [
                {"source": ref["source"], "kind": ref["kind"], "key": keys[ref["source"]]}
                for ref in sample["media"]
            ]
            line = {**sample, "media": media}
            yield json.dumps(line, ensure_ascii=False, allow_nan=False).encode() + b"\n"
