"""Read and write the samples of data sets: texts, and the media that they mention.

A data set is one sealed Parquet file, which is replaced as a whole when its content changes. It does not
depend on any encoder: a sample names its media by their sources, and the media table (`cache.store.ledger`)
has the key of each source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cache.errors import CorruptError, NotFoundError, command_line, nearest
from cache.format.checksums import UNSEALED, map_sealed, seal_file
from cache.format.gate import fit, open_file, parse_json
from cache.format.parquet import (
    all_hex,
    all_true,
    column_names,
    footer_metadata,
    open_parquet,
    parquet_errors,
    read_metadata,
    table_limits,
)
from cache.store.files import ROW_GROUP, new_file
from cache.store.paths import CacheRoot, is_dataset_name

GROUP_BYTES = 64 << 20
"""A row group ends early once its samples take this many bytes: readers hold one at a time."""

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str
    """Text. `<image>` and `<video>` of a user stand for the sample's media: `cache.format.media_marks`."""
    weight: float = 1.0
    """Factor on the loss of this turn's tokens; it has no effect on turns that are not the assistant's."""


@dataclass(frozen=True, kw_only=True)
class MediaRef:
    """A media item, as a sample names it."""

    source: str
    """URL verbatim, absolute path, or a name of `cache.format.embedded`. The media table has its key."""
    kind: str = "image"
    """image or video: a key of `cache.format.spec.ARRAY_OF`."""
    sha256: str | None = None
    """sha256 of its bytes (64 hex digits), if the data set states it. Other bytes are refused."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training example."""

    id: str
    """Unique in its data set."""
    dataset: str
    """Name of the data set."""
    messages: tuple[Message, ...]
    """The conversation, first turn first."""
    media: tuple[MediaRef, ...] = ()
    """Media of the marks in user turns, in order."""
    weight: float = 1.0
    """Factor on the loss of the whole sample."""
    task: str = ""
    """Type of question, by which evaluations are reported."""
    choice: str = ""
    """Samples of one data set with the same non-empty value are answers to one question; training draws
    one of them an epoch."""


Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
"""The three parts of the samples. `val` is for choosing, `test` for reporting."""
HASH_BITS = 32
"""Bits of a hash that decide the split."""

