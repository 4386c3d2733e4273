"""Sort the media of a job before it starts: reused, failed before, missing, or to encode.

A source is *reused* if its file is still the one that was hashed and the space has all rows of that hash. It
is a *known failure* if the ledger records a failure of that same file. A URL is assumed to return the bytes
that it returned before. All other sources are *to do*.

Everything is columns, since a job may have ten million sources: at most 1 GB and two minutes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from cache.format.frame_sampling import MAX_FRAMES
from cache.format.space_info import slot_bytes
from cache.format.spec import ARRAY_OF, FeatureSpec
from cache.store.ledger import MediaRecord, note_subjects, records_of
from cache.store.space import Present
from encode.download.urls import is_url
from encode.plan.known import Known, stamp_of
from encode.plan.media import KINDS, Media
from encode.plan.numbering import AT_ONCE, Ints, Mask
from encode.plan.tasks import Hosts, MissingFiles, Recognised, Tasks, spread
from encode.worker.local_files import Identifier, Identity
from encode.worker.messages import SourceTask

WORTH_INPUTS = 500
"""Encoder inputs from which on a job resizes by compiled loops. They save 8 ms of a core each; to load them
takes all processes together 2 s of a core (docs/BENCHMARKS.md)."""
FRAMES_A_VIDEO = 16
"""Encoder inputs for which a video counts there."""

OVERHEAD_BYTES = 156
"""Bytes of a row beside its slot: its index entry, and its lines in the commit and in the media table."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The media of one job, sorted."""

    todo: Sequence[SourceTask] = ()
    """Sources to read, and to encode unless the space has their bytes."""
    new_rows: Mapping[str, int] = field(default_factory=dict)
    """Array -> largest number of new rows. Sources known to have equal bytes count once."""
    unread: int = 0
    """Sources to do whose number of rows is not known: their bytes may be in the space, or their video's
    duration is unknown."""
    videos: int = 0
    """Videos among the sources to do."""
    untimed: int = 0
    """Videos to do whose duration is not known. `new_rows` has `max_frames` for each."""
    max_frames: int = MAX_FRAMES
    """Frames of one video, at most."""
    downloads: int = 0
    """URLs among the sources to do."""
    hosts: int = 0
    """Hosts of these."""
    busiest: int = 0
    """URLs to do of the host that has most."""
    reused: int = 0
    """Sources that are in the space already."""
    notes: Mapping[str, int] = field(default_factory=dict)
    """Subject of a note -> number of the reused sources that have it."""
    known_failures: int = 0
    """Sources that the ledger records as failed, and that have not changed since."""
    missing: Sequence[MediaRecord] = field(default=(), repr=False)
    """Records, for the ledger, of files that do not exist."""
    recognised: Sequence[MediaRecord] = field(default=(), repr=False)
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
    def compiles(self) -> bool:
        """Whether there is so much to resize that compiled loops are worth it."""
        return len(self.todo) + (FRAMES_A_VIDEO - 1) * self.videos >= WORTH_INPUTS

    def bytes_needed(self, spec: FeatureSpec) -> int:
        """Return the largest number of bytes that the new rows need on the disk."""
        return bytes_of_rows(self.new_rows, spec)


def bytes_of_rows(rows: Mapping[str, float], spec: FeatureSpec) -> int:
    """Return the bytes that rows (array -> number) take on the disk."""
    return round(sum(n * (slot_bytes(spec, a) + OVERHEAD_BYTES) for a, n in rows.items()))


