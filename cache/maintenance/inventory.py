"""What an experiment on a data set needs of a space: what is there, what is missing, what it will read.

S samples of a data set, R media references of all of them together, D distinct sources among these,
M rows of the media table.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.format.frame_sampling import FULL, MAX_FRAMES, frame_views, time_view
from cache.format.spec import ARRAY_OF, PACKED_FROM
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import read_samples, samples_table
from configs import load

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int64]


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


@dataclass(frozen=True, kw_only=True, eq=False)
class References:
    """What the samples of one data set mention."""

    samples: int
    """S."""
    sample: Numbers
    """(R,) number of the sample."""
    media: Numbers
    """(R,) row in the media table, -1 for a source it does not know."""
    other: Mask
    """(R,) whether the sample says another hash than the bytes have that came: it is about another media."""
    sources: pa.Array
    """(D,) distinct sources."""
    rows: Numbers
    """(D,) their rows in the media table, -1 likewise."""
    videos: Mask
    """(D,) whether the samples take them for videos."""


def find_references(root: CacheRoot, dataset: str, media: pa.Table) -> References:
    """Of a data set, into `media`."""
    table = samples_table(root, dataset, ["media"])
    lists = table["media"].combine_chunks()
    refs = pc.list_flatten(lists)
    sources = pc.struct_field(refs, "source")
    rows = np.asarray(
        pc.index_in(sources, media["source"].combine_chunks()).fill_null(-1), np.int64
    )
    keys = media["key"].combine_chunks().take(pa.array(rows, mask=rows < 0))
    other = pc.not_equal(pc.struct_field(refs, "sha256"), keys)  # null where one of them is unknown
    distinct = sources.unique()
    first = np.asarray(pc.index_in(distinct, sources), np.int64)
    kinds = pc.struct_field(refs, "kind").take(pa.array(first))
    return References(
        samples=len(table),
        sample=np.asarray(pc.list_parent_indices(lists), np.int64),
        media=rows,
        other=np.asarray(other.fill_null(False), bool),
        sources=distinct,
        rows=rows[first],
        videos=np.asarray(pc.equal(kinds, "video"), bool),
    )


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


def _rows_of(reader: FeatureReader, array: str, first: Numbers) -> Numbers:
    """How many rows the media have whose first rows (n,) are given."""
    index = reader.index[array]
    heads = np.ascontiguousarray(index.keys[:, :8]).view(np.uint64).reshape(-1)  # of sha256: unique
    distinct, counts = np.unique(heads, return_counts=True)
    return counts[np.searchsorted(distinct, heads[index.positions(first)])]


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
