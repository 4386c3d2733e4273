"""The samples of one split as a map-style torch Dataset.

    data = cache.dataset("pixmo-cap", split="train")
    loader = DataLoader(data, 64, shuffle=True, num_workers=4, collate_fn=data.collate)

A worker reads the rows of a batch together: distinct rows once, adjacent ones by one call. The samples are
those of `train.run` with the same data sets and split. A sample without all its features is left out and
counted, a damaged row is an error.

S samples, R media of all samples together, K media items, W feature rows of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset, get_worker_info

from cache.errors import CacheError, NotFoundError, command_line, nearest
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.maintenance.encode_command import encode_command
from cache.store.ledger import media_table
from cache.store.paths import is_url
from cache.store.references import MEDIA_KINDS, edges_of, join_samples, within
from cache.store.samples import SPLITS, Split, content_digest, dataset_names, samples_table
from nanomolmo2.batch import Batch, Conversation, Example, collate, conversation_of
from nanomolmo2.memory import empty_rows
from nanomolmo2.source import Source

log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

ROWS_AT_ONCE = 1 << 18
"""Rows that are compared together. It bounds the memory of the comparison."""


class FeatureDataset(Dataset[Example]):
    """The samples of one split that have all their features, in the order of their data sets.

    It may be pickled: a spawned worker opens the cache and reads the texts again. Forked workers share both.
    """

    collate = staticmethod(collate)
    """The `collate_fn` of a DataLoader: samples -> `Batch`."""

    names: tuple[str, ...]
    """The data sets."""
    split: Split
    """`train`, `val` or `test`."""
    missing: int
    """Samples of the data sets that lack features, of all splits. They are left out."""
    failed: int
    """Samples of the data sets with failed media, of all splits. They are left out."""

    def __init__(self, source: Source, **values: Any) -> None:
        """Use `nanomolmo2.Cache.dataset`."""
        self._source = source
        self.names, self.split = values["names"], values["split"]
        self.missing, self.failed = values["missing"], values["failed"]
        self._digests: tuple[str, ...] = values["digests"]  # of the texts of each data set
        self._kept: list[Ints] = values["kept"]  # of each data set, the rows of its samples
        self._offsets: Ints = values["offsets"]  # (S + 1,) into _media
        self._media: Ints = values["media"]  # (R,) among the K
        self._keys: npt.NDArray[np.uint8] = values["keys"]  # (K, 32)
        self._kinds: npt.NDArray[np.uint8] = values["kinds"]  # (K,)
        self._starts: Ints = values["starts"]  # (K + 1,) into _rows
        self._rows: Ints = values["rows"]  # (W,)
        self._times: npt.NDArray[np.float64] = values["times"]  # (W,)
        self._loaded: pa.Table | None = None
        self._checked = True

    @property
    def spec(self) -> FeatureSpec:
        """How the features were made."""
        return self._source.reader.spec

    @property
    def ids(self) -> list[str]:
        """S names, `<data set>/<id>`."""
        names = np.repeat(self.names, [len(kept) for kept in self._kept]).tolist()
        ids = self._texts["id"].to_pylist()
        return [f"{name}/{one}" for name, one in zip(names, ids, strict=True)]

    @property
    def messages(self) -> list[Conversation]:
        """S conversations. No feature is read for them."""
        return [conversation_of(turns) for turns in self._texts["messages"].to_pylist()]

    @property
    def tasks(self) -> list[str]:
        """S types of question; '' where the data set has none."""
        tasks: list[str] = self._texts["task"].to_pylist()
        return tasks

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __repr__(self) -> str:
        return (
            f"<FeatureDataset {', '.join(self.names)}: {len(self):,} {self.split} samples; of all splits "
            f"{self.missing:,} not encoded, {self.failed:,} with failed media>"
        )

    def __getitem__(self, index: int) -> Example:
        """Return one sample.

        Raises:
            IndexError: there is none.
            CorruptError: a row has changed since it was written.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Return some samples, in the order given; each distinct row is read once.

        Raises:
            IndexError: a number is that of no sample.
            CorruptError: a row has changed since it was written.
            UnreachableError: a row of a remote cache cannot be fetched.
        """
        chosen = np.asarray(indices, np.int64)
        chosen = np.where(chosen < 0, chosen + len(self), chosen)
        if ((chosen < 0) | (chosen >= len(self))).any():
            raise IndexError(f"{list(indices)}: there are {len(self):,} samples")
        counts = self._offsets[chosen + 1] - self._offsets[chosen]
        media = self._media[within(self._offsets[chosen], counts)]
        frames = self._starts[media + 1] - self._starts[media]
        at = within(self._starts[media], frames)
        codes, picks = self._read(self._rows[at], np.repeat(self._kinds[media], frames))
        texts = self._texts.take(pa.array(chosen))
        messages = texts["messages"].to_pylist()
        sets = np.searchsorted(edges_of(np.array([len(k) for k in self._kept])), chosen, "right")
        return Batch(
            spec=self.spec,
            ids=[
                f"{self.names[of - 1]}/{name}"
                for of, name in zip(sets.tolist(), texts["id"].to_pylist(), strict=True)
            ],
            messages=[conversation_of(turns) for turns in messages],
            turn_weights=[[turn["weight"] for turn in one] for one in messages],
            weights=torch.tensor(texts["weight"].to_pylist(), dtype=torch.float32),
            tasks=texts["task"].to_pylist(),
            codes=codes,
            media=edges_of(counts),
            media_keys=self._keys[media],
            media_kinds=self._kinds[media],
            frames=edges_of(frames),
            picks=picks,
            frame_times=self._times[at],
        )

    def _read(
        self, rows: Ints, kinds: npt.NDArray[np.uint8]
    ) -> tuple[dict[str, torch.Tensor], Ints]:
        """Read rows (F,) of media of some kinds (F,).

        Returns:
            Array -> its distinct rows (R, row_bytes), in the order of their first use; and for each of the F
            its number among those of its array.
        """
        reader = self._source.reader
        if not self._checked:
            self._check_rows()
        if get_worker_info() is not None and not is_url(self._source.where):
            reader.threads = 1  # the workers read side by side
        codes, picks = {}, np.empty_like(rows)
        for kind, name in enumerate(MEDIA_KINDS):
            array, here = ARRAY_OF[name], kinds == kind
            distinct, first, number = np.unique(rows[here], return_index=True, return_inverse=True)
            order = np.argsort(first)
            rank = np.empty_like(order)
            rank[order] = np.arange(len(order))
            picks[here] = rank[number]
            codes[array] = empty_rows(len(distinct), reader.spec.row_bytes(array))
            if len(distinct):
                reader.read_into(array, distinct[order], codes[array].numpy())
        return codes, picks

    # ---- in another process

    @property
    def _texts(self) -> pa.Table:
        """The columns id, messages, weight and task of the S samples."""
        if self._loaded is None:
            self._loaded = _load_texts(self._source, self.names, self._kept, self._digests)
        return self._loaded

    def _check_rows(self) -> None:
        """Check that row numbers mean the same media in the cache as this process opened it."""
        of_row = np.repeat(np.arange(len(self._kinds)), np.diff(self._starts))
        for kind, name in enumerate(MEDIA_KINDS):
            index = self._source.reader.index[ARRAY_OF[name]]
            mine = np.flatnonzero(self._kinds[of_row] == kind)
            for start in range(0, len(mine), ROWS_AT_ONCE):
                some = mine[start : start + ROWS_AT_ONCE]
                try:
                    found = index.positions(self._rows[some])
                except IndexError:
                    raise _changed(self._source) from None
                if not np.array_equal(index.keys[found], self._keys[of_row[some]]):
                    raise _changed(self._source)
        self._checked = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_loaded": None, "_checked": False}


def open_dataset(
    source: Source,
    names: Sequence[str],
    split: Split,
    *,
    held_out: float,
    max_frames: int,
    min_coverage: float,
) -> FeatureDataset:
    """Join the samples of some data sets with their rows; see `nanomolmo2.Cache.dataset`."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    root, reader = source.root, source.reader
    here = dataset_names(root)
    for name in names:
        if name not in here:
            raise NotFoundError(
                f"no data set {name!r} in {source.where} (there: {', '.join(here) or 'none'})"
                f"{nearest(name, here)}. Make it: {encode_command(root, name, reader)}"
            )
    if not names:
        raise NotFoundError(
            f"no data set in {source.where}. Make one: {encode_command(root, None, reader)}"
        )
    names = tuple(dict.fromkeys(names))
    ledger = media_table(root)
    tables = [samples_table(root, name, ["id", "media", "choice"]) for name in names]
    media, found, parts = join_samples(
        tables, ledger, reader, held_out=held_out, max_frames=max_frames
    )
    kept = [np.flatnonzero(one.present & (one.split == SPLITS.index(split))) for one in parts]
    present = sum(int(one.present.sum()) for one in parts)
    failed = sum(int(one.failed.sum()) for one in parts)
    missing = sum(int((~one.present & ~one.failed).sum()) for one in parts)
    _check_coverage(source, names, present, missing, failed, min_coverage, found.partial)
    lengths, of_kept = [], []
    for one, rows in zip(parts, kept, strict=True):
        counts = one.references.counts
        lengths.append(counts[rows])
        of_kept.append(one.items[within(edges_of(counts)[rows], counts[rows])])
    used, numbers = np.unique(np.concatenate(of_kept), return_inverse=True)
    rows_of = found.take(used)
    data = FeatureDataset(
        source,
        names=names,
        split=split,
        missing=missing,
        failed=failed,
        digests=tuple(content_digest(table) for table in tables),
        kept=kept,
        offsets=edges_of(np.concatenate(lengths)),
        media=numbers,
        keys=media.keys[used],
        kinds=media.kinds[used],
        starts=rows_of.starts,
        rows=rows_of.rows,
        times=rows_of.times,
    )
    if not len(data):
        raise NotFoundError(
            f"{', '.join(names)} in {source.where}: no sample is in the {split} split; change held_out, or "
            f"encode more: {encode_command(root, names[0], reader)}"
        )
    data._loaded = _load_texts(source, names, kept, data._digests)
    if missing or failed:
        log.warning("%s: %r", source.where, data)
    return data


