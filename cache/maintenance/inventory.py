"""What an experiment on a data set needs of a space: what is there, what is missing, what it will read.

S samples of a data set, R media references of all of them together, D distinct sources among these,
M rows of the media table.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views, time_view
from cache.format.spec import ARRAY_OF, ARRAYS, PACKED_FROM
from cache.store.ledger import media_table
from cache.store.locks import driver_holder
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.references import References, _rows_of, find_references
from cache.store.samples import dataset_names, read_samples
from configs import UserError, load


@dataclass(frozen=True, kw_only=True)
class Need:
    """Of one data set in one space."""

    media: int
    """Distinct media without features there that did not fail: an encode job has these to do."""
    rows: int
    """Rows of these, at most: a video of unknown length counts with the most frames it may have."""
    nbytes: int
    """Bytes of these, at most."""
    reads: int
    """Bytes of the features that are there: what one pass over the data set reads."""
    command: str | None
    """What encodes the rest; None when nothing is missing, or encode.run cannot add to this space."""


class SpaceMedia:
    """The media table seen from one space.

    A video has features when its first frame is there: its frames are committed together, and how many a
    training wants is for the trainer to say.
    """

    def __init__(self, media: pa.Table, reader: FeatureReader):
        self._reader = reader
        self._failed = np.asarray(pc.equal(media["status"], "failed"), bool)
        self._durations = media["duration_s"].to_numpy()
        keys = np.array(media["key"].to_pylist(), object)
        videos = np.asarray(pc.equal(media["kind"], "video"), bool)
        keyed = np.asarray(pc.is_valid(media["key"]), bool)
        self._codes = np.asarray(
            media["key"].combine_chunks().dictionary_encode().indices.fill_null(-1), np.int64
        )
        self._present = np.zeros(len(media) + 1, bool)  # the last one stands for unknown sources
        self._nbytes = np.zeros(len(media), np.int64)
        for kind, of, view in (("image", ~videos, FULL), ("video", videos, time_view(0))):
            at, array = np.flatnonzero(of & keyed), ARRAY_OF[kind]
            found = reader.lookup(array, keys[at].tolist(), view)
            at = at[found >= 0]
            self._present[at] = True
            rows = _rows_of(reader, array, found[found >= 0]) if kind == "video" else 1
            self._nbytes[at] = rows * reader.geometry[array].row_bytes

    def coverage(self, references: References) -> float:
        """Share of the samples whose media all have features."""
        lacking = references.other | ~self._present[references.media]
        lacking = np.unique(references.sample[lacking])
        return 1 - len(lacking) / references.samples if references.samples else 1.0

    def need(self, references: References, *, dataset: str, root: CacheRoot) -> Need:
        """What is missing of a data set, and what is read of it."""
        known = references.rows[references.rows >= 0]
        here = known[self._present[known]]
        _, once = np.unique(self._codes[here], return_index=True)
        absent = ~self._present[references.rows]
        absent[references.rows >= 0] &= ~self._failed[known]
        spec, counts = self._reader.spec, {"image": 0, "frame": 0}
        open_ = spec.packed_from == PACKED_FROM[-1]
        counts["image"] = int((absent & ~references.videos).sum())
        for row in references.rows[absent & references.videos].tolist():
            duration_s = self._durations[row] if row >= 0 else np.nan
            frames = (
                MAX_FRAMES if np.isnan(duration_s) else len(frame_views(duration_s, MAX_FRAMES))
            )
            counts["frame"] += frames
        return Need(
            media=int(absent.sum()),
            rows=sum(counts.values()),
            nbytes=sum(rows * spec.row_bytes(array) for array, rows in counts.items()),
            reads=int(self._nbytes[here[once]].sum()),
            command=encode_command(self._reader, root, dataset) if absent.any() and open_ else None,
        )


def encode_command(reader: FeatureReader, root: CacheRoot, dataset: str) -> str:
    """The command line that encodes a data set into this space."""
    spec, entry = reader.spec, reader.load.get("encoder")
    entry = entry if isinstance(entry, Mapping) else {"name": spec.encoder}
    words = ["python", "-m", "encode.run", "--dataset", _dataset_word(root, dataset)]
    words += ["--encoder", str(entry["name"]), "--codec", spec.codec]
    words += _pool_words(spec.pool_image, spec.pool_frame, entry)
    if spec.container != "zarr":
        words += ["--format", spec.container]
    if reader.load.get("random_weights") and entry.get("library") == "open_clip":
        words.append("--random-weights")
    return shlex.join([*words, "--features", str(root.path)])


def _pool_words(image: int, frame: int, entry: Mapping[str, Any]) -> list[str]:
    """Pooling, where encoders.yaml does not say the same."""
    preset = load("encoders").get(entry["name"], {})
    words = ["--pool", str(image)] if preset.get("pool_image", 1) != image else []
    return words + (["--frame-pool", str(frame)] if preset.get("pool_frame", 3) != frame else [])


def _dataset_word(root: CacheRoot, dataset: str) -> str:
    """What `--dataset` takes: a name it knows, or a name and the folder that its first file lies in."""
    if dataset in load("datasets").get("datasets", {}):
        return dataset
    for sample in islice(read_samples(root, dataset), 1):
        for ref in sample.media[:1]:
            for relative in (sample.id, sample.id.rpartition("#")[0]):
                if relative and ref.source.endswith(f"/{relative}"):
                    return f"{dataset}=folder:{ref.source[: -len(relative) - 1] or '/'}"
    return f"{dataset}=folder:PATH"


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """Relative errors that the codec made in the rows of one array, each measured when its row was packed."""

    mean: float
    median: float
    p99: float
    """99 of 100 rows lose at most this."""
    largest: float


@dataclass(kw_only=True)
class SpaceSummary:
    """One space."""

    name: str
    """Its name."""
    encoder: str = ""
    """Display name of the encoder."""
    codec: str = ""
    """How rows are stored."""
    blocks: tuple[int, ...] = ()
    """Transformer blocks the features come from."""
    pool: dict[str, int] = field(default_factory=dict)
    """Array -> side of the pooling window, patches."""
    rows: dict[str, int] = field(default_factory=dict)
    """Array -> committed rows."""
    container: str = ""
    """What its shards are."""
    shards: dict[str, int] = field(default_factory=dict)
    """Array -> committed shards."""
    bytes_of: dict[str, int] = field(default_factory=dict)
    """Array -> size of these."""
    nbytes: int = 0
    """Size of the committed shards of all arrays."""
    error: dict[str, ErrorSummary] = field(default_factory=dict)
    """Array -> what the codec lost; of arrays that have rows."""
    writer: str | None = None
    """The job that writes to it now."""
    damage: str | None = None
    """Why it cannot be opened."""
    closed: bool = False
    """Whether encode.run adds to it no longer: made before features were rounded to float16."""


@dataclass(kw_only=True)
class DatasetSummary:
    """One data set."""

    name: str
    """Its name."""
    samples: int
    """Its samples."""
    media: int
    """Distinct media it mentions."""
    failed: int
    """Of these, how many the ledger has as failed."""
    coverage: dict[str, float]
    """Space -> share of the samples whose media all have features there."""
    needs: dict[str, Need]
    """Space -> what is missing there, and what a training on it reads."""


@dataclass(kw_only=True)
class Failures:
    """Media that failed for one reason, of one host, in one data set."""

    stage: str
    """Where: fetch, verify, decode, encode or write."""
    error: str
    """Why."""
    host: str
    """Of the URLs; empty for files."""
    dataset: str
    """The data set that mentions them; empty when none does any more."""
    sources: list[str]
    """Which."""


def open_spaces(
    root: CacheRoot, *, errors: bool = False
) -> tuple[list[SpaceSummary], dict[str, FeatureReader]]:
    """A summary of every space, with `errors` also of its codec's; and a reader of those that open."""
    summaries, readers = [], {}
    for name in root.space_names():
        paths = root.space(name)
        summary = SpaceSummary(name=name, writer=driver_holder(paths))
        summaries.append(summary)
        try:
            reader = FeatureReader(paths)
        except UserError as error:  # damaged, or of another format
            summary.damage = str(error)
            continue
        readers[name] = reader
        summary.encoder, summary.codec = reader.spec.encoder, reader.spec.codec
        summary.blocks = reader.spec.blocks
        summary.pool = {array: reader.spec.pool(array) for array in ARRAYS}
        summary.rows = {array: reader.rows(array) for array in ARRAYS}
        summary.container = reader.spec.container
        summary.closed = reader.spec.packed_from != PACKED_FROM[-1]
        sizes = {array: index.nbytes for array, index in reader.index.items()}
        summary.shards = {array: len(of) for array, of in sizes.items()}
        summary.bytes_of = {array: sum(of.values()) for array, of in sizes.items()}
        summary.nbytes = sum(summary.bytes_of.values())
        if errors:
            summary.error = codec_errors(reader)
    return summaries, readers


