"""Sources -> encoder inputs, in threads, a few ahead of the encoder.

files: read + hash (threads) ---+
URLs: download (encode.fetch) --+-> claim, a group at a time -> decode + prepare (threads)

Files come out in the order they were put in, downloads as they arrive. A video comes out in pieces, so that
memory holds a few batches of frames however long it is.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from PIL import Image

from cache.format.frame_sampling import FULL, sample_times, time_view
from cache.store.ledger import MediaRecord
from encode.download.client import is_url
from encode.worker.decode_log import DecodeLog
from encode.worker.downloads import Downloads
from encode.worker.local_files import (
    check_unchanged,
    hash_local,
    read_local,
    size_in_header,
    unreadable,
)
from encode.worker.media_item import Item, Piece, Pixels, piece_of
from encode.worker.messages import SourceTask, claim_id
from model.media.images import BadMediaError
from model.media.video import frames, probe

READ_GROUP = 16
"""Sources read, and claimed with one question, at a time."""

PIECES_AHEAD = 2
"""Pieces of one video waiting for the encoder."""

POLL_S = 0.5


class Inputs(Protocol):
    """What an prefetcher is given by its worker."""

    def claim(self, ids: Sequence[str]) -> list[bool]:
        """Which of these media are ours to encode."""
        ...

    def missing(self, key: str, views: Sequence[str], *, again: bool) -> list[str]:
        """Which of a video's views are to be encoded."""
        ...

    def decode(self, data: bytes) -> Image.Image:
        """Bytes to image; raises BadMediaError."""
        ...

    def prepare(self, image: Image.Image) -> Pixels:
        """Image to encoder input (S, S, 3)."""
        ...

    def our_error(self, error: Exception) -> str:
        """What the ledger says of an error that is not the media's."""
        ...