def make_plan(
    media: Media,
    ledger: Iterable[pa.Table],
    present: Present,
    *,
    space: str,
    max_frames: int = MAX_FRAMES,
    rehash: bool = False,
    retry_failed: bool = False,
) -> Plan:
    """Sort media into those to encode and those that need no work.

    Args:
        media: what the samples mention. Its numbers are forgotten: they take a quarter of the memory.
        ledger: rows of the media table, later ones behind: `cache.store.ledger.MediaRows`. It is read again
            where URLs are recognised by their stated hash.
        present: the rows of the space.
        space: the name of the space.
        max_frames: frames of one video, at most.
        rehash: read every file again, even if its identity is unchanged.
        retry_failed: try known failures again.
    """
    known = Known(media, present, space=space, max_frames=max_frames)
    for table in ledger:
        known.read(table)
    media.forget_numbers()
    stamps, hosts = _identify(media)
    state = np.empty(len(media), np.uint8)
    unchanged = np.empty(len(media), bool)
    for start in range(0, len(media), SORTED_AT_ONCE):
        part = slice(start, start + SORTED_AT_ONCE)
        state[part], unchanged[part] = _sort(
            known.part(part.start, part.stop),
            stamps[part],
            hosts[part] >= 0,
            rehash=rehash,
            retry_failed=retry_failed,
        )
    del stamps
    unused = (state == FAILED) | (state == TODO)
    candidates = np.flatnonzero(unused & (hosts >= 0) & media.stated)
    recognised, twins = _recognise(media, candidates, ledger, present)
    state[recognised] = RECOGNISED
    del unused, candidates

    notes = Counter(known.subjects(np.flatnonzero(state == REUSED)))
    for record in (twins[media.mention(i)] for i in recognised.tolist()):  # type: ignore[index]
        notes.update(note_subjects(record.note) if record.note else ())
    todo = np.flatnonzero(state == TODO)
    new_rows, unread, untimed = _count_rows(media, known, todo, unchanged[todo], max_frames)
    todo_hosts = hosts[todo]
    of_host = np.bincount(todo_hosts[todo_hosts >= 0], minlength=1)
    todo = todo[spread(todo_hosts)]
    del todo_hosts
    gone = np.flatnonzero(state == MISSING)
    counts = np.bincount(state, minlength=len(STATES))
    return Plan(
        todo=Tasks(media, known, todo, unchanged=unchanged[todo], web=hosts[todo] >= 0),
        new_rows=new_rows,
        unread=unread,
        videos=int((media.kinds[todo] == KINDS.index("video")).sum()),
        untimed=untimed,
        max_frames=max_frames,
        downloads=int(of_host.sum()),
        hosts=int((of_host > 0).sum()),
        busiest=int(of_host.max()),
        reused=int(counts[REUSED] + counts[RECOGNISED]),
        notes=notes,
        known_failures=int(counts[FAILED]),
        missing=MissingFiles(media, gone, np.where(known.here, known.attempts, 0)[gone]),
        recognised=Recognised(media, recognised, twins),
    )


SORTED_AT_ONCE = 1 << 20
"""Sources that are sorted together: it bounds the memory of the columns between."""

STATES = TODO, REUSED, FAILED, MISSING, RECOGNISED = range(5)
"""What becomes of a source."""


def _sort(
    known: Known, stamps: npt.NDArray[np.uint64], web: Mask, *, rehash: bool, retry_failed: bool
) -> tuple[npt.NDArray[np.uint8], Mask]:
    """Sort sources (k,) by what is known of them.

    Args:
        known: what the ledger says about them.
        stamps: identity of each file now; 0: there is none.
        web: whether each is a URL.
        rehash: as of `make_plan`.
        retry_failed: as of `make_plan`.

    Returns:
        the state of each, and whether what the ledger says is still valid.
    """
    gone = ~web & (stamps == 0)
    here, in_space = known.here, known.in_space
    unchanged = here & (web | ((stamps == known.stamps) & (not rehash)))
    # The URL returned other bytes than the data set states: download them again, and verify.
    other_bytes = web & here & known.differs
    unchanged &= ~other_bytes | known.failed
    in_space &= ~other_bytes
    state = np.full(len(web), TODO, np.uint8)
    state[gone] = MISSING
    state[gone & here & known.failed_at_fetch] = FAILED
    if not retry_failed:
        state[~gone & unchanged & known.final] = FAILED
    state[in_space & (gone | unchanged)] = REUSED  # features outlive their file
    return state, unchanged


