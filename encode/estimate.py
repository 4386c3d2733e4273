"""What a plan costs: rows, bytes, seconds, and whether the disk can hold it. Told before a job starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cache.format.spec import CODECS, FeatureSpec
from configs import UserError
from encode.plan import Plan

SPARE_BYTES = 64 << 20
"""What must stay free on the disk: tables, logs, and everybody else's."""

POOLS = (1, 2, 3, 4)
DECODE_S = 0.015
"""Assumed: one image of about 1 megapixel read and decoded by one core."""
DISK_BYTES_S = 500e6
"""Assumed: how fast a trainer reads rows back."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine encodes."""

    batch_s: float
    """Seconds one batch takes, on one device or on all cores."""
    batch_size: int
    """Images in it."""
    devices: int
    """GPUs that work side by side; 1 on a CPU."""
    cores: int
    """CPU cores that decode."""
    shared: bool
    """Whether encoding and decoding compete for the same cores."""
    how: str
    """Where the figure comes from, for the reader."""

    def seconds(self, images: int) -> float:
        """How long a number of images takes, reading and decoding included."""
        encode = self.batch_s / self.batch_size / self.devices
        decode = DECODE_S / self.cores
        return images * (encode + decode if self.shared else max(encode, decode))


def describe(plan: Plan, spec: FeatureSpec, *, samples: int, free: int, speed: Speed | None) -> str:
    """The plan as it is printed before a job starts."""
    needed = plan.bytes_needed(spec)
    failures = plan.known_failures + len(plan.missing)
    before = f"{failures} failed before" + (" or missing" if plan.missing else "")
    arrays = [array for array, rows in plan.new_rows.items() if rows] or ["image"]
    stored = "; ".join(
        f"{spec.tokens(a)} tokens x {spec.width}, {size_text(spec.row_bytes(a))} per {a} "
        f"({spec.codec}, pool {spec.pool(a)})"
        for a in arrays
    )
    todo = f"{len(plan.todo)} to do"
    if plan.downloads:
        todo += f" ({plan.downloads} to download)"
    lines = [
        f"space    {spec.name}: {stored}",
        f"media    {plan.media} in {samples} samples: {todo}, {plan.reused} reused, {before}",
        f"rows     {_at_most(plan)}{_rows_text(plan)}",
        f"disk     {_at_most(plan)}{size_text(needed)} needed, {size_text(free)} free",
    ]
    if speed is not None and plan.todo:
        total = speed.seconds(plan.rows)
        lines.append(f"time     {about(total)} ({speed.how})")
        lines.append(f"pays     {break_even(plan, spec, speed)}")
    return "\n".join(lines)


def _rows_text(plan: Plan) -> str:
    images, frames = (plan.new_rows.get(array, 0) for array in ("image", "frame"))
    if not frames:
        return f"{images}, one view each"
    return f"{images + frames}: {images} images, {frames} frames of videos"


def _at_most(plan: Plan) -> str:
    return "at most " if plan.unread else ""


def break_even(plan: Plan, spec: FeatureSpec, speed: Speed) -> str:
    """After how many passes over the images caching is cheaper than encoding anew each time."""
    live = speed.seconds(plan.rows)
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
        f"--codec {v.codec} --pool {v.pool_image} ({size_text(size)})" for size, v in fitting
    )
    way_out = f"what would fit: {choices}" if choices else "no codec and pooling would fit"
    raise UserError(
        f"the job needs {size_text(plan.bytes_needed(spec))}, {size_text(free)} free; {way_out}; or put "
        "the cache elsewhere with --features DIR, or take fewer samples with --limit N"
    )


def table(plan: Plan, spec: FeatureSpec, free: int) -> str:
    """Bytes by codec and pooling, what fits marked: printed with a refusal."""
    rows = variants(spec)
    pools = sorted({v.pool_image for v in rows})
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
    return [replace(spec, codec=codec, pool_image=pool) for codec in CODECS for pool in pools]


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