def _check_coverage(
    source: Source,
    names: Sequence[str],
    present: int,
    missing: int,
    failed: int,
    least: float,
    partial: int,
) -> None:
    """Raise NotFoundError if too many samples lack features."""
    share = present / (present + missing) if present + missing else 0.0
    if share >= least and present:
        return
    what = f"{source.where}, space {source.space}: features for {share:.1%} of the samples of"
    why = f"{missing:,} miss some, {failed:,} more have failed media"
    if failed and not missing:
        failures = command_line("cache.ls", "--failures", "--features", source.where)
        raise NotFoundError(f"{what} {', '.join(names)} ({why}); see {failures}")
    if partial:
        why += f"; {partial:,} videos have frames of another limit, see max_frames of nm.open"
    raise NotFoundError(
        f"{what} {', '.join(names)}, less than min_coverage {least:.1%} ({why}). Encode the rest: "
        f"{encode_command(source.root, names[0], source.reader)}, or lower min_coverage"
    )


def _load_texts(
    source: Source, names: Sequence[str], kept: Sequence[Ints], digests: Sequence[str]
) -> pa.Table:
    """Return the columns id, messages, weight and task of the kept samples of all data sets.

    Raises:
        CacheError: the samples of a data set have changed since `digests`.
    """
    parts = []
    for name, rows, digest in zip(names, kept, digests, strict=True):
        table = samples_table(source.root, name, ["id", "messages", "weight", "task"])
        if content_digest(table) != digest:
            raise _changed(source)
        parts.append(table.take(pa.array(rows)))
    return pa.concat_tables(parts).combine_chunks()


def _changed(source: Source) -> CacheError:
    return CacheError(
        f"{source.where}: the cache has changed since this data set was opened; open it again: nm.open(...)"
    )
