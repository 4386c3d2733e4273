"""What a job has to do, and what that costs: counted before anything is started.

A source is *reused* when the ledger knows its key, its file is still the one that was hashed, and the
space has the row; a *known failure* when the ledger says so of that same file. Everything else is *to do*.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cache.codec import CODECS
from cache.spec import FeatureSpec
from cache.tables import MediaRecord, MediaRef, Sample
from configs import UserError
from encode.local import failed, identify
from encode.tasks import OWN_STAGES, SourceTask

OWN_ATTEMPTS = 3
"""A picture our own code failed on is tried again by this many jobs."""

OVERHEAD_BYTES = 160
"""Beside a row: its checksum and index entry, its line in the commit and in the media table."""

SPARE_BYTES = 64 << 20
"""What must stay free on the disk: tables, logs, and everybody else's."""

POOLS = (1, 2, 3, 4)
DECODE_S = 0.015
"""Assumed: one picture of about 1 megapixel read and decoded by one core."""
DISK_BYTES_S = 500e6
"""Assumed: how fast a trainer reads rows back."""


class MediaCounter:
    """Passes samples through, and remembers the distinct media they mention, in order."""

    def __init__(self) -> None:
        self.media: dict[str, str] = {}
        """source -> kind."""
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
        """Count one mention."""
        self.media.setdefault(ref.source, ref.kind)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The media of one job, sorted by what is to happen to them."""

    todo: tuple[SourceTask, ...] = ()
    """To read, and to encode unless the bytes turn out to be known."""
    new_keys: int = 0
    """Rows at most: of the media to do, those not known to share their bytes."""
    unread: int = 0
    """Media to do whose key is not known yet."""
    reused: int = 0
    """In the space already."""
    known_failures: int = 0
    """In the ledger as failed, and unchanged since."""
    missing: tuple[MediaRecord, ...] = field(default=(), repr=False)
    """Newly found to be no file: for the ledger."""

    @property
    def media(self) -> int:
        """All of them."""
        return len(self.todo) + self.reused + self.known_failures + len(self.missing)

    def bytes_needed(self, spec: FeatureSpec) -> int:
        """On the disk, at most."""
        return self.new_keys * (spec.row_bytes("picture") + OVERHEAD_BYTES)


def make_plan(
    media: Mapping[str, str],
    ledger: Mapping[str, MediaRecord],
    present: Collection[str],
    *,
    space: str,
    rehash: bool = False,
) -> Plan:
    """Sort media by what is to happen to them.

    Args:
        media: source -> kind.
        ledger: source -> what is known of it.
        present: keys in the space.
        space: its name.
        rehash: read every file again, whatever its stamps say.
    """
    todo: list[SourceTask] = []
    missing: list[MediaRecord] = []
    keys: set[str] = set()
    reused = known_failures = unread = 0
    for source, kind in media.items():
        record = ledger.get(source)
        identity = identify(source)
        if identity is None:
            if record is not None and record.key in present:
                reused += 1  # the file is gone, its features are here
            elif record is not None and record.stage == "fetch":
                known_failures += 1
            else:
                missing.append(_missing(source, kind, record))
            continue
        same = record is not None and not rehash and identity.matches(record)
        if record is not None and same and record.key in present:
            reused += 1
        elif record is not None and same and _given_up(record, space):
            known_failures += 1
        else:
            attempts = record.attempts if record and same and record.status == "failed" else 0
            todo.append(SourceTask(source=source, kind=kind, attempts=attempts))
            if record is not None and same and record.key is not None:
                keys.add(record.key)
            else:
                unread += 1
    return Plan(
        todo=tuple(todo),
        new_keys=len(keys) + unread,
        unread=unread,
        reused=reused,
        known_failures=known_failures,
        missing=tuple(missing),
    )


def _missing(source: str, kind: str, record: MediaRecord | None) -> MediaRecord:
    attempts = record.attempts if record and record.status == "failed" else 0
    blank = MediaRecord(source=source, kind=kind)
    return failed(blank, attempts, "fetch", "no such file")


def _given_up(record: MediaRecord, space: str) -> bool:
    """Whether a failure stands: the media's own always, ours after a few jobs, and for this space only."""
    if record.status != "failed":
        return False
    if record.stage not in OWN_STAGES:
        return True
    return (record.error or "").startswith(f"{space}: ") and record.attempts >= OWN_ATTEMPTS


