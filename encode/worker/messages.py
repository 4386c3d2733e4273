"""What driver and workers say to each other: sources to do, what became of them, and who may do what.

No Ray, no torch: the inline worker, the Ray actors and the tests all speak through these.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from cache.store.ledger import MediaRecord
from model.media.images import Failure

OWN_STAGES = ("encode", "write")
"""Failures at these stages are ours; the others are the media's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceTask:
    """One source to bring into the space."""

    source: str
    """Absolute path or URL."""
    kind: str = "image"
    """image or video."""
    attempts: int = 0
    """Failures before this one, as the ledger counts them."""
    sha256: str | None = None
    """What its bytes hash to, where the data set says so."""
    key: str | None = None
    """What they hashed to when the ledger last saw them: where kept bytes are found."""
    again: bool = False
    """Whether another worker of this job had it, and may have committed a part."""


def media_id(kind: str, key: str) -> str:
    """What is claimed. The same bytes as an image and as a video are two things to encode."""
    return key if kind == "image" else f"{kind}:{key}"


Result = Literal["ok", "present", "failed", "duplicate"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What finally became of a source."""

    task: SourceTask
    """Which one."""
    record: MediaRecord
    """What the ledger will say about it once its bytes are in the space."""
    result: Result
    """ok: its rows are committed. present: the space had all of them before. duplicate: another source has
    the same bytes. failed: `failure` says why."""
    failure: Failure | None = None
    """Set when it failed, and only then."""

    def failed_record(self) -> MediaRecord:
        """Return the ledger's record of the failure."""
        assert self.failure is not None, "it has not failed"
        return failed(self.record, self.task.attempts, self.failure)


def failed(record: MediaRecord, attempts: int, failure: Failure) -> MediaRecord:
    """Return `record` as the ledger keeps it after a failure; `attempts` counts the earlier failures."""
    return dataclasses.replace(
        record,
        status="failed",
        stage=failure.stage,
        error=failure.reason,
        attempts=attempts + 1,
    )


@dataclass(kw_only=True)
class Timings:
    """What a worker did so far. Seconds of threads add up; those of the encode loop do not overlap."""

    media: int = 0
    """Encoded, committed or not yet."""
    rows: int = 0
    """Views of them: one an image, one a frame."""
    read_s: float = 0.0
    """Opening, reading and hashing, all threads together; of downloads, a connection's share."""
    decode_s: float = 0.0
    """Bytes to encoder input, all threads together."""
    wait_s: float = 0.0
    """The encode loop had nothing to do."""
    encode_s: float = 0.0
    """Forward pass, packing, copy to the host."""
    write_s: float = 0.0
    """Appending and committing."""
    clipped: int = 0
    """Values beyond float16's range, stored as its largest."""
    span_s: float = 0.0
    """From the first word of any worker to the last one: starting up is not in it."""

    def __add__(self, other: Timings) -> Timings:
        names = [f.name for f in dataclasses.fields(self)]
        return Timings(**{n: getattr(self, n) + getattr(other, n) for n in names})

    def bound(self) -> str:
        """The stage that decides the speed."""
        if self.wait_s > max(self.encode_s, self.write_s):
            return "read" if self.read_s > self.decode_s else "decode"
        return "write" if self.write_s > self.encode_s else "encode"


class Coordinator(Protocol):
    """What a worker may ask of the driver's side: `Registrar` itself, or a Ray actor around it."""

    def reserve(self, worker: int, keys: Sequence[str]) -> list[bool]:
        """Which of these media this worker shall encode: those nobody has or had."""
        ...

    def next_shard(self, worker: int, kind: str) -> int:
        """A shard number that was never used."""
        ...

    def report(self, worker: int, timings: Timings) -> bool:
        """Say how far this worker is; False: the job stops, come to an end."""
        ...


class Registrar:
    """Hands out media and shard numbers, each once; gathers timings; carries the word to stop."""

    def __init__(self, committed: Collection[str], next_shard: dict[str, int]):
        self._committed = committed
        self._taken: set[str] = set()
        self._reserved: dict[int, set[str]] = {}
        self._next_shard = dict(next_shard)
        self._shards: dict[int, list[tuple[str, int]]] = {}
        self._timings: dict[int, Timings] = {}
        self._first = self._last = 0.0
        self._going = True

    def reserve(self, worker: int, keys: Sequence[str]) -> list[bool]:
        """See Coordinator."""
        mine = self._reserved.setdefault(worker, set())
        granted = []
        for key in keys:
            granted.append(key not in self._taken and key not in self._committed)
            if granted[-1]:
                self._taken.add(key)
                mine.add(key)
        return granted

    def next_shard(self, worker: int, kind: str) -> int:
        """See Coordinator."""
        number = self._next_shard[kind]
        self._next_shard[kind] = number + 1
        self._shards.setdefault(worker, []).append((kind, number))
        return number

    def report(self, worker: int, timings: Timings) -> bool:
        """See Coordinator."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._timings[worker] = timings
        return self._going

    def shards(self, worker: int) -> list[tuple[str, int]]:
        """(kind, number) of every shard this worker asked for."""
        return self._shards.get(worker, [])

    def release(self, worker: int, committed: Collection[str]) -> list[str]:
        """A worker is gone: what it had claimed and not committed is anybody's again."""
        free = [key for key in self._reserved.pop(worker, ()) if key not in committed]
        self._taken.difference_update(free)
        return free

    def stop(self) -> None:
        """Workers come to an end at their next report."""
        self._going = False

    def timings(self) -> Timings:
        """All workers together, the gone ones too."""
        together = sum(self._timings.values(), Timings())
        return dataclasses.replace(together, span_s=self._last - self._first)