class _Video:
    """A video being decoded: what its thread has ready."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.pieces: queue.Queue[Piece] = queue.Queue(PIECES_AHEAD)


class Prefetcher:
    """See above. Methods belong to one thread."""

    def __init__(
        self,
        inputs: Inputs,
        *,
        entries: DecodeLog,
        downloads: Downloads,
        threads: int,
        ahead: int,
        piece: int,
        max_frames: int,
    ):
        """Start the threads.

        Args:
            inputs: the worker.
            entries: told what is being decoded.
            downloads: gets what is not on this disk; closed with the prefetcher.
            threads: for reading, and as many for decoding.
            ahead: sources decoded ahead of the encoder.
            piece: frames of a video that travel together.
            max_frames: of one video, at most.
        """
        self._inputs, self._entries, self._downloads = inputs, entries, downloads
        self._piece, self._max_frames = piece, max_frames
        self._readers = ThreadPoolExecutor(threads, "read")
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._inbox: queue.SimpleQueue[SourceTask | Item | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Future[Piece] | _Video | BaseException] = queue.Queue(ahead)
        self._next: Future[Piece] | _Video | None = None
        self._open = True
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()

    def put(self, task: SourceTask) -> None:
        """Read and decode this, files after those put before."""
        self._inbox.put(task)

    def get(self, timeout_s: float) -> Piece | None:
        """The next piece; None when it is not ready within the time.

        Raises:
            whatever `claim` raised.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if self._next is None:
                found = self._ready.get(timeout=timeout_s)
                if isinstance(found, BaseException):
                    raise found
                self._next = found
            left = max(0.0, deadline - time.monotonic())
            if isinstance(self._next, _Video):
                piece = self._next.pieces.get(timeout=left)
            else:
                piece = self._next.result(timeout=left)
        except (queue.Empty, TimeoutError):
            return None
        if piece.last:
            self._next = None
        return piece

    def close(self) -> None:
        """End the threads, and drop what they had."""
        self._open = False
        self._downloads.close()
        self._inbox.put(None)
        while self._feeder.is_alive():  # it may be waiting for room
            while not self._ready.empty():
                self._ready.get()
            self._feeder.join(0.02)
        self._readers.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    # ---- reading

    def _feed(self) -> None:
        try:
            while group := self._next_group():
                tasks = [one for one in group if isinstance(one, SourceTask)]
                for task in tasks:
                    if is_url(task.source):
                        self._downloads.start(task, self._inbox.put)
                local = (task for task in tasks if not is_url(task.source))
                items = list(self._readers.map(self._read, local))
                arrived = (one for one in group if isinstance(one, Item))
                items += self._readers.map(self._downloads.hash, arrived)
                self._claim(items)
                for item in items:
                    self._submit(item)
        except BaseException as error:  # raised again by the thread that waits in `get`
            self._ready.put(error)

    def _next_group(self) -> list[SourceTask | Item]:
        """Sources that are there to be read, at least one; none once the prefetcher closes."""
        group: list[SourceTask | Item] = []
        one = self._inbox.get()
        while one is not None and self._open:
            group.append(one)
            if len(group) == READ_GROUP or self._inbox.empty():
                return group
            one = self._inbox.get()
        return []

    def _read(self, task: SourceTask) -> Item:
        start = time.perf_counter()
        item = Item(task=task, record=MediaRecord(source=task.source, kind=task.kind))
        try:
            if task.kind == "image":
                item.data, item.record = read_local(task)
            else:
                item.data, item.record = Path(task.source), hash_local(task)
        except BadMediaError as error:
            item.record, item.failure = unreadable(task), (error.stage, error.reason)
        item.read_s = time.perf_counter() - start
        return item

    def _claim(self, items: Sequence[Item]) -> None:
        asked = [item for item in items if item.record.key is not None and item.failure is None]
        ids = [claim_id(item.record.kind, item.record.key or "") for item in asked]
        granted = self._inputs.claim(ids) if ids else []
        for item, ours in zip(asked, granted, strict=True):
            item.duplicate = not ours

    def _submit(self, item: Item) -> None:
        if item.task.kind == "image" or item.failure is not None:
            self._ready.put(self._decoders.submit(self._decode_image, item))
            return
        video = _Video(item)
        self._decoders.submit(self._decode_video, video)
        self._ready.put(video)

    # ---- decoding

    def _decode_image(self, item: Item) -> Piece:
        start = time.perf_counter()
        pixels: list[Pixels] = []
        size = (0, 0)
        if item.failure is None and self._open:
            assert isinstance(item.data, bytes), "images are read whole"
            if item.duplicate:
                size = size_in_header(item.data)
            else:
                try:
                    with self._entries.decoding(item.task.source, item.record.key or ""):
                        image = self._inputs.decode(item.data)
                        pixels.append(self._inputs.prepare(image))
                    size = image.size
                except BadMediaError as error:
                    item.failure = (error.stage, error.reason)
                except Exception as error:  # not the media's: it counts against the budget
                    item.failure = ("encode", self._inputs.our_error(error))
        item.record = replace(item.record, width=size[0], height=size[1])
        self._drop_bytes(item)
        item.decode_s = time.perf_counter() - start
        return piece_of(item, pixels, [FULL] * len(pixels), [None] * len(pixels), last=True)

    def _decode_video(self, video: _Video) -> None:
        """Put a video's pieces into its queue, the last one in any case."""
        item, start, waited = video.item, time.perf_counter(), 0.0
        try:
            with self._entries.decoding(item.task.source, item.record.key or "") as alive:
                waited = self._decode_frames(video, alive)
            if isinstance(item.data, Path):
                check_unchanged(item.data, item.record)
        except BadMediaError as error:
            item.failure = (error.stage, error.reason)
        except Exception as error:  # not the media's, so it counts against the failure budget
            item.failure = ("encode", self._inputs.our_error(error))
        self._drop_bytes(item)
        item.decode_s = time.perf_counter() - start - waited
        self._put(video, piece_of(item, [], [], [], last=True), lambda: None)

    def _decode_frames(self, video: _Video, alive: Callable[[], None]) -> float:
        """Seconds it waited for the encoder."""
        item = video.item
        info = probe(item.data, on_progress=alive)
        item.record = replace(
            item.record,
            width=info.width,
            height=info.height,
            duration_s=info.duration_s,
            note=info.note,
        )
        if item.duplicate:
            return 0.0
        times = sample_times(info.duration_s, self._max_frames)
        named = {time_view(us): us for us in times}
        assert item.record.key is not None, "a video without a key"
        missing = self._inputs.missing(item.record.key, list(named), again=item.task.again)
        item.present = not missing
        waited, got = 0.0, 0
        pixels: list[Pixels] = []
        views: list[str] = []
        at: list[float | None] = []
        for frame in frames(item.data, [named[v] for v in missing], info, on_progress=alive):
            pixels.append(self._inputs.prepare(frame.image))
            views.append(time_view(frame.wanted_us))
            at.append(frame.time_s)
            if len(pixels) == self._piece:
                waited += self._put(video, piece_of(item, pixels, views, at, last=False), alive)
                pixels, views, at = [], [], []
            got += 1
        if pixels:
            waited += self._put(video, piece_of(item, pixels, views, at, last=False), alive)
        if got < len(missing):
            raise BadMediaError(f"{got} of {len(missing)} frames could be decoded")
        return waited

    def _put(self, video: _Video, piece: Piece, alive: Callable[[], None]) -> float:
        """Wait for room; seconds it took. The encoder's slowness is no hanging of this video's."""
        start = time.perf_counter()
        while self._open:
            try:
                video.pieces.put(piece, timeout=POLL_S)
                break
            except queue.Full:
                alive()
        return time.perf_counter() - start

    def _drop_bytes(self, item: Item) -> None:
        item.data = b""
        item.release()
