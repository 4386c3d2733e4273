"""Sources -> encoder inputs, in threads, a few ahead of the encoder.

    files   read and hash (threads) -----+
    URLs    download (encode.download) --+-> reserve, 16 at a time -> decode and prepare (decoders.py)

Files are delivered in the order they were put in, downloads in the order they arrive. A failed source is
delivered without being decoded. A video is delivered frame by frame, so memory holds a few batches of
frames, however long the video is. A thread decodes itself, or lets a process of its own decode. To that it
sends small images in bunches: each time that two threads wake each other may take 0.1 ms of a core.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from cache.format.frame_sampling import FULL, sample_times, time_view
from cache.store.ledger import MediaRecord
from encode.download.urls import is_url
from encode.worker.config import WorkerConfig
from encode.worker.decode_budget import DecodeBudget
from encode.worker.decode_log import DecodeLog
from encode.worker.decode_process import SLOTS, Setup
from encode.worker.decoders import (
    Decoded,
    Decoder,
    Decoders,
    ThreadDecoder,
    Touch,
)
from encode.worker.downloads import Downloads
from encode.worker.local_files import check_unchanged, read_local, unreadable
from encode.worker.media_item import EncoderInput, MediaItem, Pixels
from encode.worker.messages import SourceTask, media_id
from encode.worker.process_decoder import ProcessDecoder
from model.media.images import BadMediaError, DecodedImage, Failure

READ_GROUP = 16
"""Sources that are read, and then reserved with one call to the driver, at a time."""

BUNCH_BYTES = 1 << 20
"""Bytes of an image, at most, that is sent to a process together with others. What takes long to decode is
sent alone: others would wait behind it."""

GATHER_S = 0.001
"""Seconds to wait for the next source of a group: the worker puts many, one after the other."""

FRAME_BATCHES = 3
"""Batches of frames that one video may decode ahead of the encoder."""

KNOWN_SIZES = 100_000
"""Decoded images whose sizes are remembered, so that their duplicates need no decoder."""

POLL_S = 0.5
"""Seconds between two looks at whether the prefetcher was closed."""


class PrefetchCallbacks(Protocol):
    """What the prefetcher calls on its worker, from its own threads."""

    def reserve(self, ids: Sequence[str]) -> list[bool]:
        """Return which of these media are this worker's to encode."""
        ...

    def missing(self, key: str, views: Sequence[str], *, reread: bool) -> list[str]:
        """Return which of a video's views are not in the space; `reread` reads its commits first."""
        ...

    def decode(self, data: bytes) -> DecodedImage:
        """Decode an image, in a thread. Raises BadMediaError."""
        ...

    def prepare(self, image: Image.Image | DecodedImage) -> Pixels:
        """Return the encoder input (S, S, 3) of an image, in a thread."""
        ...

    def our_error(self, error: Exception) -> str:
        """Return the ledger's text for an error that is not the media's."""
        ...


_Inputs = queue.Queue[tuple[EncoderInput | MediaItem, ...]]
"""The encoder inputs of one media item, then the item itself: an image's together, so that a thread wakes
another once; a frame at a time of a video."""


class _Decode(NamedTuple):
    """An item that a thread is to decode."""

    item: MediaItem
    inputs: _Inputs
    """Where its encoder inputs go, and then itself."""
    turn: int
    """Of the budget."""


def _is_small(item: MediaItem) -> bool:
    """Whether an item may be decoded together with others: a small image that is not a duplicate."""
    is_short = isinstance(item.data, bytes) and len(item.data) <= BUNCH_BYTES
    return is_short and item.task.kind == "image" and item.result == "ok"


