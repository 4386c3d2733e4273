"""Sources -> encoder inputs, in threads and in order, a few ahead of the encoder.

read + hash (threads) -> claim, a group at a time -> decode + prepare (threads)
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.tables import MediaRecord
from encode.breadcrumbs import Breadcrumbs
from encode.local import read_local, size_in_header, unreadable
from encode.tasks import SourceTask
from model.media import BadMedia

READ_GROUP = 16
"""Sources read, and claimed with one question, at a time."""


@dataclass(kw_only=True)
class Item:
    """One source on its way to the encoder."""

    task: SourceTask
    """What was asked for."""
    record: MediaRecord
    """What is known of it."""
    data: bytes = b""
    """Its bytes, until they are decoded."""
    pixels: npt.NDArray[np.uint8] | None = None
    """(S, S, 3) encoder input, unless it failed or is a duplicate."""
    failure: tuple[str, str] | None = None
    """Stage, and why."""
    duplicate: bool = False
    """Somebody else has, or had, these bytes to encode."""
    read_s: float = 0.0
    """Opening, reading, hashing."""
    decode_s: float = 0.0
    """Bytes to encoder input."""


class Intake:
    """See above. Methods belong to one thread."""

    def __init__(
        self,
        *,
        claim: Callable[[Sequence[str]], list[bool]],
        decode: Callable[[bytes], Image.Image],
        prepare: Callable[[Image.Image], npt.NDArray[np.uint8]],
        our_error: Callable[[Exception], str],
        crumbs: Breadcrumbs,
        threads: int,
        ahead: int,
    ):
        """Start the threads.

        Args:
            claim: which of these keys are ours to encode.
            decode: bytes to picture; raises BadMedia.
            prepare: picture to encoder input.
            our_error: what the ledger says of an error that is not the media's.
            crumbs: told what is being decoded.
            threads: for reading, and as many for decoding.
            ahead: encoder inputs prepared ahead of the encoder.
        """
        self._claim, self._decode, self._prepare_pixels = claim, decode, prepare
        self._our_error, self._crumbs = our_error, crumbs
        self._readers = ThreadPoolExecutor(threads, "read")
        self._decoders = ThreadPoolExecutor(threads, "decode")
        self._inbox: queue.SimpleQueue[SourceTask | None] = queue.SimpleQueue()
        self._ready: queue.Queue[Future[Item] | BaseException] = queue.Queue(ahead)
        self._next: Future[Item] | None = None
        self._open = True
        self._feeder = threading.Thread(target=self._feed, name="feed", daemon=True)
        self._feeder.start()

    def put(self, task: SourceTask) -> None:
        """Read and decode this, after what was put before."""
        self._inbox.put(task)

    def get(self, timeout_s: float) -> Item | None:
        """The next source in the order of `put`; None when it is not ready within the time.

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
            item = self._next.result(timeout=max(0.0, deadline - time.monotonic()))
        except (queue.Empty, TimeoutError):
            return None
        self._next = None
        return item

    def close(self) -> None:
        """End the threads, and drop what they had."""
        self._open = False
        self._inbox.put(None)
        while self._feeder.is_alive():  # it may be waiting for room
            while not self._ready.empty():
                self._ready.get()
            self._feeder.join(0.02)
        self._readers.shutdown(cancel_futures=True)
        self._decoders.shutdown(cancel_futures=True)

    def _feed(self) -> None:
        try:
            while group := self._next_group():
                items = list(self._readers.map(self._read, group))
                keys = [item.record.key for item in items if item.record.key is not None]
                granted = iter(self._claim(keys) if keys else [])
                for item in items:
                    item.duplicate = item.record.key is not None and not next(granted)
                    self._ready.put(self._decoders.submit(self._prepare, item))
        except BaseException as error:  # raised again by the thread that waits in `get`
            self._ready.put(error)

    def _next_group(self) -> list[SourceTask]:
        """Sources that are there to be read, at least one; none once the intake closes."""
        group: list[SourceTask] = []
        task = self._inbox.get()
        while task is not None and self._open:
            group.append(task)
            if len(group) == READ_GROUP or self._inbox.empty():
                return group
            task = self._inbox.get()
        return []

    def _read(self, task: SourceTask) -> Item:
        start = time.perf_counter()
        item = Item(task=task, record=MediaRecord(source=task.source, kind=task.kind))
        try:
            item.data, item.record = read_local(task)
        except BadMedia as error:
            item.record, item.failure = unreadable(task), (error.stage, error.reason)
        item.read_s = time.perf_counter() - start
        return item

    def _prepare(self, item: Item) -> Item:
        start = time.perf_counter()
        width, height = 0, 0
        if item.duplicate:
            width, height = size_in_header(item.data)
        elif item.failure is None and self._open:
            try:
                with self._crumbs.decoding(item.task.source, item.record.key or ""):
                    image = self._decode(item.data)
                    item.pixels = self._prepare_pixels(image)
                width, height = image.size
            except BadMedia as error:
                item.failure = (error.stage, error.reason)
            except Exception as error:  # not the media's, so it counts against the failure budget
                item.failure = ("encode", self._our_error(error))
        item.record = replace(item.record, width=width, height=height)
        item.data = b""
        item.decode_s = time.perf_counter() - start
        return item
