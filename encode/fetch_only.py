"""`encode.run --fetch-only`: download media into the folder of kept media, without an encoder or a space.

The ledger records the key of each downloaded file, so that a later encode job finds its bytes in that folder,
and the reason of each failure. The command may be killed at any time; running it again continues.

    fetch  24% [====>           ]  1,200/5,000  24.1/s  2 min 38 s left  bound by download  3 failed
"""

from __future__ import annotations

import queue
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import pyarrow as pa

from cache.format.frame_sampling import MAX_FRAMES
from cache.store.ledger import MediaRecord, MediaRows, records_of
from cache.store.paths import CacheRoot
from cache.store.space import Present
from configs.signals import Interrupts
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from encode.driver.progress import Counts, JobProgress, OnProgress
from encode.driver.tracker import Ledger
from encode.plan.known import Known
from encode.plan.media import Media
from encode.plan.tasks import Hosts, Tasks, spread
from encode.worker.config import WorkerConfig
from encode.worker.downloads import Downloads
from encode.worker.media_item import MediaItem
from encode.worker.messages import SourceTask

POLL_S = 0.5
"""Seconds between checks for an interrupt while no download ends."""


def fetch_only(
    root: CacheRoot,
    media: Media,
    config: WorkerConfig,
    *,
    retry_failed: bool,
    again: str = "encode.run --fetch-only",
    on_progress: OnProgress | None = None,
) -> int:
    """Download the media that are not kept yet.

    Args:
        root: the cache, whose ledger records the results.
        media: what samples mention; files are ignored.
        config: the limits of downloads, and the folder of kept media, which must be set.
        retry_failed: download again what failed before.
        again: the command line that goes on after an interruption.
        on_progress: gets the progress, which is printed otherwise.

    Returns:
        the exit code.
    """
    folder = config.media_store
    assert folder is not None, "Options refuses --fetch-only without --keep-media"
    tasks, kept, known_failures, known = plan_downloads(
        MediaRows(root), media, MediaStore(folder), retry_failed
    )
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
    ledger: Iterable[pa.Table], media: Media, store: MediaStore, retry_failed: bool
) -> tuple[Sequence[SourceTask], int, int, Mapping[str, MediaRecord]]:
    """Sort the URLs of a job.

    Args:
        ledger: rows of the media table, later ones behind.
        media: what samples mention.
        store: the kept media.
        retry_failed: download again what failed before.

    Returns:
        the downloads to do, the number of kept media, the number of earlier failures, and the records of
        those to do that were decoded before.
    """
    known = Known(media, Present(), space="", max_frames=MAX_FRAMES)
    for table in ledger:
        known.read(table)
    hosts = Hosts()
    numbers = [hosts.number(source) if is_url(source) else -1 for source in media]
    host_of = np.array(numbers, np.int32)
    failed = known.failed
    keyed = known.keyed & ~failed & ~known.differs
    kept = np.zeros(len(media), bool)
    for at in np.flatnonzero((host_of >= 0) & keyed).tolist():
        keys = media.keys if media.stated[at] else known.keys
        kept[at] = store.has(keys(np.array([at]))[0].tobytes().hex())
    known_failures = (host_of >= 0) & failed & (not retry_failed)
    todo = np.flatnonzero((host_of >= 0) & ~kept & ~known_failures)
    todo = todo[spread(host_of[todo])]
    ours = np.ones(len(todo), bool)
    tasks = Tasks(media, known, todo, unchanged=ours, web=ours)
    again = np.zeros(len(media) + 1, bool)  # the last one: sources that are not mentioned
    again[todo] = keyed[todo]
    records: dict[str, MediaRecord] = {}
    for table in ledger if again.any() else ():
        mine = again[media.numbers.find(table["source"].to_pylist())]
        records |= {record.source: record for record in records_of(table.filter(pa.array(mine)))}
    return tasks, int(kept.sum()), int(known_failures.sum()), records


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
