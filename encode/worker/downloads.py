"""Sources that are not on this disk: from the folder of kept media, or from the web.

`encode.download.client` knows how to ask a server; this knows what a job makes of the answer.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from cache.store.ledger import MediaRecord
from encode.download.client import Fetched, Fetcher
from encode.download.config import DownloadConfig
from encode.download.media_store import MediaStore
from encode.worker.media_item import MediaItem
from encode.worker.messages import SourceTask
from model.media.images import BadMediaError

log = logging.getLogger(__name__)


class Downloads:
    """Starts downloads and says when they end. `start` and `close` belong to one thread."""

    def __init__(self, rules: DownloadConfig, keep: Path | None):
        """Nothing is opened before the first `start`.

        Args:
            rules: how to ask.
            keep: where bytes are kept, and looked for before anybody is asked.
        """
        self._rules = rules
        self._store = MediaStore(keep) if keep is not None else None
        self._fetcher: Fetcher | None = None
        self._closed = False

    def start(self, task: SourceTask, done: Callable[[MediaItem], None]) -> None:
        """Get the bytes of `task`, and hand them to `done` without their key, from any thread."""
        item = MediaItem(task=task, record=MediaRecord(source=task.source, kind=task.kind))
        if (data := self._kept(task)) is not None:
            item.data = data
            done(item)
            return
        if self._closed:
            return
        self._fetcher = self._fetcher or Fetcher(self._rules)
        future = self._fetcher.submit(task.source, sha256=task.sha256)

        def arrived(future: Future[Fetched]) -> None:
            if future.cancelled():
                return
            try:
                fetched = future.result()
            except BadMediaError as error:
                item.failure = error.failure
            else:
                item.data, item.release = fetched.data, fetched.release
                item.read_s = fetched.seconds / self._rules.connections
            done(item)

        future.add_done_callback(arrived)

    def hash(self, item: MediaItem) -> MediaItem:
        """The same item with its key; its bytes kept, where they are to be. From any thread.

        Raises:
            OSError: the folder of kept media cannot be written.
        """
        if item.failure is not None:
            return item
        start = time.perf_counter()
        assert isinstance(item.data, bytes), "downloads are in memory"
        key = hashlib.sha256(item.data).hexdigest()
        item.record = replace(item.record, key=key, bytes=len(item.data))
        if self._store is not None:
            self._store.put(key, item.data)
        item.read_s += time.perf_counter() - start
        return item

    def close(self) -> None:
        """Give up what is under way."""
        self._closed = True
        if self._fetcher is not None:
            self._fetcher.close()

    def _kept(self, task: SourceTask) -> bytes | None:
        key = task.sha256 or task.key
        if self._store is None or key is None:
            return None
        try:
            return self._store.get(key)
        except OSError as error:
            log.warning("%s: %s; downloaded again", error.filename, error.strerror)
            return None
