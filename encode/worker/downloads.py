"""URLs -> media items: from the media store, or else downloaded by `encode.download`."""

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
    """Fetches the bytes of URLs in the background. `start` and `close` belong to one thread."""

    def __init__(self, config: DownloadConfig, media_store: Path | None):
        """Open no connection before the first `start`.

        Args:
            config: limits of the downloads.
            media_store: folder in which bytes are kept, and searched for before a download; None: not kept.
        """
        self._config = config
        self._store = MediaStore(media_store) if media_store is not None else None
        self._fetcher: Fetcher | None = None
        self._closed = False

    def start(self, task: SourceTask, done: Callable[[MediaItem], None]) -> None:
        """Fetch the bytes of `task`, then call `done` from any thread. `hash` sets the item's key."""
        item = MediaItem(task=task, record=MediaRecord(source=task.source, kind=task.kind))
        if (data := self._kept(task)) is not None:
            item.data = data
            done(item)
            return
        if self._closed:
            return
        self._fetcher = self._fetcher or Fetcher(self._config)
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
                item.read_s = fetched.seconds / self._config.connections
            done(item)

        future.add_done_callback(arrived)

    def hash(self, item: MediaItem) -> MediaItem:
        """Set the key of `item`, unless it failed, and store its bytes. May be called from any thread.

        Raises:
            OSError: the media store cannot be written.
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
        """Cancel the downloads that have not finished."""
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