def _identify(media: Media) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    """Return the identity (n,) of each file, 0 where there is none, and the host (n,) of each URL, or -1."""
    stamps = np.zeros(len(media), np.uint64)
    host_of = np.full(len(media), -1, np.int32)
    identify, hosts = Identifier(), Hosts()
    at, places, found = 0, list[int](), list[tuple[int, ...]]()

    def stamp() -> None:
        if found:
            stamps[places] = stamp_of(np.array(found, np.uint64))
            places.clear()
            found.clear()

    for block in media.sources.blocks():
        for source in block:
            if is_url(source):
                host_of[at] = hosts.number(source)
            elif (identity := identify(source)) is not None:
                places.append(at)
                found.append(_numbers(identity))
            at += 1
        if len(found) > AT_ONCE:
            stamp()
    stamp()
    return stamps, host_of


def _numbers(identity: Identity) -> tuple[int, ...]:
    return tuple(value % 2**64 for value in identity)


def _recognise(
    media: Media, candidates: Ints, ledger: Iterable[pa.Table], present: Present
) -> tuple[Ints, dict[tuple[str, str], MediaRecord]]:
    """Find URLs whose bytes are in the space, from other sources.

    Args:
        media: all sources.
        candidates: URLs with a stated hash that are not known to be in the space.
        ledger: rows of the media table.
        present: the rows of the space.

    Returns:
        those that are in the space, and (kind, sha256) -> a record of the same bytes.
    """
    video = media.kinds[candidates] == KINDS.index("video")
    keep = np.full(len(candidates), present.has_frames)
    for start in range(0, len(candidates), AT_ONCE):
        images = start + np.flatnonzero(~video[start : start + AT_ONCE])
        keep[images] = present.have_images(media.keys(candidates[images]))
    candidates = candidates[keep]
    if not len(candidates):
        return candidates, {}
    wanted = {media.mention(i) for i in candidates.tolist()}
    hexes = pa.array(sorted({sha256 for _, sha256 in wanted if sha256}))
    twins: dict[tuple[str, str], MediaRecord] = {}
    for table in ledger:
        fits = pc.and_(pc.equal(table["status"], "ok"), pc.greater(table["width"], 0))
        for record in records_of(table.filter(pc.and_(fits, pc.is_in(table["key"], hexes)))):
            assert record.key is not None, "it is in `hexes`"
            if present.has(record.kind, record.key, record.duration_s):
                twins[record.kind, record.key] = record
    found = [i for i in candidates.tolist() if media.mention(i) in twins]
    return np.array(found, np.int64), twins


def _count_rows(
    media: Media, known: Known, todo: Ints, unchanged: Mask, max_frames: int
) -> tuple[dict[str, int], int, int]:
    """Count the rows that the sources to do will become, at most.

    Returns:
        array -> rows, with sources known to have equal bytes counted once; how many of the sources have a
        number of rows that is not known; and how many of these are videos of unknown length.
    """
    video = media.kinds[todo] == KINDS.index("video")
    keyed = unchanged & known.keyed[todo]
    timed = video & keyed & known.timed[todo]
    rows = np.where(video, np.int32(max_frames), np.int32(1))
    rows[timed] = known.new_rows[todo[timed]]
    unread = int((~keyed | video & ~timed).sum())
    # 8 bytes of a key are enough to count with, and one bit tells the kinds apart.
    stated = media.stated[todo] & ~(keyed & known.differs[todo])
    again = np.zeros(len(todo), bool)  # whether a source before it has the same bytes
    places, heads = [], []
    for where, keys in ((stated, media.keys), (keyed & ~media.stated[todo], known.keys)):
        at = np.flatnonzero(where)
        for start in range(0, len(at), AT_ONCE):
            some = at[start : start + AT_ONCE]
            head = np.ascontiguousarray(keys(todo[some])[:, :8]).view(np.uint64).ravel()
            places.append(some)
            heads.append(head << np.uint64(1) | video[some].astype(np.uint64))
    if places:
        at = np.concatenate(places)
        order = np.argsort(at)
        first = np.unique(np.concatenate(heads)[order], return_index=True)[1]
        again[at] = True
        again[at[order[first]]] = False
    counted = {}
    for kind, of_kind in (("image", ~video & ~again), ("video", video & ~again)):
        if of_kind.any():
            counted[ARRAY_OF[kind]] = int(rows[of_kind].sum(dtype=np.int64))
    return counted, unread, int((video & ~timed).sum())
