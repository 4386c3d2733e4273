"""Which media `encode.check` looks at, and their bytes: from their file, from what was kept, from the web."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cache.store.ledger import MediaRecord, media_table
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import samples_table
from configs import UserError
from encode.check.loss import row_numbers
from encode.download.client import DownloadConfig, Fetched, Fetcher
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from model.media.images import BadMediaError

SEED = 0
"""Of the draw: the same media each time, as long as the cache is the same."""

NOT_KEPT = "from the web, and not kept (--keep-media DIR, or --check-urls)"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What to look at."""

    media: int
    """How many, at most."""
    datasets: tuple[str, ...] = ()
    """Only of these data sets; empty: all of the cache."""
    max_frames: int
    """Of one video: as when it was encoded."""
    keep: Path | None = None
    """Folder of kept media."""
    fetch: DownloadConfig | None = None
    """How to download what is not on this disk; None: not at all."""
    device: str = "auto"
    """Where to encode."""
    weights: str | None = None
    """Where the encoder's weights are, if not where they were."""


def drawn(
    root: CacheRoot, reader: FeatureReader, what: Checked, source: Bytes
) -> Iterator[MediaRecord]:
    """Sources of the ledger in random order, whose rows are all in the space."""
    table = media_table(root)
    table = table.filter(pc.is_valid(table["key"]))
    if what.datasets:
        lists = [samples_table(root, name, ["media"])["media"] for name in what.datasets]
        flat = [pc.struct_field(pc.list_flatten(one.combine_chunks()), "source") for one in lists]
        table = table.filter(pc.is_in(table["source"], pa.concat_arrays(flat)))
    if not source.gets_urls:
        web = pc.match_substring_regex(table["source"], "^https?://", ignore_case=True)
        left = int(pc.sum(web).as_py() or 0)
        source.skipped.update({NOT_KEPT: left} if left else {})
        table = table.filter(pc.invert(web))
    for at in np.random.default_rng(SEED).permutation(len(table)).tolist():
        record = MediaRecord(**table.slice(at, 1).to_pylist()[0])
        rows = row_numbers(reader, record.kind, record, what.max_frames)
        if len(rows) and (rows >= 0).all():
            yield record


class Bytes:
    """Where the bytes of media are: their file, the folder of kept media, the web."""

    def __init__(self, what: Checked, skipped: Counter[str]):
        """`skipped` counts why media could not be had.

        Raises:
            UserError: there is no such folder of kept media.
        """
        if what.keep is not None and not what.keep.is_dir():
            raise UserError(f"--keep-media {what.keep}: no such folder")
        self.skipped = skipped
        self._store = MediaStore(what.keep) if what.keep is not None else None
        self._fetcher = Fetcher(what.fetch) if what.fetch is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._fetcher is not None:
            self._fetcher.close()

    @property
    def gets_urls(self) -> bool:
        """Whether there is a place to look for what came from the web."""
        return self._store is not None or self._fetcher is not None

    def get(self, records: Sequence[MediaRecord]) -> Iterator[tuple[MediaRecord, bytes | Path]]:
        """Those whose bytes can be had and are still the ones that were encoded; the others are counted."""
        coming: dict[str, Future[Fetched]] = {}
        kept = {r.source: self._kept(r) for r in records if is_url(r.source)}
        if self._fetcher is not None:
            for record in records:
                if is_url(record.source) and kept[record.source] is None:
                    coming[record.source] = self._fetcher.submit(record.source, sha256=record.key)
        for record in records:
            if not is_url(record.source):
                data = self._file(record)
            elif record.source in coming:
                data = self._downloaded(coming[record.source])
            elif (data := kept[record.source]) is None:
                self.skipped[NOT_KEPT] += 1
            if data is not None:
                yield record, data

    def _kept(self, record: MediaRecord) -> bytes | None:
        return self._store.get(record.key or "") if self._store is not None else None

    def _downloaded(self, future: Future[Fetched]) -> bytes | None:
        try:
            fetched = future.result()
        except BadMediaError as error:
            self.skipped[f"not to be downloaded any more: {error.stage}: {error.reason}"] += 1
            return None
        fetched.release()
        return fetched.data

    def _file(self, record: MediaRecord) -> bytes | Path | None:
        """A video stays a file: it may be larger than memory."""
        path = Path(record.source)
        try:
            if record.kind == "video":
                with path.open("rb") as file:
                    key = hashlib.file_digest(file, "sha256").hexdigest()
                data: bytes | Path = path
            else:
                data = path.read_bytes()
                key = hashlib.sha256(data).hexdigest()
        except OSError as error:
            self.skipped[f"file cannot be read: {error.strerror}"] += 1
            return None
        if key != record.key:
            self.skipped["file has changed since it was encoded"] += 1
            return None
        return data
