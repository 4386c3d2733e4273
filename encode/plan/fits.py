"""Whether a plan fits on the disk of the cache, and otherwise the command that does.

check_fits(plan, spec, free_bytes(folder), command=command, samples=20, max_frames=128)
print(table(plan, spec, free_bytes(folder)))            # bytes by codec and pooling
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from cache.format.codec import CODECS
from cache.format.spec import FeatureSpec
from configs import UserError
from configs.command_line import CommandLine
from configs.console import SPARE_BYTES, SPARE_TEXT, bytes_text, table_text
from encode.plan.estimate import expected_rows
from encode.plan.plan import Plan, bytes_of_rows
from encode.plan.probe import Probe

POOLS = (1, 2, 3, 4)
"""Pooling factors offered to a job that does not fit."""

LEAST_FRAMES = 8
"""Frames of a video that are offered to a job that does not fit, at least."""

SAMPLE_SHARE = 0.9
"""Share of the free bytes that samples chosen at random are to fill."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Another way to encode the same media."""

    nbytes: int
    """Bytes that it needs."""
    options: Mapping[str, object]
    """Options of the command that differ -> their values."""


def check_fits(
    plan: Plan,
    spec: FeatureSpec,
    free: int,
    *,
    command: CommandLine,
    samples: int,
    max_frames: int,
    datasets: int = 1,
    found: Probe | None = None,
    parts: int = 1,
) -> None:
    """Refuse a job that the disk cannot hold.

    Args:
        plan: the plan, of one part of the sources if there are several.
        spec: how pixels become rows.
        free: free bytes of the disk.
        command: the user's.
        samples: number of samples.
        max_frames: frames of one video, at most.
        datasets: number of data sets.
        found: what was probed; None: the job needs what its media need at most.
        parts: number of parts.

    Raises:
        UserError: it ends with a command that fits: with the fewest changes, and of these with the largest
            features.
    """
    found = found or Probe()
    needed = parts * bytes_of_rows(expected_rows(plan, found, max_frames), spec)
    if needed + SPARE_BYTES <= free or not plan.todo:
        return
    needs = f"the job needs {bytes_text(needed)} and {SPARE_TEXT}, {bytes_text(free)} free"
    elsewhere = "put the cache elsewhere with --features DIR"
    if free <= SPARE_BYTES:  # then no choice and no limit helps
        raise UserError(f"{needs}; free some space, or {elsewhere}")
    room = (free - SPARE_BYTES) // parts
    fitting = [c for c in choices(plan, spec, found, max_frames) if c.nbytes <= room]
    if fitting:
        best = min(fitting, key=lambda choice: (len(choice.options), -choice.nbytes))
        way, nbytes, options = "this fits", best.nbytes * parts, dict(best.options)
    else:
        most = int(samples * room * parts / needed * SAMPLE_SHARE / datasets)
        if not most:
            raise UserError(f"{needs}; not one sample fits; {elsewhere}")
        way, nbytes = "no codec and pooling fits; a part of the samples does", room * parts
        options = {"limit": None, "sample": most}
    raise UserError(
        f"{needs}; {elsewhere}; or {way} ({bytes_text(nbytes)}): {command.text(**options).lstrip()}"
    )


def choices(plan: Plan, spec: FeatureSpec, found: Probe, max_frames: int) -> Iterator[Choice]:
    """Yield other ways to encode the media of a plan: another codec, more pooling, fewer frames."""
    rows = {array for array, n in plan.new_rows.items() if n}
    pools = pools_of(spec)
    images = [pool for pool in pools if pool >= spec.pool_image] if "image" in rows else []
    in_frame = [pool for pool in pools if pool >= spec.pool_frame] if "frame" in rows else []
    fewer = [max_frames] if "frame" in rows else []
    while fewer and fewer[-1] // 2 >= LEAST_FRAMES:
        fewer.append(fewer[-1] // 2)
    for codec, image, frame, most in product(
        CODECS, images or [spec.pool_image], in_frame or [spec.pool_frame], fewer or [max_frames]
    ):
        other = replace(spec, codec=codec, pool_image=image, pool_frame=frame)
        options = {
            "codec": codec if codec != spec.codec else None,
            "pool": image if image != spec.pool_image else None,
            "frame_pool": frame if frame != spec.pool_frame else None,
            "max_frames": most if most != max_frames else None,
        }
        changed = {name: value for name, value in options.items() if value is not None}
        yield Choice(nbytes=bytes_of_rows(expected_rows(plan, found, most), other), options=changed)


def pools_of(spec: FeatureSpec) -> list[int]:
    """Return the pooling that the grid of a spec allows."""
    can_pool = not (spec.keep_cls or spec.tail)
    return [pool for pool in POOLS if spec.grid % pool == 0 and (pool == 1 or can_pool)]


def table(rows: Mapping[str, float], spec: FeatureSpec, free: int) -> str:
    """Return a table of the bytes by codec and pooling, with a mark where they and the spare bytes fit.

    Args:
        rows: array -> new rows.
        spec: how pixels become rows.
        free: free bytes of the disk.
    """
    header = ["codec", *(f"pool={v.pool_image}" for v in variants(spec) if v.codec == CODECS[0])]
    lines = []
    for codec in CODECS:
        sizes = [bytes_of_rows(rows, v) for v in variants(spec) if v.codec == codec]
        fits = ["fits" if size + SPARE_BYTES <= free else "-" for size in sizes]
        cells = (f"{bytes_text(s)} {fit}" for s, fit in zip(sizes, fits, strict=True))
        lines.append([codec, *cells])
    return table_text(header, lines, right=" ".join(header[1:]))


def variants(spec: FeatureSpec) -> Sequence[FeatureSpec]:
    """Return the specs of these features in every codec and every pooling that the grid allows."""
    return [replace(spec, codec=c, pool_image=pool) for c in CODECS for pool in pools_of(spec)]
