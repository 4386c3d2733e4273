"""Count what a cache has: spaces, data sets, their coverage by each space, and failures.

S samples of a data set, R mentions of media by all of them, M rows of the media table.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.errors import CacheError
from cache.format.frame_sampling import MAX_FRAMES, frame_views
from cache.format.spec import ARRAY_OF, ARRAYS
from cache.maintenance.encode_command import encode_command
from cache.store.ledger import media_table, note_subjects
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import (
    MEDIA_KINDS,
    VIDEO,
    Ints,
    MediaItems,
    References,
    all_rows,
    number_media,
    read_references,
)
from cache.store.samples import dataset_names, read_origin


@dataclass(frozen=True, kw_only=True)
class Need:
    """What one data set needs of one space."""

    media: int
    """Distinct sources without features there that did not fail: an encode job has to do these."""
    rows: int
    """Most rows that these become. A video of unknown length counts with the most frames it may have."""
    nbytes: int
    """Most bytes that these rows take."""
    reads: int
    """Bytes of the stored features, which one pass over the data set reads."""
    command: str | None
    """Command line that encodes the rest; None if nothing is missing."""


class SpaceMedia:
    """What one space has of the media that any data set mentions.

    A video counts as present once any of its frames is: they are committed together, and how many of them a
    training wants is the trainer's choice.
    """

    def __init__(self, reader: FeatureReader, media: MediaItems):
        self._reader = reader
        counts = all_rows(reader, media).counts
        row_bytes = [reader.geometry[ARRAY_OF[kind]].row_bytes for kind in MEDIA_KINDS]
        self._nbytes = counts * np.array(row_bytes)[media.kinds]
        self._present = np.append(counts > 0, False)  # -1, no media item, is not present

    def coverage(self, references: References, items: Ints) -> float:
        """Return the share of the samples whose media are all present.

        Args:
            references: R mentions by the samples of one data set.
            items: (R,) media item of each.
        """
        complete = references.count(~self._present[items]) == 0
        return float(complete.mean()) if len(complete) else 1.0

    def need(
        self, references: References, items: Ints, media: pa.Table, command: Callable[[], str]
    ) -> Need:
        """Return what is missing of a data set, and what a training on it reads.

        Args:
            references: R mentions by its samples.
            items: (R,) media item of each.
            media: the media table.
            command: returns the command line that encodes what is missing.
        """
        present = self._present[items]
        failed = references.look_up(np.asarray(pc.equal(media["status"], "failed"), bool), False)
        settled = np.unique(references.source[present | failed | references.mismatch])
        sources, first = np.unique(references.source, return_index=True)
        absent = first[~np.isin(sources, settled)]
        durations = np.asarray(media["duration_s"].fill_null(np.nan), np.float64)
        videos = absent[references.kind[absent] == VIDEO]
        frames = [
            MAX_FRAMES if np.isnan(duration_s) else len(frame_views(duration_s, MAX_FRAMES))
            for duration_s in references.look_up(durations, np.nan)[videos].tolist()
        ]
        spec, counts = self._reader.spec, {"image": len(absent) - len(videos), "frame": sum(frames)}
        return Need(
            media=len(absent),
            rows=sum(counts.values()),
            nbytes=sum(rows * spec.row_bytes(array) for array, rows in counts.items()),
            reads=int(self._nbytes[np.unique(items[present])].sum()),
            command=command() if len(absent) else None,
        )


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """Relative errors of the codec in the rows of one array, measured when each row was packed."""

    mean: float
    """Mean error."""
    median: float
    """Median error."""
    p99: float
    """Error that 99 of 100 rows do not exceed."""
    largest: float
    """Largest error."""


@dataclass(kw_only=True)
class SpaceSummary:
    """One space."""

    name: str
    """Name of the space."""
    encoder: str = ""
    """Display name of the encoder."""
    codec: str = ""
    """Row codec."""
    blocks: tuple[int, ...] = ()
    """Transformer blocks the features come from."""
    pool: dict[str, int] = field(default_factory=dict)
    """Array -> side of the pooling window, in patches."""
    rows: dict[str, int] = field(default_factory=dict)
    """Array -> committed rows, each (key, view) once."""
    doubled: dict[str, int] = field(default_factory=dict)
    """Array -> committed rows that do not count, because an older shard has the same (key, view)."""
    container: str = ""
    """Format of its shards: zarr or webdataset."""
    shards: dict[str, int] = field(default_factory=dict)
    """Array -> committed shards."""
    bytes_of: dict[str, int] = field(default_factory=dict)
    """Array -> bytes of its committed shards."""
    nbytes: int = 0
    """Bytes of the committed shards of all arrays."""
    error: dict[str, ErrorSummary] = field(default_factory=dict)
    """Array -> error of the codec, for arrays that have rows."""
    writer: str | None = None
    """Job that writes to it now; None if none does."""
    damage: str | None = None
    """Reason why it cannot be opened; None if it can."""


@dataclass(kw_only=True)
class DatasetSummary:
    """One data set."""

    name: str
    """Name of the data set."""
    samples: int
    """Number of its samples."""
    media: int
    """Number of distinct sources that it mentions."""
    failed: int
    """Number of these sources that failed."""
    notes: dict[str, int]
    """Subject of a note -> number of these sources that have it and are used, the most frequent first."""
    mismatched: int
    """Number of samples that state another sha256 than the bytes of one of their sources have."""
    coverage: dict[str, float]
    """Space -> share of the samples whose media all have features there."""
    needs: dict[str, Need]
    """Space -> what the data set needs of it."""
    account: dict[str, Any]
    """What reading it used, left out and ignored (`cache.store.samples.Origin`); empty: not known."""
    said: str
    """The same in one line; empty: not known."""


@dataclass(kw_only=True)
class Failures:
    """Sources of one host, in one data set, that failed for the same reason."""

    stage: str
    """Step that failed: fetch, verify, decode, encode or write."""
    error: str
    """Reason, in one line."""
    host: str
    """Host of the URLs; empty for files."""
    dataset: str
    """Data set that mentions them; empty if none does any more."""
    sources: list[str]
    """The sources."""
    command: str
    """Command line that tries them again; empty if no data set mentions them."""


@dataclass(kw_only=True)
class Notes:
    """Sources in one data set that are used and have the same note."""

    note: str
    """The note, in one line."""
    dataset: str
    """Data set that mentions them; empty if none does any more."""
    sources: list[str]
    """The sources."""


def open_spaces(
    root: CacheRoot, *, errors: bool = False
) -> tuple[list[SpaceSummary], dict[str, FeatureReader]]:
    """Return a summary of every space, and a reader for each space that can be opened.

    Args:
        root: the cache.
        errors: whether to summarise the codec's errors, which are read for all rows.
    """
    summaries, readers = [], {}
    for name in root.space_names():
        paths = root.space(name)
        writer = driver_holder(paths)
        try:
            reader = readers[name] = FeatureReader(paths)
        except CacheError as error:  # damaged, or has another format
            summaries.append(SpaceSummary(name=name, writer=writer, damage=str(error)))
            continue
        spec, sizes = reader.spec, {a: index.nbytes.values() for a, index in reader.index.items()}
        summaries.append(
            SpaceSummary(
                name=name,
                encoder=spec.encoder,
                codec=spec.codec,
                blocks=spec.blocks,
                pool={array: spec.pool(array) for array in ARRAYS},
                rows={array: reader.rows(array) for array in ARRAYS},
                doubled={array: len(index.doubled) for array, index in reader.index.items()},
                container=spec.container,
                shards={array: len(of) for array, of in sizes.items()},
                bytes_of={array: sum(of) for array, of in sizes.items()},
                nbytes=sum(map(sum, sizes.values())),
                error=codec_errors(reader) if errors else {},
                writer=writer,
            )
        )
    return summaries, readers


def codec_errors(reader: FeatureReader) -> dict[str, ErrorSummary]:
    """Return the codec's errors by array, for the arrays that have rows."""
    found = {}
    for array, index in reader.index.items():
        if len(index):
            errors = index.errors
            with np.errstate(invalid="ignore", over="ignore"):  # of Inf; cache.verify reports it
                median, p99 = np.percentile(errors, (50, 99)).tolist()
            mean, largest = float(errors.mean(dtype=np.float64)), float(errors.max())
            found[array] = ErrorSummary(mean=mean, median=median, p99=p99, largest=largest)
    return found


