"""The steps on jobs of many sources: a ledger with a tenth of them, and the plan of all.

Half of the sources are URLs of a thousand hosts, a quarter are members of tars, a quarter are rows of Parquet
files. The ledger has every tenth of them, in parts as a job writes them, and the space has half of these. The
files exist and are empty, because a plan reads none.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import islice

from cache.format.embedded.names import member_source, row_source
from cache.store.ledger import MediaRecord, MediaRows, append_media
from cache.store.paths import CacheRoot
from cache.store.samples import MediaRef
from cache.store.space import Present
from encode.driver.tracker import LEDGER_EVERY_RECORDS, Tracker
from encode.plan.media import MediaCounter
from encode.plan.plan import make_plan
from encode.worker.local_files import identify
from tests.benchmarks.scale.memory import memory_mb

IN_A_FILE = 10_000
"""Media in each tar and Parquet file."""
HOSTS = 1000
KNOWN = 10
"""One of this many sources is in the ledger."""


def source(root: CacheRoot, number: int) -> str:
    """Return the name of one source. The part that differs is as random as names of files are."""
    place = number * 2654435761 % 2**32
    if number % 2:
        return f"https://img{number % HOSTS}.example.org/{place:08x}/{number:09d}.jpg"
    file = number // IN_A_FILE
    if number % 4:
        name = f"{number:09d}.jpg"
        return member_source(str(root.path / f"{file}.tar"), 512 * (place + 1), 20480, name)
    return row_source("parquet", str(root.path / f"{file}.parquet"), "image", number % IN_A_FILE)


def refs(root: CacheRoot, count: int) -> Iterator[MediaRef]:
    """Yield what the samples mention: each source, and every fifth one a second time, much later."""
    for number in range(count):
        yield MediaRef(source=source(root, number))
        if number % 5 == 0:
            yield MediaRef(source=source(root, number // 2))


def key(number: int) -> str:
    """Return the key of one source."""
    return hashlib.sha256(str(number).encode()).hexdigest()


def build(root: CacheRoot, count: int) -> dict[str, float]:
    """Write the empty files, and the ledger."""
    root.path.mkdir(parents=True, exist_ok=True)
    for file in range(-(-count // IN_A_FILE)):
        (root.path / f"{file}.tar").touch()
        (root.path / f"{file}.parquet").touch()
    records = _records(root, count)
    while some := list(islice(records, LEDGER_EVERY_RECORDS)):
        append_media(root, some, "bench")
    return {}


def _records(root: CacheRoot, count: int) -> Iterator[MediaRecord]:
    for number in range(0, count, KNOWN):
        name = source(root, number + number // KNOWN % 2)
        record = MediaRecord(source=name, key=key(number), width=640, height=480, bytes=9)
        identity = None if name.startswith("https") else identify(name)
        yield record if identity is None else identity.stamp(record)


def plan(root: CacheRoot, count: int) -> dict[str, float]:
    """Count the sources, plan, and take the first tasks. Seconds are those of the processor, of one core."""
    present = Present({key(number) for number in range(0, count, 2 * KNOWN)})
    made = time.process_time()
    for _ in refs(root, count):
        pass
    before, started = memory_mb(), time.process_time()
    counter = MediaCounter()
    for ref in refs(root, count):
        counter.add(ref)
    media, counted = counter.media, time.process_time()
    found = make_plan(media, MediaRows(root), present, space="s")
    tracker = Tracker(found.todo, present=present.images, on_record=lambda _: None)
    tasks = tracker.assign_next(0, 32)
    ended = time.process_time()
    assert len(tasks) == 32 and len(media) == count
    assert found.reused == len(range(0, count, 2 * KNOWN)), found
    return {
        "seconds": ended - started - (started - made),  # without making the references
        "count_s": counted - started - (started - made),
        "peak": memory_mb("VmHWM") - before,
        "held": memory_mb() - before,
        "todo": len(found.todo),
    }


STEPS: dict[str, Callable[[CacheRoot, int], dict[str, float]]] = {
    "build": build,
    "plan": plan,
}
"""The steps, in the order in which they need each other's files."""