class Prefetcher:
    """Reads, downloads and decodes sources in threads. Its methods belong to one thread."""

    def __init__(
        self,
        worker: PrefetchCallbacks,
        config: WorkerConfig,
        decode_log: DecodeLog,
        *,
        ahead: int,
        batch_size: int,
        apart: Setup | None = None,
    ):
        """Start the threads.

        Args:
            worker: the worker that encodes. Its methods are called from the threads.
            config: the number of threads, the limit of frames, and how URLs are downloaded.
            decode_log: records what each thread is decoding.
            ahead: sources decoded ahead of the encoder.
            batch_size: encoder inputs in one batch.
            apart: how the processes that decode make encoder inputs; None: threads decode.
        """
        self._worker, self._decode_log = worker, decode_log
        self._downloads = Downloads(config.download, config.media_store)
        self._frames_ahead, self._max_frames = FRAME_BATCHES * batch_size, config.max_frames
        self._readers = ThreadPoolExecutor(config.threads, "read")
        self._decoders = ThreadPoolExecutor(config.threads, "decode")
        self._pool = Decoders(partial(self._decoder, apart, config.timeout_s))
        # Sources that a thread reads one after the other, and images that it decodes together.
        self._together = SLOTS if apart else 1
        self._inbox: queue.SimpleQueue[SourceTask | MediaItem | None] = queue.SimpleQueue()
        self._ready: queue.Queue[_Inputs | MediaItem | BaseException] = queue.Queue(ahead)
        self._sizes: dict[str, tuple[int, int]] = {}  # by key
        self._threads = config.threads
        self._budget = DecodeBudget()
        self._current: _Inputs | None = None
        self._got: deque[EncoderInput | MediaItem] = deque()  # of it, not returned yet
        self._open = True
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()

    def put(self, task: SourceTask) -> None:
        """Queue one source."""
        self._inbox.put(task)

    def get(self, timeout_s: float) -> EncoderInput | MediaItem | None:
        """Return the next encoder input, or a media item after its last one; None after `timeout_s`.

        Raises:
            what `reserve` raised.
        """
        deadline = time.monotonic() + timeout_s
        try:
            if self._current is None:
                found = self._ready.get(timeout=timeout_s)
                if isinstance(found, BaseException):
                    raise found
                if isinstance(found, MediaItem):
                    return found
                self._current = found
            if not self._got:
                left_s = max(0.0, deadline - time.monotonic())
                self._got.extend(self._current.get(timeout=left_s))
        except queue.Empty:
            return None
        got = self._got.popleft()
        if isinstance(got, MediaItem):
            self._current = None
        return got

    def close(self) -> None:
        """End the threads and drop what they hold."""
        self._open = False
        self._downloads.close()
        self._inbox.put(None)
        while self._feeder.is_alive():  # it may be waiting for room in `_ready`
            while not self._ready.empty():
                self._ready.get()
            self._feeder.join(0.02)
        self._readers.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)
        self._pool.close()

    # ---- reading

    def _feed(self) -> None:
        try:
            while group := self._next_group():
                to_read: list[SourceTask | MediaItem] = []
                for one in group:
                    if isinstance(one, SourceTask) and is_url(one.source):
                        self._downloads.start(one, self._inbox.put)
                    else:
                        to_read.append(one)
                items = self._read_all(to_read)
                self._reserve([item for item in items if item.failure is None])
                self._submit(items)
        except BaseException as error:  # `get` raises it in the thread that waits there
            self._ready.put(error)

    def _next_group(self) -> list[SourceTask | MediaItem]:
        """Return the sources that can be read now, at least one; none once the prefetcher closes."""
        group: list[SourceTask | MediaItem] = []
        one = self._inbox.get()
        while one is not None and self._open:
            group.append(one)
            if len(group) == READ_GROUP:
                return group
            try:
                one = self._inbox.get(timeout=GATHER_S)
            except queue.Empty:
                return group
        return []

    def _read_all(self, sources: Sequence[SourceTask | MediaItem]) -> list[MediaItem]:
        """Read sources in all threads, each of which takes some that are adjacent."""
        each = max(self._together, -(-len(sources) // self._threads))
        parts = [sources[at : at + each] for at in range(0, len(sources), each)]
        return [item for part in self._readers.map(self._read_some, parts) for item in part]

    def _read_some(self, sources: Sequence[SourceTask | MediaItem]) -> list[MediaItem]:
        return [self._read(source) for source in sources]

    def _read(self, source: SourceTask | MediaItem) -> MediaItem:
        """Read and hash a file, or hash a download that has arrived."""
        if isinstance(source, MediaItem):
            return self._downloads.hash(source)
        start = time.perf_counter()
        item = MediaItem(task=source, record=MediaRecord(source=source.source, kind=source.kind))
        try:
            item.data, item.record = read_local(source)
        except BadMediaError as error:
            item.record, item.failure = unreadable(source), error.failure
        item.read_s = time.perf_counter() - start
        return item

    def _reserve(self, items: Sequence[MediaItem]) -> None:
        ids = [media_id(item.record.kind, item.key) for item in items]
        granted = self._worker.reserve(ids) if ids else []
        for item, ours in zip(items, granted, strict=True):
            item.result = "ok" if ours else "duplicate"

    def _submit(self, items: Sequence[MediaItem]) -> None:
        """Deliver items, and let threads decode those that need it, small images in bunches."""
        delivered: list[_Inputs | MediaItem] = []
        to_decode: list[_Decode] = []
        for item in items:
            size = None
            if item.result == "duplicate" and item.record.kind == "image" and item.failure is None:
                size = self._sizes.get(item.key)
            if size is not None:
                item.record = replace(item.record, width=size[0], height=size[1])
                item.drop_data()
            if item.failure is not None or size is not None:
                delivered.append(item)
            else:
                one = _Decode(item, _Inputs(self._frames_ahead), self._budget.turn())
                to_decode.append(one)
                delivered.append(one.inputs)
        # `get` waits for what is in `_ready`, so a thread must have it before there may be no room there.
        for bunch in self._bunches(to_decode):
            self._decoders.submit(self._decode_bunch, bunch)
        for ready in delivered:
            self._ready.put(ready)

    def _bunches(self, to_decode: Sequence[_Decode]) -> Iterator[list[_Decode]]:
        """Cut into adjacent small images and single items. All keep their order, as turns must."""
        bunch: list[_Decode] = []
        for one in to_decode:
            if bunch and (len(bunch) == self._together or not _is_small(one.item)):
                yield bunch
                bunch = []
            bunch.append(one)
            if not _is_small(one.item):
                yield bunch
                bunch = []
        if bunch:
            yield bunch

    # ---- decoding

    def _decoder(self, apart: Setup | None, timeout_s: float) -> Decoder:
        if apart is None:
            return ThreadDecoder(self._worker.decode, self._worker.prepare)
        return ProcessDecoder(apart, timeout_s, lambda: self._open)

    def _decode_bunch(self, bunch: Sequence[_Decode]) -> None:
        """Decode small images together as far as that is possible, and other items one by one."""
        found: list[Decoded | Exception | None] = [None] * len(bunch)
        if self._together > 1 and _is_small(bunch[0].item) and self._open:
            start = time.perf_counter()
            # An error that is none of theirs is met again when each is taken alone.
            with self._pool.one() as decoder, contextlib.suppress(Exception):
                found = decoder.images([one.item for one in bunch], self._budget.little)
            for one in bunch:
                one.item.decode_s += (time.perf_counter() - start) / len(bunch)
        for one, result in zip(bunch, found, strict=True):
            if result is None:
                self._decode(one)
            else:
                self._finish(one, result)

    def _finish(self, one: _Decode, result: Decoded | Exception) -> None:
        """Deliver an image that was decoded with others."""
        with self._budget.room(one.turn, 0, lambda: self._open):
            pass  # its turn is used
        item, only = one.item, None
        if isinstance(result, Exception):
            item.failure = self._failure(result)
        else:
            only = self._input(item, result)
        self._deliver(one, only)

    def _deliver(self, one: _Decode, only: EncoderInput | None) -> None:
        """Put the encoder input of an image, if there is one, and the item itself."""
        one.item.drop_data()
        put = (one.item,) if only is None else (only, one.item)
        self._put(one.inputs, put, lambda: None)

    def _decode(self, one: _Decode) -> None:
        """Put the encoder inputs of an item into `inputs`, then, whatever happens, the item itself.

        A thread that waits for memory is not in the log: it does not hang.
        """
        item, inputs = one.item, one.inputs
        start = time.perf_counter()
        is_image, is_done = item.task.kind == "image", False
        log, nbytes = self._decode_log.decoding, 0
        only: EncoderInput | None = None  # of an image
        with self._pool.one() as decoder:
            decoder.take(item)
            try:
                if self._open:
                    with log(item.task.source, item.key) as decoder.touch:
                        nbytes = decoder.needed()
                        is_little = nbytes <= self._budget.little
                        if is_image and (item.result == "duplicate" or is_little):
                            only, nbytes, is_done = self._decode_image(decoder), 0, True
            except Exception as error:
                item.failure, is_done = self._failure(error), True
            try:
                waited = time.perf_counter()
                with self._budget.room(one.turn, nbytes, lambda: self._open):
                    item.decode_s -= time.perf_counter() - waited
                    if self._open and not is_done:
                        with log(item.task.source, item.key) as decoder.touch:
                            if is_image:
                                only = self._decode_image(decoder)
                            else:
                                self._decode_video(decoder, inputs)
            except Exception as error:
                item.failure = self._failure(error)
        item.decode_s += time.perf_counter() - start
        self._deliver(one, only)

    def _failure(self, error: Exception) -> Failure:
        if isinstance(error, BadMediaError):
            return error.failure
        # Not the media's: it counts against the failure budget.
        return Failure("encode", self._worker.our_error(error))

    def _decode_image(self, decoder: Decoder) -> EncoderInput | None:
        """Return the encoder input of an image; None of a duplicate, whose size alone is read."""
        item = decoder.item
        if item.result != "duplicate":
            return self._input(item, decoder.image())
        self._learn(item, decoder.size(), None)
        return None

    def _input(self, item: MediaItem, decoded: Decoded) -> EncoderInput:
        """Return the encoder input of an image that has been decoded."""
        self._learn(item, decoded.size, decoded.note)
        return EncoderInput(item=item, pixels=decoded.pixels, view=FULL, time_s=None)

    def _learn(self, item: MediaItem, size: tuple[int, int], note: str | None) -> None:
        """Remember the size of an image, for its record and its duplicates."""
        item.record = replace(item.record, width=size[0], height=size[1], note=note)
        if len(self._sizes) >= KNOWN_SIZES:
            self._sizes.clear()
        self._sizes[item.key] = size

    def _decode_video(self, decoder: Decoder, inputs: _Inputs) -> None:
        item, info = decoder.item, decoder.probe()
        item.record = replace(
            item.record,
            width=info.width,
            height=info.height,
            duration_s=info.duration_s,
            note=info.note,
        )
        if item.result != "duplicate":
            wanted = {time_view(us): us for us in sample_times(info.duration_s, self._max_frames)}
            # A worker that died may have committed some frames after this one read the commits.
            missing = self._worker.missing(item.key, list(wanted), reread=item.task.reassigned)
            item.result = "ok" if missing else "present"
            got = 0
            for frame in decoder.frames([wanted[v] for v in missing]):
                view = time_view(frame.wanted_us)
                one = EncoderInput(item=item, pixels=frame.pixels, view=view, time_s=frame.time_s)
                item.decode_s -= self._put(inputs, (one,), decoder.touch)
                got += 1
            if got < len(missing):
                raise BadMediaError(f"{got} of {len(missing)} frames could be decoded")
        if isinstance(item.data, Path):
            check_unchanged(item.data, item.record)

    def _put(
        self, inputs: _Inputs, some: tuple[EncoderInput | MediaItem, ...], touch: Touch
    ) -> float:
        """Wait for room; return the seconds it took. Meanwhile the item does not count as hanging."""
        start = time.perf_counter()
        while self._open:
            try:
                inputs.put(some, timeout=POLL_S)
                break
            except queue.Full:
                touch()
        return time.perf_counter() - start
