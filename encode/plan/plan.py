"""Sort the media of a job before it starts: reused, failed before, missing, or to encode.

A source is *reused* if its file is still the one that was hashed and the space has all rows of that hash. It
is a *known failure* if the ledger records a failure of that same file. A URL is assumed to return the bytes
that it returned before. All other sources are *to do*.
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
from cache.store.ledger import MediaRecord, note_subjects
from cache.store.references import means_other_bytes
from cache.store.samples import MediaRef, Sample
from cache.store.space import Present
from encode.download.urls import is_url
from encode.worker.local_files import Identifier, why_no_file
from encode.worker.messages import OWN_STAGES, Outcome, SourceTask, media_id
from model.media.images import Failure

OWN_ATTEMPTS = 3
"""Jobs that try a source on which our own code fails, before it counts as a known failure."""

OVERHEAD_BYTES = 156
"""Bytes of a row beside its slot: its index entry, and its lines in the commit and in the media table."""


class Mention(NamedTuple):
    """What the samples say about a source."""

    kind: str
    """image or video."""
    sha256: str | None = None
    """The sha256 of its bytes, if a data set states one."""


class MediaCounter:
    """Collects the distinct media that samples mention, in order."""

    def __init__(self) -> None:
        self.media: dict[str, Mention] = {}
        """Source -> what the samples say about it."""
        self.samples = 0
        """Number of samples."""

    def count(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield `samples`, and count each with its media."""
        for sample in samples:
            self.samples += 1
            for ref in sample.media:
                self.add(ref)
            yield sample

    def add(self, ref: MediaRef) -> None:
        """Count one mention. The first sha256 that a data set states for a source counts."""
        known = self.media.get(ref.source)
        if known is None or (known.sha256 is None and ref.sha256 is not None):
            self.media[ref.source] = Mention(sys.intern(ref.kind), ref.sha256)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The media of one job, sorted."""

    todo: tuple[SourceTask, ...] = ()
    """Sources to read, and to encode unless the space has their bytes."""
    new_rows: Mapping[str, int] = field(default_factory=dict)
    """Array -> largest number of new rows. Sources known to have equal bytes count once."""
    unread: int = 0
    """Sources to do whose number of rows is not known: their bytes may be in the space, or their video's
    duration is unknown."""
    reused: int = 0
    """Sources that are in the space already."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Subject of a note -> number of the reused sources that have it."""
    known_failures: int = 0
    """Sources that the ledger records as failed, and that have not changed since."""
    missing: tuple[MediaRecord, ...] = field(default=(), repr=False)
    """Records, for the ledger, of files that do not exist."""
    recognised: tuple[MediaRecord, ...] = field(default=(), repr=False)
    """Records, for the ledger, of new URLs whose stated sha256 is in the space. `reused` includes them."""

    @property
    def media(self) -> int:
        """Number of distinct sources."""
        return len(self.todo) + self.reused + self.known_failures + len(self.missing)

    @property
    def rows(self) -> int:
        """Largest number of new rows in all arrays together."""
        return sum(self.new_rows.values())

    @property
    def downloads(self) -> int:
        """Number of URLs among the sources to do."""
        return sum(is_url(task.source) for task in self.todo)

    def bytes_needed(self, spec: FeatureSpec) -> int:
        """Return the largest number of bytes that the new rows need on the disk."""
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
    """Sort media into those to encode and those that need no work.

    Args:
        media: source -> what the samples say about it.
        ledger: source -> its latest record.
        present: the rows of the space.
        space: the name of the space.
        max_frames: frames of one video, at most.
        rehash: read every file again, even if its identity is unchanged.
        retry_failed: try known failures again.
    """
    counter, identify = _RowCounter(present, max_frames), Identifier()
    by_key = {r.key: r for r in ledger.values() if r.status == "ok" and r.width}
    todo: list[SourceTask] = []
    missing: list[MediaRecord] = []
    recognised: list[MediaRecord] = []
    reused = known_failures = 0
    notes: Counter[str] = Counter()

    def reuse(record: MediaRecord) -> None:
        nonlocal reused
        reused += 1
        notes.update(note_subjects(record.note) if record.note else ())

    for source, mention in media.items():
        record = ledger.get(source)
        web = is_url(source)
        identity = None if web else identify(source)
        if record is not None and record.kind != mention.kind:
            record = None  # a record of an image says nothing about a video
        in_space = record is not None and present.has(record.kind, record.key, record.duration_s)
        if identity is None and not web:
            if in_space and record is not None:
                reuse(record)  # features outlive their file
            elif record is not None and record.stage == "fetch":
                known_failures += 1
            else:
                task = make_task(source, mention, record)
                blank = MediaRecord(source=source, kind=mention.kind)
                why = Failure("fetch", why_no_file(source))
                gone = Outcome(task=task, record=blank, result="failed", failure=why)
                missing.append(gone.failed_record())
            continue
        unchanged = record is not None and (
            identity is None or (not rehash and identity.matches(record))
        )
        if web and record is not None and means_other_bytes(mention.sha256, record.key):
            # The URL returned other bytes than the data set states: download them again, and verify.
            unchanged, in_space = unchanged and record.status == "failed", False
        twin = by_key.get(mention.sha256) if web and not in_space else None
        if unchanged and in_space and record is not None:
            reuse(record)
        elif twin is not None and present.has(mention.kind, twin.key, twin.duration_s):
            recognised.append(replace(twin, source=source, attempts=1))
            reuse(twin)
        elif unchanged and record is not None and _is_final(record, space) and not retry_failed:
            known_failures += 1
        else:
            known = record if unchanged else None
            todo.append(make_task(source, mention, known))
            counter.add(mention, known)
    return Plan(
        todo=spread(todo),
        new_rows=counter.rows,
        unread=counter.unread,
        reused=reused,
        notes=notes,
        known_failures=known_failures,
        missing=tuple(missing),
        recognised=tuple(recognised),
    )


