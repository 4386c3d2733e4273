"""Estimate a plan before a job starts: rows, bytes, seconds, and whether the disk can hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cache.format.codec import CODECS
from cache.format.spec import ARRAYS, FeatureSpec
from configs import UserError
from configs.console import SPARE_BYTES, SPARE_TEXT, bytes_text, duration_text, table_text
from encode.plan.plan import Plan

POOLS = (1, 2, 3, 4)
"""Pooling factors offered to a job that does not fit."""

DECODE_S = 0.015
"""Assumed: seconds in which one core reads and decodes an image of about 1 megapixel."""

DISK_BYTES_S = 500e6
"""Assumed: bytes a second that a trainer reads back."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine encodes."""

    encode_s: float
    """Seconds to encode an image, all GPUs together."""
    cores: int
    """CPU cores that decode."""
    shared: bool
    """Whether encoding and decoding compete for the same cores."""
    how: str
    """How the figures were obtained; printed with the estimate."""

    def seconds(self, images: int) -> float:
        """Return the seconds to read, decode and encode this number of images."""
        decode_s = DECODE_S / self.cores
        return images * (self.encode_s + decode_s if self.shared else max(self.encode_s, decode_s))


def describe(plan: Plan, spec: FeatureSpec, *, samples: int, free: int, speed: Speed | None) -> str:
    """Return the plan as it is printed before a job starts."""
    needed = plan.bytes_needed(spec)
    failures = plan.known_failures + len(plan.missing)
    before = f"{failures} failed before" + (" or missing" if plan.missing else "")
    arrays = [array for array, rows in plan.new_rows.items() if rows] or ["image"]
    stored = "; ".join(
        f"{spec.tokens(a)} tokens x {spec.width}, {bytes_text(spec.row_bytes(a))} per {a} "
        f"({spec.codec}, pool {spec.pool(a)})"
        for a in arrays
    )
    todo = f"{len(plan.todo)} to do"
    if plan.downloads:
        todo += f" ({plan.downloads} to download)"
    at_most = "at most " if plan.unread else ""
    frames = plan.new_rows.get("frame", 0)
    parts = (
        f": {plan.rows - frames} images, {frames} frames of videos" if frames else ", one view each"
    )
    lines = []
    library, _, tower = spec.architecture.partition(":")
    if (
        library == "transformers"
    ):  # whose blocks and fit are the folder's, unless an entry says others
        blocks = ", ".join(map(str, spec.blocks))
        size = f"{spec.image_size} x {spec.image_size}"
        lines.append(f"tower    {tower}: block {blocks} (from 0), fit: {spec.fit}, {size} pixels")
    lines += [
        f"space    {spec.name}: {stored}",
        *tail_lines(spec),
        f"media    {plan.media} in {samples} samples: {todo}, {plan.reused} reused, {before}",
        f"rows     {at_most}{plan.rows}{parts}",
        f"disk     {at_most}{bytes_text(needed)} needed and {SPARE_TEXT}, {bytes_text(free)} free",
    ]
    if speed is not None and plan.todo:
        total = speed.seconds(plan.rows)
        lines.append(f"time     {about(total)} ({speed.how})")
        lines.append(f"pays     {break_even(plan, spec, speed)}")
    return "\n".join(lines)


def tail_lines(spec: FeatureSpec) -> list[str]:
    """Return what training computes behind the stored block, and its price on disk; [] without a tail."""
    tail = spec.tail
    if tail is None:
        return []
    try:
        more = [f"{spec.row_bytes(a) / spec.seen.row_bytes(a):.1f}" for a in ARRAYS]
    except ValueError:  # the codec cannot store the features' width
        more = [f"{spec.tokens(a) / spec.seen.tokens(a):.1f}" for a in ARRAYS]
    what = "with CLS, " if spec.keep_cls else ""
    count, size = len(tail.numbers), bytes_text(tail.nbytes(spec.width))
    line = (
        f"tail     {count} blocks behind block {tail.first - 1}, stored once ({size}), are computed in "
        f"training; so rows are unpooled, {what}and take {more[0]} times the bytes of features for an image, "
        f"{more[1]} times for a frame"
    )
    return [line]


def break_even(plan: Plan, spec: FeatureSpec, speed: Speed) -> str:
    """Return after how many passes over the images caching is faster than encoding in each pass."""
    live = speed.seconds(plan.rows)
    read = plan.bytes_needed(spec) / DISK_BYTES_S
    if live <= read:
        return "not in time: this encoder is as fast as reading its features back"
    passes = live / (live - read)
    return (
        f"from pass {int(passes) + 1} on: encoding live costs {duration_text(live)} a pass, reading back "
        f"{duration_text(read)} (at {bytes_text(int(DISK_BYTES_S))}/s, assumed)"
    )


def check_fits(plan: Plan, spec: FeatureSpec, free: int) -> None:
    """Refuse a job that the disk cannot hold.

    Raises:
        UserError: names every codec and pooling that would fit, the largest features first.
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
        f"--codec {v.codec} --pool {v.pool_image} ({bytes_text(size)})" for size, v in fitting
    )
    needs = f"the job needs {bytes_text(plan.bytes_needed(spec))} and {SPARE_TEXT}"
    elsewhere = "put the cache elsewhere with --features DIR"
    if free <= SPARE_BYTES:  # then no choice and no limit helps
        raise UserError(f"{needs}, {bytes_text(free)} free; free some space, or {elsewhere}")
    way_out = f"what would fit: {choices}" if choices else "no codec and pooling would fit"
    raise UserError(
        f"{needs}, {bytes_text(free)} free; {way_out}; or {elsewhere}, or take fewer samples with --limit N"
    )


def table(plan: Plan, spec: FeatureSpec, free: int) -> str:
    """Return a table of the bytes by codec and pooling, with a mark where they and the spare bytes fit."""
    header = ["codec", *(f"pool={v.pool_image}" for v in variants(spec) if v.codec == CODECS[0])]
    rows = []
    for codec in CODECS:
        sizes = [plan.bytes_needed(v) for v in variants(spec) if v.codec == codec]
        fits = ["fits" if size + SPARE_BYTES <= free else "-" for size in sizes]
        cells = (f"{bytes_text(s)} {fit}" for s, fit in zip(sizes, fits, strict=True))
        rows.append([codec, *cells])
    return table_text(header, rows, right=" ".join(header[1:]))


def variants(spec: FeatureSpec) -> Sequence[FeatureSpec]:
    """Return the specs of these features in every codec and every pooling that the grid allows."""
    can_pool = not (spec.keep_cls or spec.tail)
    pools = [pool for pool in POOLS if spec.grid % pool == 0 and (pool == 1 or can_pool)]
    return [replace(spec, codec=codec, pool_image=pool) for codec in CODECS for pool in pools]


def about(seconds: float) -> str:
    """Return an estimated duration as text."""
    return duration_text(seconds) if seconds < 1 else f"about {duration_text(seconds)}"
