"""What is in a cache: the figures behind `cache.ls` and `cache.gc`.

S samples of a data set, R media references of all of them together, M rows of the media table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.layout import CacheRoot
from cache.locks import driver_holder
from cache.reader import FeatureReader
from cache.spec import ARRAY_OF, KINDS
from cache.tables import dataset_names, media_table, samples_table
from cache.views import FULL, time_view
from configs import UserError


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
    """Kind -> side of the pooling window, patches."""
    rows: dict[str, int] = field(default_factory=dict)
    """Kind -> committed rows."""
    nbytes: int = 0
    """Size of the committed shards."""
    writer: str | None = None
    """The job that writes to it now."""
    damage: str | None = None
    """Why it cannot be opened."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _References:
    """What the samples of one data set mention."""

    samples: int
    """S."""
    sample: npt.NDArray[np.int64]
    """(R,) number of the sample."""
    media: npt.NDArray[np.int64]
    """(R,) row in the media table, -1 for a source it does not know."""
    sources: pa.Array
    """Distinct sources."""


def open_spaces(root: CacheRoot) -> tuple[list[SpaceSummary], dict[str, FeatureReader]]:
    """A summary of every space, and a reader of those that can be opened."""
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
        summary.pool = {kind: reader.spec.pool(kind) for kind in KINDS}
        summary.rows = {kind: reader.rows(kind) for kind in KINDS}
        summary.nbytes = sum(sum(index.nbytes.values()) for index in reader.index.values())
    return summaries, readers


def summarise_datasets(
    root: CacheRoot, readers: Mapping[str, FeatureReader]
) -> list[DatasetSummary]:
    """A summary of every data set, with its coverage by each space."""
    media = media_table(root)
    failed = np.asarray(pc.equal(media["status"], "failed"), bool)
    present = {name: _present(media, reader) for name, reader in readers.items()}
    summaries = []
    for name in dataset_names(root):
        references = _references(root, name, media)
        known = references.media[references.media >= 0]
        summaries.append(
            DatasetSummary(
                name=name,
                samples=references.samples,
                media=len(references.sources),
                failed=int(failed[np.unique(known)].sum()),
                coverage={space: _coverage(references, here) for space, here in present.items()},
            )
        )
    return summaries


def list_failures(root: CacheRoot) -> list[Failures]:
    """All failed media, the most frequent (stage, error, host, data set) first."""
    media = media_table(root)
    failed = media.filter(pc.equal(media["status"], "failed"))
    mentioned: dict[str, list[str]] = defaultdict(list)
    for name in dataset_names(root):
        sources = _references(root, name, media).sources
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
        known = _references(root, name, media).media
        mentioned[known[known >= 0]] = True
    keys = media["key"].filter(pa.array(mentioned)).drop_null().unique().to_pylist()
    return set(map(bytes.fromhex, keys))


def _present(media: pa.Table, reader: FeatureReader) -> npt.NDArray[np.bool_]:
    """(M + 1,) whether each row of the media table has features; the last, for -1, has none.

    A clip has them when its first frame is there: its frames are committed together, and how many a
    training wants is for the trainer to say.
    """
    present = np.zeros(len(media) + 1, bool)
    keys = np.array(media["key"].to_pylist(), object)
    kinds = np.array(media["kind"].to_pylist(), object)
    for kind, view in (("picture", FULL), ("video", time_view(0))):
        rows = np.flatnonzero((kinds == kind) & (keys != None))  # noqa: E711 - elementwise
        present[rows] = reader.lookup(ARRAY_OF[kind], keys[rows].tolist(), view) >= 0
    return present


def _coverage(references: _References, present: npt.NDArray[np.bool_]) -> float:
    lacking = np.unique(references.sample[~present[references.media]])
    return 1 - len(lacking) / references.samples if references.samples else 1.0


def _references(root: CacheRoot, dataset: str, media: pa.Table) -> _References:
    table = samples_table(root, dataset, ["media"])
    lists = table["media"].combine_chunks()
    sources = pc.struct_field(pc.list_flatten(lists), "source")
    rows = pc.index_in(sources, media["source"].combine_chunks()).fill_null(-1)
    return _References(
        samples=len(table),
        sample=np.asarray(pc.list_parent_indices(lists), np.int64),
        media=np.asarray(rows, np.int64),
        sources=sources.unique(),
    )