# ---- what it costs


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine encodes."""

    batch_s: float
    """Seconds one batch takes, on one device or on all cores."""
    batch_size: int
    """Pictures in it."""
    devices: int
    """GPUs that work side by side; 1 on a CPU."""
    cores: int
    """CPU cores that decode."""
    shared: bool
    """Whether encoding and decoding compete for the same cores."""
    how: str
    """Where the figure comes from, for the reader."""

    def seconds(self, pictures: int) -> float:
        """How long a number of pictures takes, reading and decoding included."""
        encode = self.batch_s / self.batch_size / self.devices
        decode = DECODE_S / self.cores
        return pictures * (encode + decode if self.shared else max(encode, decode))


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds, or will hold, `folder`."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def describe(plan: Plan, spec: FeatureSpec, *, samples: int, free: int, speed: Speed | None) -> str:
    """The plan as it is printed before a job starts."""
    needed = plan.bytes_needed(spec)
    failures = plan.known_failures + len(plan.missing)
    before = f"{failures} failed before" + (" or missing" if plan.missing else "")
    stored = (
        f"{size_text(spec.row_bytes('picture'))} a picture ({spec.codec}, pool {spec.pool_picture})"
    )
    lines = [
        f"space    {spec.name}: {spec.tokens('picture')} tokens x {spec.width}, {stored}",
        f"media    {plan.media} in {samples} samples: {len(plan.todo)} to do, {plan.reused} reused, {before}",
        f"rows     {_at_most(plan)}{plan.new_keys}, one view each",
        f"disk     {_at_most(plan)}{size_text(needed)} needed, {size_text(free)} free",
    ]
    if speed is not None and plan.todo:
        total = speed.seconds(plan.new_keys)
        lines.append(f"time     {about(total)} ({speed.how})")
        lines.append(f"pays     {break_even(plan, spec, speed)}")
    return "\n".join(lines)


def _at_most(plan: Plan) -> str:
    return "at most " if plan.unread else ""


def break_even(plan: Plan, spec: FeatureSpec, speed: Speed) -> str:
    """After how many passes over the pictures caching is cheaper than encoding anew each time."""
    live = speed.seconds(plan.new_keys)
    read = plan.bytes_needed(spec) / DISK_BYTES_S
    if live <= read:
        return "not in time: this encoder is as fast as reading its features back"
    passes = live / (live - read)
    return (
        f"from pass {int(passes) + 1} on: encoding live costs {time_text(live)} a pass, reading back "
        f"{time_text(read)} (at {size_text(int(DISK_BYTES_S))}/s, assumed)"
    )


def check_fits(plan: Plan, spec: FeatureSpec, free: int) -> None:
    """Refuse a job the disk cannot hold, with what it could.

    Raises:
        UserError: names the codec and pooling of the best features that fit, and all that do.
    """
    if plan.bytes_needed(spec) + SPARE_BYTES <= free or not plan.todo:
        return
    fitting = [
        (size, variant)
        for variant in variants(spec)
        if (size := plan.bytes_needed(variant)) + SPARE_BYTES <= free
    ]
    fitting.sort(key=lambda pair: -pair[0])
    choices = ", ".join(
        f"--codec {v.codec} --pool {v.pool_picture} ({size_text(size)})" for size, v in fitting
    )
    way_out = f"what would fit: {choices}" if choices else "no codec and pooling would fit"
    raise UserError(
        f"the job needs {size_text(plan.bytes_needed(spec))}, {size_text(free)} free; {way_out}; or put "
        "the cache elsewhere with --features DIR, or take fewer samples with --limit N"
    )


def table(plan: Plan, spec: FeatureSpec, free: int) -> str:
    """Bytes by codec and pooling, what fits marked: printed with a refusal."""
    rows = variants(spec)
    pools = sorted({v.pool_picture for v in rows})
    lines = ["codec   " + "".join(f"{f'pool {pool}':>14}" for pool in pools)]
    for codec in CODECS:
        cells = []
        for variant in (v for v in rows if v.codec == codec):
            size = plan.bytes_needed(variant)
            fits = "fits" if size + SPARE_BYTES <= free else "-"
            cells.append(f"{size_text(size) + ' ' + fits:>14}")
        lines.append(f"{codec:<8}" + "".join(cells))
    return "\n".join(lines)


def variants(spec: FeatureSpec) -> Sequence[FeatureSpec]:
    """The same features under every codec and every pooling the grid allows."""
    pools = [pool for pool in POOLS if spec.grid % pool == 0 and (pool == 1 or not spec.keep_cls)]
    return [replace(spec, codec=codec, pool_picture=pool) for codec in CODECS for pool in pools]


def size_text(size: float) -> str:
    """Bytes for people, in powers of ten as disks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def about(seconds: float) -> str:
    """An estimate for people."""
    return time_text(seconds) if seconds < 1 else f"about {time_text(seconds)}"


def time_text(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 1:
        return "under a second"
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.1f} days"