def summarise_datasets(
    root: CacheRoot,
    readers: Mapping[str, FeatureReader],
    presets: Mapping[str, Any] = {},
) -> list[DatasetSummary]:
    """Return a summary of every data set, with its coverage by each space.

    Args:
        root: the cache.
        readers: space name -> its reader.
        presets: configs/encoders.yaml, which shortens the command lines.
    """
    table = media_table(root)
    failed = np.asarray(pc.equal(table["status"], "failed"), bool)
    names = dataset_names(root)
    references = [read_references(root, name, table) for name in names]
    media, numbers = number_media(references, table)
    spaces = {name: SpaceMedia(reader, media) for name, reader in readers.items()}
    return [
        DatasetSummary(
            name=name,
            samples=len(of.counts),
            media=len(np.unique(of.source)),
            failed=int(failed[_known(of, table)].sum()),
            notes=_count_notes(table.take(pa.array(_known(of, table)))),
            mismatched=int((of.count(of.mismatch) > 0).sum()),
            coverage={space: one.coverage(of, items) for space, one in spaces.items()},
            needs={
                space: one.need(
                    of, items, table, partial(encode_command, root, name, readers[space], presets)
                )
                for space, one in spaces.items()
            },
            account=dict(origin.account) if (origin := read_origin(root, name)) else {},
            said=origin.said if origin else "",
        )
        for name, of, items in zip(names, references, numbers, strict=True)
    ]


