"""What a job has to do, and what that costs: counted before anything is started.

A source is *reused* when the ledger knows its key, its file is still the one that was hashed, and the
space has all its rows; a *known failure* when the ledger says so of that same file. What a URL once gave
counts as what it gives. Everything else is *to do*.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple
from urllib.parse import urlsplit

from cache.format.frame_sampling import MAX_FRAMES, frame_views
from cache.format.space_info import slot_bytes
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.ledger import MediaRecord
from cache.store.references import Present
from cache.store.samples import MediaRef, Sample
from encode.download.urls import is_url
from encode.worker.local_files import identify
from encode.worker.messages import OWN_STAGES, SourceTask, failed, media_id
from model.media.images import Failure

OWN_ATTEMPTS = 3
"""An image our own code failed on is tried again by this many jobs."""

OVERHEAD_BYTES = 156
"""Beside a row's slot: its index entry, its line in the commit and in the media table."""


class Mention(NamedTuple):
    """What samples say of a source."""

    kind: str
    """image or video."""
    sha256: str | None = None
    """What its bytes hash to, if a data set says so."""


class MediaCounter:
    """Passes samples through, and remembers the distinct media they mention, in order."""

    def __init__(self) -> None:
        self.media: dict[str, Mention] = {}
        """By source."""
        self.samples = 0
        """How many samples went through."""

    def watch(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The same samples."""
        for sample in samples:
            self.samples += 1
            for ref in sample.media:
                self.add(ref)
            yield sample

    def add(self, ref: MediaRef) -> None:
        """Count one mention; the first that gives a hash is believed."""
        known = self.media.get(ref.source)
        if known is None or (known.sha256 is None and ref.sha256 is not None):
            self.media[ref.source] = Mention(sys.intern(ref.kind), ref.sha256)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The media of one job, sorted by what is to happen to them."""

    todo: tuple[SourceTask, ...] = ()
    """To read, and to encode unless the bytes turn out to be known."""
    new_rows: Mapping[str, int] = field(default_factory=dict)
    """Array -> rows at most: of the media to do, those not known to share their bytes."""
    unread: int = 0
    """Media to do whose key, or length, is not known yet."""
    reused: int = 0
    """In the space already."""
    known_failures: int = 0
    """In the ledger as failed, and unchanged since."""
    missing: tuple[MediaRecord, ...] = field(default=(), repr=False)
    """Newly found to be no file: for the ledger."""
    recognised: tuple[MediaRecord, ...] = field(default=(), repr=False)
    """URLs whose bytes are in the space by the hash their data set gives: for the ledger, and reused."""

    @property
    def media(self) -> int:
        """All of them."""
        return len(self.todo) + self.reused + self.known_failures + len(self.missing)

    @property
    def rows(self) -> int:
        """Rows at most, of all arrays."""
        return sum(self.new_rows.values())

    @property
    def downloads(self) -> int:
        """Media to do that are not on this disk."""
        return sum(is_url(task.source) for task in self.todo)

    def bytes_needed(self, spec: FeatureSpec) -> int:
        """On the disk, at most."""
        return sum(n * (slot_bytes(spec, a) + OVERHEAD_BYTES) for a, n in self.new_rows.items())


def make_plan(
    media: Mapping[str, Mention],
    ledger: Mapping[str, MediaRecord],
    present: Present,
    *,
    space: str,
    max_frames: int = MAX_FRAMES,
    rehash: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """Sort media by what is to happen to them.

    Args:
        media: what samples mention, by source.
        ledger: source -> what is known of it.
        present: the rows of the space.
        space: its name.
        max_frames: of one video.
        rehash: read every file again, whatever its stamps say.
        retry_failed: try known failures again.
    """
    counted = _Counted(present, max_frames)
    by_key = {r.key: r for r in ledger.values() if r.status == "ok" and r.width}
    todo: list[SourceTask] = []
    missing: list[MediaRecord] = []
    recognised: list[MediaRecord] = []
    reused = known_failures = 0
    for source, mention in media.items():
        record = ledger.get(source)
        web = is_url(source)
        identity = None if web else identify(source)
        if record is not None and record.kind != mention.kind:
            record = None  # it was read as something else
        here = record is not None and present.has(record.kind, record.key, record.duration_s)
        if identity is None and not web:
            if here:
                reused += 1  # the file is gone, its features are here
            elif record is not None and record.stage == "fetch":
                known_failures += 1
            else:
                missing.append(_missing(source, mention.kind, record))
            continue
        same = record is not None and (
            identity is None or (not rehash and identity.matches(record))
        )
        if web and record is not None and mention.sha256 not in (None, record.key):
            # Other bytes than the data set means, unless they never came: to be asked for, and verified.
            same, here = same and record.status == "failed", False
        twin = by_key.get(mention.sha256) if web and not here else None
        if same and here:
            reused += 1
        elif twin is not None and present.has(mention.kind, twin.key, twin.duration_s):
            recognised.append(replace(twin, source=source, attempts=1))
            reused += 1
        elif same and record is not None and _given_up(record, space) and not retry_failed:
            known_failures += 1
        else:
            known = record if same else None
            todo.append(_task(source, mention, known))
            counted.add(mention, known)
    return Plan(
        todo=spread(todo),
        new_rows=counted.rows,
        unread=counted.unread,
        reused=reused,
        known_failures=known_failures,
        missing=tuple(missing),
        recognised=tuple(recognised),
    )


class _Counted:
    """Rows that media to do will become, at most."""

    def __init__(self, present: Present, max_frames: int):
        self.rows: Counter[str] = Counter()
        self.unread = 0
        self._present, self._max_frames = present, max_frames
        self._keys: set[str] = set()

    def add(self, mention: Mention, known: MediaRecord | None) -> None:
        key = (known.key if known else None) or mention.sha256
        sure = known is not None and known.key is not None
        rows = 1
        if mention.kind == "video":
            rows = self._max_frames
            sure = sure and known is not None and known.duration_s is not None
            if sure and known is not None and known.key is not None:
                views = frame_views(known.duration_s or 0.0, self._max_frames)
                rows = len(self._present.missing(known.key, views))
        self.unread += not sure
        if key is None or media_id(mention.kind, key) not in self._keys:
            self.rows[ARRAY_OF[mention.kind]] += rows
        if key is not None:
            self._keys.add(media_id(mention.kind, key))


def _task(source: str, mention: Mention, known: MediaRecord | None) -> SourceTask:
    return SourceTask(
        source=source,
        kind=mention.kind,
        attempts=known.attempts if known and known.status == "failed" else 0,
        sha256=mention.sha256,
        key=known.key if known and is_url(source) else None,
    )


def spread(tasks: Sequence[SourceTask]) -> tuple[SourceTask, ...]:
    """The same tasks, those of one web host far apart: a host takes only a few requests at a time.

    Files stay in their order, since neighbours on disk are read faster.
    """
    turns: Counter[str] = Counter()
    order = []
    for number, task in enumerate(tasks):
        host = urlsplit(task.source).netloc if is_url(task.source) else ""
        order.append((turns[host] if host else number, number))
        turns[host] += 1
    return tuple(tasks[number] for _, number in sorted(order))


def _missing(source: str, kind: str, record: MediaRecord | None) -> MediaRecord:
    attempts = record.attempts if record and record.status == "failed" else 0
    blank = MediaRecord(source=source, kind=kind)
    return failed(blank, attempts, Failure("fetch", "no such file"))


def _given_up(record: MediaRecord, space: str) -> bool:
    """Whether a failure stands: the media's own always, ours after a few jobs, and for this space only."""
    if record.status != "failed":
        return False
    if record.stage not in OWN_STAGES:
        return True
    return (record.error or "").startswith(f"{space}: ") and record.attempts >= OWN_ATTEMPTS