class _RowCounter:
    """Counts the rows that the media to do will become, at most."""

    def __init__(self, present: Present, max_frames: int):
        self.rows: Counter[str] = Counter()
        self.unread = 0
        self._present, self._max_frames = present, max_frames
        self._keys: set[str] = set()

    def add(self, mention: Mention, known: MediaRecord | None) -> None:
        key = (known.key if known else None) or mention.sha256
        rows, exact = 1, known is not None and known.key is not None
        if mention.kind == "video":
            rows, exact = self._max_frames, False
            if known is not None and known.key is not None and known.duration_s is not None:
                views = frame_views(known.duration_s, self._max_frames)
                rows, exact = len(self._present.missing(known.key, views)), True
        self.unread += not exact
        if key is None or media_id(mention.kind, key) not in self._keys:
            self.rows[ARRAY_OF[mention.kind]] += rows
        if key is not None:
            self._keys.add(media_id(mention.kind, key))


def make_task(source: str, mention: Mention, known: MediaRecord | None) -> SourceTask:
    """Return the task for a source; `known` is its ledger record, if that is still valid."""
    return SourceTask(
        source=source,
        kind=mention.kind,
        attempts=known.attempts if known and known.status == "failed" else 0,
        sha256=mention.sha256,
        key=known.key if known and is_url(source) else None,
    )


def spread(tasks: Sequence[SourceTask]) -> tuple[SourceTask, ...]:
    """Return `tasks` with those of each web host far apart, since a host takes few requests at a time.

    Files stay in their order, since files that are adjacent on disk are read faster.
    """
    turns: Counter[str] = Counter()
    order = []
    for number, task in enumerate(tasks):
        host = urlsplit(task.source).netloc if is_url(task.source) else ""
        order.append((turns[host] if host else number, number))
        turns[host] += 1
    return tuple(tasks[number] for _, number in sorted(order))


def _is_final(record: MediaRecord, space: str) -> bool:
    """Return whether a failure is final: the media's own always, ours after OWN_ATTEMPTS and for `space`."""
    if record.status != "failed":
        return False
    if record.stage not in OWN_STAGES:
        return True
    return (record.error or "").startswith(f"{space}: ") and record.attempts >= OWN_ATTEMPTS
