"""Estimate a plan before a job starts: rows, bytes, seconds, and what bounds it.

    speed = measure_speed(encoder, spec, device)                        # encode.driver.resources
    found = probe(plan, spec, max_frames=128, download=config.download) # encode.plan.probe
    costs = estimate(plan, spec, speed, found, max_frames=128)
    print(describe(plan, spec, samples=20, free=free_bytes(folder), costs=costs))

Stages work at the same time, so the slowest one decides. Decoding shares the cores with all else that needs a
processor: with the encoder too, unless that is on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cache.format.spec import ARRAY_OF, ARRAYS, FeatureSpec
from configs.console import SPARE_TEXT, bytes_text, duration_text
from encode.download.config import DownloadConfig
from encode.plan.plan import Plan, bytes_of_rows
from encode.plan.probe import KindCost, Probe

DECODE_S = 0.015
"""Assumed where nothing was probed: processor seconds to read and decode an image of about 1 megapixel."""

SOURCE_CPU_S = 0.001
"""Processor seconds of our own code for a source: to hand it on, to reserve, record and commit it."""

ROW_BYTE_CPU_S = 1.5e-9
"""Processor seconds for a stored byte: to pack it, copy it to the host, and write it with its checksum."""

WRITE_BYTES_S = 500e6
"""Assumed: bytes a second that the disk of the cache takes."""

DISK_BYTES_S = 500e6
"""Assumed: bytes a second that a trainer reads back."""

RAY_START_S = 8.0
"""Seconds until Ray and the encoders of its workers have started."""

DECODERS_START_S = 1.0
"""Seconds until the processes that decode have started, on cores that nobody else uses."""

READERS = 16
"""Threads that read files at the same time, at most."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast this machine encodes."""

    encode_s: float
    """Seconds to encode a row, all devices together."""
    encode_cpu_s: float
    """Processor seconds for the same, all cores together."""
    cores: int
    """CPU cores that decode, and that encode if the device is a CPU."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a job will cost."""

    rows: Mapping[str, float]
    """Array -> new rows expected: without those of media that cannot be used."""
    bounds: Mapping[str, float]
    """Stage -> seconds of the job if nothing else took time."""
    start_s: float
    """Seconds before the first source: those since the command started, and those to start workers."""
    how: str
    """How the figures were obtained; printed with the estimate."""

    @property
    def bound(self) -> str:
        """Stage that bounds the job: encode, decode, read, download or write."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def work_s(self) -> float:
        """Seconds from the first source to the last."""
        return max(self.bounds.values())

    @property
    def seconds(self) -> float:
        """Seconds of the whole command."""
        return self.start_s + self.work_s


def estimate(
    plan: Plan,
    spec: FeatureSpec,
    speed: Speed,
    found: Probe,
    *,
    max_frames: int,
    download: DownloadConfig,
    start_s: float = 0.0,
) -> Estimate:
    """Combine what was measured.

    Args:
        plan: the plan.
        spec: how pixels become rows.
        speed: how fast this machine encodes.
        found: what the probed sources cost.
        max_frames: frames of one video, at most.
        download: limits of the downloads.
        start_s: seconds before the first source.
    """
    rows = expected_rows(plan, found, max_frames)
    images, videos = (found.kinds.get(kind) or KindCost() for kind in ARRAY_OF)
    image_cpu_s = images.cpu_s if images.probed else DECODE_S
    frame_cpu_s = videos.frame_cpu_s or DECODE_S
    num_images, nbytes = len(plan.todo) - plan.videos, bytes_of_rows(rows, spec)
    total = sum(rows.values())
    decode_cpu_s = (
        num_images * image_cpu_s
        + plan.videos * videos.cpu_s
        + rows.get(ARRAY_OF["video"], 0.0) * frame_cpu_s
        + len(plan.todo) * SOURCE_CPU_S
    )
    encode_cpu_s = total * speed.encode_cpu_s
    bounds = {"encode": total * speed.encode_s}
    if (web := found.downloads) is not None:
        asked = plan.downloads * (1 - found.kept)
        slots = max(1, min(download.connections, download.per_host * plan.hosts))
        busiest = plan.busiest * (1 - found.kept) / download.per_host
        bounds["download"] = web.slot_s * max(asked / slots, busiest)
        decode_cpu_s += asked * web.cpu_s
    cpu_s = decode_cpu_s + encode_cpu_s + nbytes * ROW_BYTE_CPU_S
    most = "encode" if encode_cpu_s > decode_cpu_s else "decode"
    bounds[most] = max(bounds.get(most, 0.0), cpu_s / (speed.cores * found.share))
    readers = max(2, min(READERS, speed.cores))
    read_s = num_images * images.read_s + plan.videos * videos.read_s
    bounds["read"] = read_s / readers
    bounds["write"] = nbytes / WRITE_BYTES_S
    how = [f"{speed.encode_s * 1000:.3g} ms to encode a row"]
    if images.probed and num_images:
        how.append(f"{images.cpu_s * 1000:.3g} ms of a core to read and decode an image")
    if videos.durations:
        how.append(
            f"{(videos.cpu_s * 1000):.3g} ms for a video and {videos.frame_cpu_s * 1000:.3g} ms for its frame"
        )
    if web is not None and web.probed:
        how.append(f"{web.slot_s:.2g} s of a connection to download")
    measured = f"measured on {found.probed:,} of {len(plan.todo):,} sources"
    if not found.probed:
        how.append(f"assumed: {DECODE_S * 1000:.0f} ms of a core to read and decode it")
        measured = "measured"
    return Estimate(rows=rows, bounds=bounds, start_s=start_s, how=f"{measured}: {', '.join(how)}")


def expected_rows(plan: Plan, found: Probe, max_frames: int) -> dict[str, float]:
    """Return array -> new rows expected, of media that can be used, with `max_frames` for a video at most."""
    expected = {}
    web = found.downloads
    arrives = 1.0
    if web is not None and web.probed and plan.todo:
        share = plan.downloads * (1 - found.kept) / len(plan.todo)
        arrives = 1 - share * web.failed / web.probed
    for kind, array in ARRAY_OF.items():
        if not (most := plan.new_rows.get(array, 0)):
            continue
        cost, rows = found.kinds.get(kind) or KindCost(), float(most)
        if kind == "video":
            rows = min(rows, float(plan.videos * max_frames))
            if plan.untimed and (each := cost.rows(max_frames)) is not None:
                known = most - plan.untimed * plan.max_frames
                rows = min(rows, max(0, known) + plan.untimed * each)
        expected[array] = rows * cost.usable * arrives
    return expected


def describe(
    plan: Plan,
    spec: FeatureSpec,
    *,
    samples: int,
    free: int,
    costs: Estimate | None,
    parts: int = 1,
) -> str:
    """Return the plan as it is printed before a job starts.

    Args:
        plan: the plan, of one part of the sources if there are several.
        spec: how pixels become rows.
        samples: number of samples.
        free: free bytes of the disk.
        costs: the estimate, if there is one.
        parts: number of parts; the figures are those of all parts together.
    """
    failures = plan.known_failures + len(plan.missing)
    before = f"{failures * parts} failed before" + (" or missing" if plan.missing else "")
    arrays = [array for array, rows in plan.new_rows.items() if rows] or ["image"]
    stored = "; ".join(
        f"{spec.tokens(a)} tokens x {spec.width}, {bytes_text(spec.row_bytes(a))} per {a} "
        f"({spec.codec}, pool {spec.pool(a)})"
        for a in arrays
    )
    todo = f"{len(plan.todo) * parts} to do"
    if plan.downloads:
        todo += f" ({plan.downloads * parts} to download)"
    at_most = "at most " if plan.unread else ""
    rows = {array: n * parts for array, n in plan.new_rows.items()}
    needed, frames = bytes_of_rows(rows, spec), rows.get("frame", 0)
    total = sum(rows.values())
    kinds = f": {total - frames} images, {frames} frames of videos" if frames else ", one view each"
    counted, size = f"{at_most}{total}{kinds}", f"{at_most}{bytes_text(needed)}"
    if costs is not None and sum(costs.rows.values()) < 0.99 * sum(plan.new_rows.values()):
        expected = {array: n * parts for array, n in costs.rows.items()}
        counted = f"about {sum(expected.values()):.0f}, {counted}"
        size = f"about {bytes_text(bytes_of_rows(expected, spec))}, {size}"
    lines = []
    library, _, tower = spec.architecture.partition(":")
    if library == "transformers":
        # Blocks and fit are the folder's, unless an entry says others.
        blocks = ", ".join(map(str, spec.blocks))
        side = f"{spec.image_size} x {spec.image_size}"
        lines.append(f"tower    {tower}: block {blocks} (from 0), fit: {spec.fit}, {side} pixels")
    if parts > 1:
        lines.append(
            f"parts    {parts}, one after the other, since a job plans few sources at a time; "
            f"all figures are those of the first part, times {parts}"
        )
    lines += [
        f"space    {spec.name}: {stored}",
        *tail_lines(spec),
        f"media    {plan.media * parts} in {samples} samples: {todo}, {plan.reused * parts} reused, {before}",
        f"rows     {counted}",
        f"disk     {size} needed and {SPARE_TEXT}, {bytes_text(free)} free",
    ]
    if costs is not None and plan.todo:
        seconds = costs.start_s + parts * costs.work_s
        lines.append(f"time     {about(seconds)}, bound by {costs.bound} ({costs.how})")
        lines.append(f"pays     {break_even(costs, spec)}")
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


def break_even(costs: Estimate, spec: FeatureSpec) -> str:
    """Return after how many passes over the images caching is faster than encoding in each pass."""
    live = costs.work_s
    read = bytes_of_rows(costs.rows, spec) / DISK_BYTES_S
    if live <= read:
        return "not in time: this encoder is as fast as reading its features back"
    passes = live / (live - read)
    return (
        f"from pass {int(passes) + 1} on: encoding live costs {duration_text(live)} a pass, reading back "
        f"{duration_text(read)} (at {bytes_text(int(DISK_BYTES_S))}/s, assumed)"
    )


def about(seconds: float) -> str:
    """Return an estimated duration as text."""
    return duration_text(seconds) if seconds < 1 else f"about {duration_text(seconds)}"
