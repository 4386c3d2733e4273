"""Load media of a space again: stored rows, and pixels decoded now from a file, a kept download or the web.

R rows of one image (1) or video (its frames), S side of the encoder's input in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL.Image import Image

from cache.format.embedded.names import is_embedded
from cache.format.frame_sampling import FULL, time_view
from cache.format.spec import ARRAY_OF
from cache.maintenance.local_media import LocalMedia, MediaFileError, NotAllowedError
from cache.store.commits import key_bytes
from cache.store.ledger import MediaRecord
from cache.store.paths import SpacePaths
from cache.store.reader import FeatureReader
from cache.store.references import MEDIA_KINDS, MediaItems, MediaRows, find_rows
from configs import UserError
from encode.download.client import Fetched, Fetcher
from encode.download.config import DownloadConfig
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from encode.worker.local_files import MAX_BYTES
from model.media import video, video_index
from model.media.images import BadMediaError, DecodedImage
from model.vision.encoder import rebuild_encoder

NOT_ON_DISK = "from the web, and not kept on this disk"

GROUP = 16
"""Media loaded together, so that their downloads run at the same time."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Where media and the encoder are loaded from."""

    local: LocalMedia
    """Which files of this machine are opened."""
    max_frames: int
    """Largest number of frames of one video; the same as when it was encoded."""
    keep_media: Path | None = None
    """Folder of kept downloads."""
    download: DownloadConfig | None = None
    """How to download media that are not on this disk; None: do not download."""
    device: str = "auto"
    """Device of the encoder: auto, cpu, cuda, cuda:N or mps."""
    weights: str | None = None
    """File or folder with the encoder's weights; None: the recorded place, or the hub."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedMedia:
    """One image or video: its stored rows, and its pixels decoded now."""

    record: MediaRecord
    """Its entry in the ledger."""
    array: str
    """Array that holds its rows."""
    views: tuple[str, ...]
    """(R,) names of its views."""
    times_s: tuple[float, ...]
    """(R,) stored times of its frames, seconds; empty for an image."""
    rows: torch.Tensor
    """(R, row_bytes) uint8, as stored."""
    pixels: npt.NDArray[np.uint8]
    """(R, S, S, 3) encoder inputs of the same views."""


class MediaLoader:
    """Load media whose rows are all stored and whose bytes are still the encoded ones.

    with MediaLoader(root.space(name), config) as loader:
        for media in loader.load(records):
            features = loader.encoder.encode(media.pixels, media.array)
    """

    def __init__(self, paths: SpacePaths, config: CheckConfig) -> None:
        """Open the space and rebuild its encoder.

        Raises:
            UserError: no such space or folder of kept downloads; the encoder is not available or has changed.
        """
        if config.keep_media is not None and not config.keep_media.is_dir():
            raise UserError(f"--keep-media {config.keep_media}: no such folder")
        self.reader = FeatureReader(paths)
        self.encoder = rebuild_encoder(
            self.reader.load, self.reader.spec, device=config.device, weights=config.weights
        )
        self.skipped: Counter[str] = Counter()
        """Reason -> number of media whose bytes are not available."""
        self.undecodable: list[str] = []
        """Media whose bytes are unchanged and cannot be decoded any more, with the reason."""
        self.max_frames = config.max_frames
        self._local = config.local
        self._store = MediaStore(config.keep_media) if config.keep_media is not None else None
        self._fetcher = Fetcher(config.download) if config.download is not None else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fetcher is not None:
            self._fetcher.close()

    def available(self, table: pa.Table) -> pa.Table:
        """Return a media table without the media from the web, unless they are kept or downloaded."""
        if self._store is not None or self._fetcher is not None:
            return table
        web = pc.match_substring_regex(table["source"], "^https?://", ignore_case=True)
        if left := pc.sum(web).as_py():
            self.skipped[NOT_ON_DISK] += left
        return table.filter(pc.invert(web))

    def _rows_of(self, records: Sequence[MediaRecord]) -> MediaRows:
        """Return the rows of media whose rows are all stored; the others have none."""
        durations = [np.nan if one.duration_s is None else one.duration_s for one in records]
        media = MediaItems(
            keys=key_bytes([one.key or "" for one in records]),
            kinds=np.array([MEDIA_KINDS.index(one.kind) for one in records], np.uint8),
            durations=np.array(durations, np.float64),
        )
        return find_rows(self.reader, media, self.max_frames)

    def load(self, records: Iterable[MediaRecord]) -> Iterator[LoadedMedia]:
        """Yield the media whose rows are all stored, and whose bytes are available and decodable.

        Args:
            records: ledger entries that have a key.
        """
        waiting = iter(records)
        while group := list(islice(waiting, GROUP)):
            rows = self._rows_of(group)
            stored = {r.source: rows.of(at) for at, r in enumerate(group) if rows.counts[at]}
            for record, data in self._bytes([r for r in group if r.source in stored]):
                try:
                    yield self._decoded(record, stored[record.source], data)
                except (BadMediaError, OSError) as error:
                    self.undecodable.append(
                        f"{record.key} ({record.source}): cannot be decoded any more: {error}"
                    )

    def _decoded(
        self, record: MediaRecord, numbers: npt.NDArray[np.int64], data: bytes | Path
    ) -> LoadedMedia:
        """Read the rows of a media item and decode the same views.

        Raises:
            BadMediaError: it cannot be decoded.
            OSError: it cannot be read.
        """
        array = ARRAY_OF[record.kind]
        times: npt.NDArray[np.float64] = np.empty(0)
        views: tuple[str, ...] = (FULL,)
        images: Iterable[Image | DecodedImage]
        if isinstance(data, bytes) and record.kind == "image":
            images = [self.encoder.decode(data)]
        else:
            times = self.reader.times(array, numbers)
            index = self.reader.index[array]  # it has the time that each frame was requested for
            asked_us = index.columns.views[index.positions(numbers)].tolist()
            views = tuple(map(time_view, asked_us))
            images = (
                frame.image for frame in video.frames(data, asked_us, video_index.probe(data))
            )
        rows = np.empty((len(numbers), self.reader.spec.row_bytes(array)), np.uint8)
        self.reader.read_into(array, numbers, rows)
        return LoadedMedia(
            record=record,
            array=array,
            views=views,
            times_s=tuple(times.tolist()),
            rows=torch.from_numpy(rows),
            pixels=np.stack([self.encoder.prepare(image) for image in images]),
        )

    def _bytes(self, records: Sequence[MediaRecord]) -> Iterator[tuple[MediaRecord, bytes | Path]]:
        """Yield the available media of `records` with their unchanged bytes, and count the others."""
        # All downloads start before the first one is waited for.
        found = [self._find(record) for record in records]
        for record, data in zip(records, found, strict=True):
            if isinstance(data, Future):
                data = self._downloaded(data)
            if data is not None:
                yield record, data

    def _find(self, record: MediaRecord) -> bytes | Path | Future[Fetched] | None:
        """Return the unchanged bytes, the path of a video file, or a started download; None: counted."""
        if not is_url(record.source):
            return self._file(record)
        kept = self._store.get(record.key or "") if self._store is not None else None
        if kept is None and self._fetcher is not None:
            return self._fetcher.submit(record.source, sha256=record.key)
        if kept is None:
            self.skipped[NOT_ON_DISK] += 1
        return kept

    def _downloaded(self, future: Future[Fetched]) -> bytes | None:
        try:
            fetched = future.result()
        except BadMediaError as error:
            self.skipped[f"download failed: {error.stage}: {error.reason}"] += 1
            return None
        fetched.release()
        return fetched.data

    def _file(self, record: MediaRecord) -> bytes | Path | None:
        """Return the bytes of an image or of embedded media, or the path of a video, which may be large."""
        source, key = record.source, record.key
        try:
            if record.kind == "video" and not is_embedded(source):
                return self._local.video(source, key, size=record.bytes)
            return self._local.read(source, key, most=MAX_BYTES, size=record.bytes)
        except NotAllowedError:
            self.skipped[self._local.note()] += 1  # one line for all
        except MediaFileError as error:
            self.skipped[error.detail] += 1
        return None