def codec_errors(reader: FeatureReader) -> dict[str, ErrorSummary]:
    """Of each array that has rows, as measured when they were packed."""
    found = {}
    for array, index in reader.index.items():
        if len(index):
            errors = index.columns.errors
            median, p99 = np.percentile(errors, (50, 99)).tolist()
            mean, largest = float(errors.mean(dtype=np.float64)), float(errors.max())
            found[array] = ErrorSummary(mean=mean, median=median, p99=p99, largest=largest)
    return found


def summarise_datasets(
    root: CacheRoot, readers: Mapping[str, FeatureReader]
) -> list[DatasetSummary]:
    """A summary of every data set, with its coverage by each space."""
    media = media_table(root)
    failed = np.asarray(pc.equal(media["status"], "failed"), bool)
    spaces = {name: SpaceMedia(media, reader) for name, reader in readers.items()}
    summaries = []
    for name in dataset_names(root):
        references = find_references(root, name, media)
        known = references.media[references.media >= 0]
        summaries.append(
            DatasetSummary(
                name=name,
                samples=references.samples,
                media=len(references.sources),
                failed=int(failed[np.unique(known)].sum()),
                coverage={space: here.coverage(references) for space, here in spaces.items()},
                needs={
                    space: here.need(references, dataset=name, root=root)
                    for space, here in spaces.items()
                },
            )
        )
    return summaries


