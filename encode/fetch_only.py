"""`encode.run --fetch-only`: download media into the folder of kept media, without an encoder or a space.

The ledger records the key of each downloaded file, so that a later encode job finds its bytes in that folder,
and the reason of each failure. The command may be killed at any time; running it again continues.

    fetch  24% [====>           ]  1,200/5,000  24.1/s  2 min 38 s left  bound by download  3 failed
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterable, Iterator
from itertools import islice

from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from configs.signals import Interrupts
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from encode.driver.progress import Counts, JobProgress, OnProgress
from encode.driver.tracker import Ledger
from encode.plan.plan import Mention, spread
from encode.worker.config import WorkerConfig
from encode.worker.downloads import Downloads
from encode.worker.media_item import MediaItem
from encode.worker.messages import SourceTask

POLL_S = 0.5
"""Seconds between checks for an interrupt while no download ends."""


def fetch_only(
    root: CacheRoot,
    media: dict[str, Mention],
    config: WorkerConfig,
    *,
    retry_failed: bool,
    again: str = "encode.run --fetch-only",
    on_progress: OnProgress | None = None,
) -> int:
    """Download the media that are not kept yet.

    Args:
        root: the cache, whose ledger records the results.
        media: source -> what samples say about it; files are ignored.
        config: the limits of downloads, and the folder of kept media, which must be set.
        retry_failed: download again what failed before.
        again: the command line that goes on after an interruption.
        on_progress: gets the progress, which is printed otherwise.

    Returns:
        the exit code.
    """
    folder = config.media_store
    assert folder is not None, "Options refuses --fetch-only without --keep-media"
    known = read_media(root)
    tasks, kept, known_failures = plan_downloads(known, media, MediaStore(folder), retry_failed)
    print(
        f"media    {len(tasks)} to download into {folder}, {kept} there, {known_failures} failed before"
    )
    ledger = Ledger(root, secrets.token_hex(4))
    start = time.monotonic()
    done = failed = 0

    def counts() -> Counts:
        return Counts(done=done, worked=done, failed=failed, bound="download")

    progress = JobProgress("fetch", len(tasks), counts, on_progress=on_progress)
    with Interrupts() as interrupts, progress:
        progress.show()
        downloads = Downloads(config.download, folder)
        try:
            for item in _download(downloads, tasks, 2 * config.download.connections, interrupts):
                ledger.add(_record(item, known.get(item.task.source)))
                done += 1
                failed += item.failure is not None
                progress.show()
        finally:
            downloads.close()
            ledger.flush()
    if interrupts.stopping():
        print(
            f"interrupted: {done} kept or in the ledger, {len(tasks) - done} left; go on: {again}"
        )
        return interrupts.exit_code
    seconds = time.monotonic() - start
    print(
        f"fetched={done - failed} reused={kept} failed={failed + known_failures} seconds={seconds:.1f}"
    )
    return 0


def plan_downloads(
    ledger: dict[str, MediaRecord],
    media: dict[str, Mention],
    store: MediaStore,
    retry_failed: bool,
) -> tuple[tuple[SourceTask, ...], int, int]:
    """Return the downloads to do, the number of kept media and the number of earlier failures."""
    tasks: list[SourceTask] = []
    kept = known_failures = 0
    for source, mention in media.items():
        if not is_url(source):
            continue
        record = ledger.get(source) or MediaRecord(source=source)
        failed_before = record.status == "failed"
        if failed_before and not retry_failed:
            known_failures += 1
        elif not failed_before and record.key is not None and store.has(record.key):
            kept += 1
        else:
            tasks.append(
                SourceTask(
                    source=source,
                    kind=mention.kind,
                    attempts=record.attempts if failed_before else 0,
                    sha256=mention.sha256,
                    key=record.key or mention.sha256,
                )
            )
    return spread(tasks), kept, known_failures


def _download(
    downloads: Downloads, tasks: Iterable[SourceTask], ahead: int, interrupts: Interrupts
) -> Iterator[MediaItem]:
    """Yield each task's item with its key once it is stored, until an interrupt.

    At most `ahead` downloads are submitted and not finished.
    """
    arrived: queue.SimpleQueue[MediaItem] = queue.SimpleQueue()
    waiting, unfinished = iter(tasks), 0
    while not interrupts.stopping():
        for task in islice(waiting, ahead - unfinished):
            downloads.start(task, arrived.put)
            unfinished += 1
        if not unfinished:
            return
        try:
            item = arrived.get(timeout=POLL_S)
        except queue.Empty:
            continue
        unfinished -= 1
        item = downloads.hash(item)
        item.drop_data()
        yield item


def _record(item: MediaItem, known: MediaRecord | None) -> MediaRecord:
    """Return the ledger's record of a download; unchanged bytes keep what decoding added to it."""
    if item.failure is not None:
        return item.outcome().failed_record()
    if known is not None and known.status == "ok" and known.key == item.record.key:
        return known
    return item.record