_ORIGIN = "origin"
"""Key of the origin in the metadata of a file of samples."""

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
        "choice": pa.string(),
    }
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the samples of a data set came from."""

    words: tuple[str, ...]
    """Words of the command line of `encode.run` that read them: `--dataset`, its value, and the options that
    reading needs. Paths are absolute."""
    account: Mapping[str, Any] = field(default_factory=dict)
    """What reading them used, ignored and left out: `encode.records.account.Account.to_json()`."""
    said: str = ""
    """The same in one line, as `encode.run` printed it."""


class _UnchangedError(Exception):
    pass


def write_samples(
    root: CacheRoot,
    dataset: str,
    samples: Iterable[Sample],
    origin: Origin | Callable[[], Origin] | None = None,
) -> bool:
    """Make `samples` the content of `dataset`.

    The samples are streamed; memory holds one row group. Contents are compared by a digest of the samples
    and not of the file, because another version of Parquet may write other bytes.

    Args:
        root: the cache.
        dataset: its name.
        samples: its content.
        origin: where they came from, or a function that returns it, called after the last sample. It is not
            part of the content's digest.

    Returns:
        False if the file has these samples and this origin already; it is then unchanged.
    """
    path = root.samples(dataset)
    digest = hashlib.sha256()
    remaining = iter(samples)
    try:
        with new_file(path, root=root.path) as file:
            with pq.ParquetWriter(
                file,
                _SAMPLE_SCHEMA,
                compression="zstd",
                write_statistics=False,
                use_dictionary=_FEW_VALUES,
            ) as writer:
                while group := _next_group(remaining, digest):
                    writer.write_table(pa.Table.from_pylist(group, _SAMPLE_SCHEMA))
                found = origin() if callable(origin) else origin
                metadata = {"content": digest.hexdigest()}
                if found is not None:
                    # The seal is the last "sha256:" of the file; an origin must not contain another.
                    metadata[_ORIGIN] = json.dumps(vars(found)).replace("sha256:", r"sha256\u003a")
                writer.add_key_value_metadata({**metadata, "seal": UNSEALED})
            seal_file(file)
            if _intact_metadata(path, root) == metadata:
                raise _UnchangedError
    except _UnchangedError:
        return False
    return True


_FEW_VALUES = ["dataset", "task", "messages.list.element.role", "media.list.element.kind"]
"""Columns that are stored as a dictionary. How many bytes the others take is known before they are read."""


def _next_group(remaining: Iterator[Sample], digest: hashlib._Hash) -> list[dict[str, Any]]:
    """Take the samples of one row group, and add them to the digest of the content."""
    group, nbytes = [], 0
    for sample in islice(remaining, ROW_GROUP):
        group.append(_plain(sample))
        line = json.dumps(group[-1], ensure_ascii=False).encode() + b"\n"
        digest.update(line)
        nbytes += len(line)
        if nbytes > GROUP_BYTES:
            break
    return group


def read_origin(root: CacheRoot, dataset: str) -> Origin | None:
    """Return where the samples of a data set came from; None if the file does not say so."""
    with _open_samples(root, dataset) as file:
        return _origin(footer_metadata(file))


def _origin(metadata: Mapping[str, str]) -> Origin | None:
    try:
        return fit(parse_json(metadata[_ORIGIN]), Origin)
    except (KeyError, ValueError):
        return None


DEMO_WORDS = ("--dataset", "demo")
"""What to encode where there is nothing yet."""


def dataset_words(root: CacheRoot, dataset: str | None) -> tuple[str, ...]:
    """Return the options of `encode.run` that read a data set again, from any folder.

    Args:
        root: the cache.
        dataset: a data set of the cache, or a name that `--dataset` accepts; None: the first of the cache, or
            without any the demo.
    """
    names = dataset_names(root)
    if dataset is None:
        if not names:
            return DEMO_WORDS
        dataset = names[0]
    # Also of a damaged file: these words are only printed.
    aside = root.damaged_dir / "samples" / dataset / "part-00000.parquet"
    for path in (root.samples(dataset), aside) if is_dataset_name(dataset) else ():
        with contextlib.suppress(OSError, CorruptError):
            if origin := _origin(_metadata(path, root)):
                return origin.words
    return ("--dataset", dataset)


def samples_digest(root: CacheRoot, dataset: str) -> str:
    """Return the sha256 (hex) of the samples of a data set in their order, after checking the file."""
    with _open_samples(root, dataset) as file:
        return footer_metadata(file)["content"]


def read_samples(root: CacheRoot, dataset: str) -> Iterator[Sample]:
    """Yield the samples of a data set in their order, with one row group in memory at a time."""
    with _open_samples(root, dataset) as file:
        for group in range(file.num_row_groups):
            table = _checked(file, file.read_row_group(group))
            yield from _samples(table)


def read_media_refs(root: CacheRoot, dataset: str) -> Iterator[MediaRef]:
    """Yield what the samples of a data set mention, in order, with one row group in memory at a time."""
    with _open_samples(root, dataset) as file:
        for group in range(file.num_row_groups):
            table = _checked(file, file.read_row_group(group, columns=["media"]))
            for refs in table["media"].to_pylist():
                yield from (MediaRef(**ref) for ref in refs)


def samples_at(root: CacheRoot, dataset: str, numbers: npt.NDArray[np.int64]) -> Iterator[Sample]:
    """Yield the samples with these numbers, (n,) ascending. Only row groups that have one are read.

    Raises:
        NotFoundError: there is no such data set.
        CorruptError: its file is damaged, or has fewer samples.
    """
    with _open_samples(root, dataset) as file:
        start = found = 0
        for group in range(file.num_row_groups):
            stop = start + file.metadata.row_group(group).num_rows
            here = numbers[(numbers >= start) & (numbers < stop)] - start
            if len(here):
                yield from _samples(_checked(file, file.read_row_group(group)).take(pa.array(here)))
            start, found = stop, found + len(here)
        if found < len(numbers):
            raise ValueError(f"{start:,} samples, so none has number {numbers[-1]:,}")


def _samples(table: pa.Table) -> Iterator[Sample]:
    """Yield the samples of a checked table."""
    for batch in table.to_batches(max_chunksize=ROW_GROUP):
        for row in batch.to_pylist():
            messages = tuple(Message(**message) for message in row.pop("messages"))
            media = tuple(MediaRef(**ref) for ref in row.pop("media"))
            yield Sample(messages=messages, media=media, **row)


def samples_table(root: CacheRoot, dataset: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Return the samples of a data set as an Arrow table.

    Args:
        root: the cache.
        dataset: its name.
        columns: some of id, dataset, messages, media, weight, task, choice; None: all of them.

    Raises:
        NotFoundError: there is no such data set.
        CorruptError: its file is damaged.
    """
    with _open_samples(root, dataset) as file:
        return _checked(file, file.read(columns))