def _known(references: References, media: pa.Table) -> Ints:
    """Return the rows of the media table that samples mention, each once."""
    return np.unique(references.source[references.source < len(media)])


def _used_with_notes(media: pa.Table) -> pa.ChunkedArray:
    """Return the mask of the rows whose media are used and have a note."""
    return pc.and_(pc.equal(media["status"], "ok"), pc.is_valid(media["note"]))


def _count_notes(media: pa.Table) -> dict[str, int]:
    """Return subject of a note -> number of media that have it and are used, the most frequent first."""
    counts: Counter[str] = Counter()
    noted = media["note"].filter(_used_with_notes(media))
    for group in pc.value_counts(noted).to_pylist():
        for subject in note_subjects(group["values"]):
            counts[subject] += group["counts"]
    return dict(counts.most_common())


def _with_datasets(
    root: CacheRoot, media: pa.Table, chosen: pa.ChunkedArray, columns: Sequence[str]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the chosen rows of the media table, each with every data set that mentions it, or ''."""
    mask = np.asarray(chosen, bool)
    mentioned: dict[int, list[str]] = defaultdict(list)
    for name in dataset_names(root):
        known = _known(read_references(root, name, media), media)
        for row in known[mask[known]].tolist():
            mentioned[row].append(name)
    rows = np.flatnonzero(mask)
    records = media.select(columns).take(pa.array(rows)).to_pylist()
    for row, record in zip(rows.tolist(), records, strict=True):
        for dataset in mentioned.get(row, [""]):
            yield record, dataset


def list_notes(root: CacheRoot) -> list[Notes]:
    """Return the media that are used and have a note, the most frequent (note, data set) first."""
    media = media_table(root)
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    columns = ("source", "note")
    for record, dataset in _with_datasets(root, media, _used_with_notes(media), columns):
        groups[record["note"], dataset].append(record["source"])
    found = [
        Notes(note=note, dataset=dataset, sources=sources)
        for (note, dataset), sources in groups.items()
    ]
    return sorted(found, key=lambda n: (-len(n.sources), n.note, n.dataset))


def list_failures(root: CacheRoot, presets: Mapping[str, Any] = {}) -> list[Failures]:
    """Return all failed media, the most frequent (stage, error, host, data set) first.

    Args:
        root: the cache.
        presets: configs/encoders.yaml, which shortens the command lines.
    """
    media = media_table(root)
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    failed, columns = pc.equal(media["status"], "failed"), ("source", "stage", "error")
    for record, dataset in _with_datasets(root, media, failed, columns):
        host = _host(record["source"])
        groups[record["stage"], record["error"], host, dataset].append(record["source"])
    datasets = {dataset for _, _, _, dataset in groups}
    commands = {
        name: encode_command(root, name, None, presets, "--retry-failed") if name else ""
        for name in datasets
    }
    found = [
        Failures(
            stage=stage,
            error=error,
            host=host,
            dataset=dataset,
            sources=sources,
            command=commands[dataset],
        )
        for (stage, error, host, dataset), sources in groups.items()
    ]
    return sorted(found, key=lambda f: (-len(f.sources), f.stage, f.error, f.host, f.dataset))


def _host(source: str) -> str:
    """Return the host of a URL without its port; '' for a path or an invalid URL."""
    try:
        return urlsplit(source).hostname or ""
    except ValueError:
        return ""
