"""`encode.run --fetch-only`: downloads ahead, into the folder of kept media; no encoder, no space.

What came is in the media table with its key, so that encoding later finds the bytes in that folder; what did
not, with its reason. May be killed at any moment: the same command goes on.
"""

from __future__ import annotations

import queue
import secrets
import sys
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from cache.store.ledger import MediaRecord, read_media
from cache.store.paths import CacheRoot
from encode.download.config import DownloadConfig
from encode.download.media_store import MediaStore
from encode.download.urls import is_url
from encode.driver.progress import LOG_EVERY_S
from encode.driver.signals import Interrupts
from encode.driver.tracker import Ledger
from encode.estimate import about
from encode.plan import Mention, spread
from encode.worker.downloads import Downloads
from encode.worker.media_item import MediaItem
from encode.worker.messages import SourceTask

POLL_S = 0.5


def fetch_only(
    root: CacheRoot,
    media: dict[str, Mention],
    rules: DownloadConfig,
    keep: Path,
    *,
    retry_failed: bool,
) -> int:
    """Download what is not kept yet; returns the exit code."""
    known = read_media(root)
    tasks, kept, known_failures = to_fetch(known, media, MediaStore(keep), retry_failed)
    print(
        f"media    {len(tasks)} to download into {keep}, {kept} there, {known_failures} failed before"
    )
    ledger = Ledger(root, secrets.token_hex(4))
    start = time.monotonic()
    done = broken = 0
    with Interrupts() as interrupts:
        downloads = Downloads(rules, keep)
        try:
            said = start
            for item in run(downloads, tasks, 2 * rules.connections, interrupts):
                ledger.add(final(item, known.get(item.task.source)))
                done += 1
                broken += item.failure is not None
                now = time.monotonic()
                if now - said > LOG_EVERY_S:
                    said = now
                    rate = done / (now - start)
                    left = about((len(tasks) - done) / rate)
                    pace = f"{rate:.3g}/s  bound by read  {broken} failed  {left} left"
                    print(f"fetch {done}/{len(tasks)}  {pace}", file=sys.stderr)
        finally:
            downloads.close()
            ledger.flush()
        if interrupts.stopping():
            print(f"interrupted: {done} kept or in the ledger, {len(tasks) - done} left")
            return interrupts.exit_code
    seconds = time.monotonic() - start
    print(
        f"fetched={done - broken} reused={kept} failed={broken + known_failures} seconds={seconds:.1f}"
    )
    return 0


def to_fetch(
    ledger: dict[str, MediaRecord],
    media: dict[str, Mention],
    store: MediaStore,
    retry_failed: bool,
) -> tuple[tuple[SourceTask, ...], int, int]:
    """What to download; how many are there; how many failed before."""
    tasks: list[SourceTask] = []
    kept = known_failures = 0
    for source, mention in media.items():
        if not is_url(source):
            continue
        record = ledger.get(source)
        key = (record.key if record is not None else None) or mention.sha256
        failed_before = record is not None and record.status == "failed"
        if failed_before and not retry_failed:
            known_failures += 1
        elif record is not None and not failed_before and key is not None and store.has(key):
            kept += 1
        else:
            attempts = record.attempts if record is not None and failed_before else 0
            tasks.append(
                SourceTask(
                    source=source,
                    kind=mention.kind,
                    attempts=attempts,
                    sha256=mention.sha256,
                    key=key,
                )
            )
    return spread(tasks), kept, known_failures


def run(
    downloads: Downloads, tasks: Iterable[SourceTask], ahead: int, interrupts: Interrupts
) -> Iterable[MediaItem]:
    """Each task's item with its key, as they arrive; fewer when interrupted."""
    arrived: queue.SimpleQueue[MediaItem] = queue.SimpleQueue()
    waiting, left = iter(tasks), 0
    while not interrupts.stopping():
        for task in islice(waiting, ahead - left):
            downloads.start(task, arrived.put)
            left += 1
        if not left:
            return
        try:
            item = arrived.get(timeout=POLL_S)
        except queue.Empty:
            continue
        left -= 1
        item = downloads.hash(item)
        item.drop_data()
        yield item


def final(item: MediaItem, known: MediaRecord | None) -> MediaRecord:
    """What the ledger says of a download; of bytes known before, also what decoding them told."""
    if item.failure is not None:
        return item.outcome().failed_record()
    if known is not None and known.status == "ok" and known.key == item.record.key:
        return known
    return item.record