def list_failures(root: CacheRoot) -> list[Failures]:
    """All failed media, the most frequent (stage, error, host, data set) first."""
    media = media_table(root)
    failed = media.filter(pc.equal(media["status"], "failed"))
    mentioned: dict[str, list[str]] = defaultdict(list)
    for name in dataset_names(root):
        sources = find_references(root, name, media).sources
        for source in failed["source"].filter(pc.is_in(failed["source"], sources)).to_pylist():
            mentioned[source].append(name)
    groups: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for row in failed.select(["source", "stage", "error"]).to_pylist():
        for dataset in mentioned.get(row["source"], [""]):
            host = _host(row["source"])
            groups[row["stage"], row["error"], host, dataset].append(row["source"])
    found = [
        Failures(stage=stage, error=error, host=host, dataset=dataset, sources=sources)
        for (stage, error, host, dataset), sources in groups.items()
    ]
    return sorted(found, key=lambda f: (-len(f.sources), f.stage, f.error, f.host, f.dataset))


def _host(source: str) -> str:
    """Of a URL, without its port; '' for a path, or what is no URL after all."""
    try:
        return urlsplit(source).hostname or ""
    except ValueError:
        return ""


def mentioned_keys(root: CacheRoot) -> set[bytes]:
    """Keys (32 bytes) of all media that a sample mentions, under any source."""
    media = media_table(root)
    mentioned = np.zeros(len(media), bool)
    for name in dataset_names(root):
        known = find_references(root, name, media).media
        mentioned[known[known >= 0]] = True
    keys = media["key"].filter(pa.array(mentioned)).drop_null().unique().to_pylist()
    return set(map(bytes.fromhex, keys))
