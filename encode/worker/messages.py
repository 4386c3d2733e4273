"""What the driver and its workers exchange: sources to encode, their outcomes, timings and reservations.

No Ray and no torch: the inline worker, the Ray actors and the tests all use these classes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cache.errors import StaleJobError
from cache.store.ledger import MediaRecord
from model.media.images import Failure

OWN_STAGES = ("encode", "write")
"""Stages whose failures are errors of this program or machine. At other stages the media item is at fault."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTask:
    """One source to bring into the space."""

    source: str
    """Absolute path, URL, or name of embedded media."""
    kind: str = "image"
    """image or video."""
    attempts: int = 0
    """Earlier failures, as the ledger counts them."""
    sha256: str | None = None
    """The sha256 of its bytes, if the data set states one."""
    key: str | None = None
    """The sha256 of its bytes when the ledger last recorded it: the name of its file in the media store."""
    reassigned: bool = False
    """Whether another worker of this job had it before, and may have committed some of its rows."""


def media_id(kind: str, key: str) -> str:
    """Return the name under which a media item is reserved. Equal bytes are encoded once for each kind."""
    return key if kind == "image" else f"{kind}:{key}"


Result = Literal["ok", "present", "failed", "duplicate"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The final result of one source."""

    task: SourceTask
    """The source."""
    record: MediaRecord
    """The ledger's record for the case that its bytes are, or will be, in the space."""
    result: Result
    """ok: its rows are committed. present: the space had all rows of the video before. duplicate: another
    source, or the space, has the same bytes. failed: `failure` says why."""
    failure: Failure | None = None
    """Set exactly when `result` is `failed`."""

    def failed_record(self) -> MediaRecord:
        """Return the ledger's record of the failure."""
        assert self.failure is not None, "it has not failed"
        return dataclasses.replace(
            self.record,
            status="failed",
            stage=self.failure.stage,
            error=self.failure.reason,
            attempts=self.task.attempts + 1,
        )


@dataclass(kw_only=True)
class Timings:
    """What a worker has done so far.

    Seconds of `read_s` and `decode_s` add up over threads, so they may exceed the elapsed time.
    """

    media: int = 0
    """Media items encoded, committed or not."""
    rows: int = 0
    """Rows encoded: one for an image, one for a frame."""
    download_s: float = 0.0
    """Seconds to download and hash, all connections added up and divided by their number."""
    read_s: float = 0.0
    """Seconds to open, read and hash files, all threads added up."""
    decode_s: float = 0.0
    """Seconds from bytes to encoder inputs, all threads added up."""
    wait_s: float = 0.0
    """Seconds in which the encode loop had no input."""
    encode_s: float = 0.0
    """Seconds for forward pass, packing and copy to the host."""
    write_s: float = 0.0
    """Seconds to append and commit rows."""
    clipped: int = 0
    """Values outside float16's range, stored as its largest value."""
    span_s: float = 0.0
    """Seconds from the first report of any worker to the last one, so without the time to start."""

    def __add__(self, other: Timings) -> Timings:
        return Timings(**{name: value + vars(other)[name] for name, value in vars(self).items()})

    def since(self, before: Timings) -> Timings:
        """Return what was done after `before`."""
        return Timings(**{name: value - vars(before)[name] for name, value in vars(self).items()})

    def bound(self) -> str:
        """Return the stage that limits the speed: download, read, decode, encode or write."""
        if self.wait_s > max(self.encode_s, self.write_s):
            fed = {"decode": self.decode_s, "read": self.read_s, "download": self.download_s}
            return max(fed, key=lambda stage: fed[stage])
        return "write" if self.write_s > self.encode_s else "encode"


class Coordinator(Protocol):
    """What a worker may ask the driver: a `Registrar`, or the Ray actor around one."""

    def reserve(self, worker: int, ids: Sequence[str]) -> list[bool]:
        """Reserve media for this worker. False for those that are committed, or reserved already."""
        ...

    def next_shard(self, worker: int, array: str) -> int:
        """Return a shard number of `array` that was never used."""
        ...

    def report(self, worker: int, timings: Timings) -> bool:
        """Record a worker's timings. False: the job stops, so the worker must finish."""
        ...


class Registrar:
    """Gives out media and shard numbers, each once, and adds up timings."""

    def __init__(
        self,
        committed: Collection[str],
        next_shard: dict[str, int],
        on_report: Callable[[Timings], None] = lambda _: None,
    ):
        """Start with nothing reserved.

        Args:
            committed: ids of media that are in the space.
            next_shard: array -> its first unused shard number.
            on_report: called with the timings of all workers at each report.
        """
        self._committed = committed  # not copied: it may have millions of entries
        self._taken: set[str] = set()
        self._reserved: dict[int, set[str]] = {}
        self._next_shard, self._on_report = dict(next_shard), on_report
        self._shards: dict[int, list[tuple[str, int]]] = {}
        self._timings: dict[int, Timings] = {}
        self._heard_s: dict[int, float] = {}
        self._gone: set[int] = set()
        self._first_s = self._last_s = 0.0
        self._running = True

    def reserve(self, worker: int, ids: Sequence[str]) -> list[bool]:
        """Reserve media for this worker. False for those that are committed, or reserved already.

        Raises:
            StaleJobError: the worker was released.
        """
        if worker in self._gone:
            raise StaleJobError(f"worker {worker} was replaced by its driver")
        mine = self._reserved.setdefault(worker, set())
        granted = []
        for name in ids:
            granted.append(name not in self._taken and name not in self._committed)
            if granted[-1]:
                self._taken.add(name)
                mine.add(name)
        return granted

    def next_shard(self, worker: int, array: str) -> int:
        """Return a shard number of `array` that was never used."""
        number = self._next_shard[array]
        self._next_shard[array] = number + 1
        self._shards.setdefault(worker, []).append((array, number))
        return number

    def report(self, worker: int, timings: Timings) -> bool:
        """Record a worker's timings. False: the job stops, so the worker must finish."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        self._timings[worker], self._heard_s[worker] = timings, self._last_s
        self._on_report(self.timings())
        return self._running and worker not in self._gone

    def shards(self, worker: int) -> list[tuple[str, int]]:
        """Return (array, number) of every shard given to this worker."""
        return self._shards.get(worker, [])

    def release(self, worker: int, committed: Collection[str]) -> list[str]:
        """Release what a dead worker had reserved and not committed; return it.

        From now on the worker gets nothing: its process may run on where the driver cannot end it.
        """
        self._gone.add(worker)
        free = [name for name in self._reserved.pop(worker, ()) if name not in committed]
        self._taken.difference_update(free)
        return free

    def silent_s(self) -> dict[int, float]:
        """Return worker -> seconds since its last report."""
        now = time.monotonic()
        return {worker: now - heard_s for worker, heard_s in self._heard_s.items()}

    def stop(self) -> None:
        """Make every worker finish at its next report."""
        self._running = False

    def by_worker(self) -> dict[int, Timings]:
        """Return worker -> its timings, dead ones included."""
        return self._timings

    def timings(self) -> Timings:
        """Return the timings of all workers together, dead ones included."""
        together = sum(self._timings.values(), Timings())
        return dataclasses.replace(together, span_s=self._last_s - self._first_s)