def dataset_names(root: CacheRoot) -> list[str]:
    """Return the names of the data sets in the cache, sorted."""
    names = (path.parent.name for path in root.samples_dir.glob("*/part-00000.parquet"))
    return sorted(filter(is_dataset_name, names))


def _plain(sample: Sample) -> dict[str, Any]:
    """Return what `dataclasses.asdict` returns, in a tenth of its time."""
    return {
        **vars(sample),
        "messages": [vars(message) for message in sample.messages],
        "media": [vars(ref) for ref in sample.media],
    }


def _samples_file(root: CacheRoot, dataset: str) -> Path:
    """Return the file of a data set, if there is one."""
    path = root.samples(dataset)
    if not os.path.lexists(path):
        names = dataset_names(root)
        raise NotFoundError(
            f"no data set {dataset!r} under {root.path}/samples (there: {', '.join(names) or 'none'})"
            f"{nearest(dataset, names)}. Make it (of your own files: --dataset {dataset}=folder:PATH): "
            f"{command_line('encode.run', '--dataset', dataset, '--features', root.path)}"
        )
    return path


def _metadata(path: Path, root: CacheRoot) -> dict[str, str]:
    """Return what the file at `path` says about itself, without checking its seal."""
    with open_file(path, root.path) as file, parquet_errors(path):
        return read_metadata(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextlib.contextmanager
def _open_samples(root: CacheRoot, dataset: str) -> Iterator[pq.ParquetFile]:
    """Open the file of a data set; see `_open_file`."""
    with _open_file(_samples_file(root, dataset), root, dataset) as file:
        yield file


@contextlib.contextmanager
def _open_file(path: Path, root: CacheRoot, dataset: str) -> Iterator[pq.ParquetFile]:
    """Open a file of samples, after checking its seal, its columns and what it takes in memory."""
    data = map_sealed(path, root.path)
    with parquet_errors(path):
        names = column_names(data)
        if names != _SAMPLE_SCHEMA.names:
            raise CorruptError(
                path,
                f"another version of this program wrote these samples ({', '.join(names)[:200]})",
                "write them again: "
                + command_line(
                    "encode.run", *dataset_words(root, dataset), "--features", root.path
                ),
            )
        with open_parquet(data, path, _SAMPLE_SCHEMA, table_limits(data)) as file:
            if not _DIGEST.fullmatch(footer_metadata(file)["content"]):
                raise ValueError("it has no digest of its samples")
            yield file


_DIGEST = re.compile("[0-9a-f]{64}")


def check_samples(path: Path, root: CacheRoot) -> None:
    """Check every value in a file of samples, whose folder has the name of the data set.

    Raises:
        CorruptError: it is damaged, or not what this program writes.
    """
    with _open_file(path, root, path.parent.name) as file:
        for group in range(file.num_row_groups):
            _checked(file, file.read_row_group(group))


def _checked(file: pq.ParquetFile, table: pa.Table) -> pa.Table:
    """Return some columns of a file of samples, after checking every value in them.

    Raises:
        ValueError: a value is missing, no text in UTF-8, or none that this program writes.
        pa.ArrowException: as a ValueError.
    """
    table.validate(full=True)  # UTF-8, and where lists begin
    parts: dict[str, pa.ChunkedArray] = {}
    for name in table.column_names:
        parts[name] = table[name]
        if name in ("messages", "media"):
            items = pc.list_flatten(table[name])
            if items.null_count:
                raise ValueError(f"one of its {name} is missing")
            for field in _SAMPLE_SCHEMA.field(name).type.value_type:
                parts[f"{name}.{field.name}"] = pc.struct_field(items, field.name)
    for name, values in parts.items():
        if values.null_count and name != "media.sha256":
            raise ValueError(f"a sample without {name}")
        if name.endswith("weight") and not all_true(
            pc.and_(pc.is_finite(values), pc.greater_equal(values, 0))
        ):
            raise ValueError("a weight is negative or no finite number")
    if "messages" in parts and not all_true(pc.is_in(parts["messages.role"], pa.array(ROLES))):
        raise ValueError(f"a role is none of {', '.join(ROLES)}")
    if "media" in parts and not all_hex(parts["media.sha256"]):
        raise ValueError("a sha256 is no 64 hex digits")
    # The schema that was written may have metadata of its own.
    return table.replace_schema_metadata({"content": footer_metadata(file)["content"]})


def _intact_metadata(path: Path, root: CacheRoot) -> dict[str, str] | None:
    """Return the content digest and the origin of the file at `path`; None if it is missing or damaged."""
    try:
        data = map_sealed(path, root.path)
        with parquet_errors(path):
            found = read_metadata(data)
    except (FileNotFoundError, CorruptError):
        return None
    return {name: found[name] for name in ("content", _ORIGIN) if name in found}


def content_digest(table: pa.Table) -> str:
    """Return the `samples_digest` of the data set that a samples table was read from."""
    return str(table.schema.metadata[b"content"], "ascii")


# ---- splits


def check_held_out(held_out: float) -> None:
    """Raise ValueError unless `val` and `test` leave something to train on."""
    if not 0 <= held_out < 0.5:
        raise ValueError(
            f"held_out {held_out} is not in [0, 0.5): it is the share of val and again of test, and leaves "
            "nothing to train on"
        )


def split_keys(keys: npt.NDArray[np.uint8], held_out: float) -> npt.NDArray[np.uint8]:
    """Return the split of each hash, (n, at least 4) bytes -> (n,) numbers in SPLITS.

    Hashes are spread evenly in [0, 1). Below `held_out` they are of `val`, from there to twice it of `test`.

    Raises:
        ValueError: `held_out` is not in [0, 0.5).
    """
    check_held_out(held_out)
    val, test = (int(share * 2**HASH_BITS) for share in (held_out, 2 * held_out))
    heads = np.ascontiguousarray(keys[:, : HASH_BITS // 8]).view(">u4").ravel()
    return np.where(heads < val, 1, np.where(heads < test, 2, 0)).astype(np.uint8)


def split_texts(table: pa.Table, held_out: float) -> npt.NDArray[np.uint8]:
    """Return the split of samples without media, (n,) numbers in SPLITS.

    The hash of the id decides, or that of the question for one of several answers.

    Args:
        table: the columns `id` and `choice` of n samples.
        held_out: see `split_keys`.
    """
    names = pc.if_else(pc.not_equal(table["choice"], ""), table["choice"], table["id"])
    digests = b"".join(hashlib.sha256(name.encode()).digest() for name in names.to_pylist())
    return split_keys(np.frombuffer(digests, np.uint8).reshape(-1, 32), held_out)
