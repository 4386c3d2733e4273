"""Convert an fp16 space into a space of another codec, pooling or format, without the encoder.

python -m cache.convert --codec int8                                # from the only fp16 space
python -m cache.convert --space clip --codec int4 --pool 2          # from a named one; images pooled 2 x 2
python -m cache.convert --codec fp16 --pool 2 --format webdataset

The new space has the fingerprint and the stored bytes that `encode.run` with these options creates, so
either command can continue it. This works because features are rounded to float16 before they are pooled and
packed. Sources that have lost more than that are refused: rows of a lossy codec, and rows that are already
pooled. Only rows that the new space lacks are converted, so run the command again after the source has grown,
or after it was interrupted. Damaged rows of the source are reported and skipped; the exit status is then 1.

Every core has a process that converts, of about 60 MB; the files do not depend on their number. Where each
has two thousand rows or more, numba compiles the loops: ten seconds the first time, and 160 MB for each
process. Ctrl-C commits what is converted, and stops.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cache.errors import CacheError, CorruptError, LostProcessError, command_line
from cache.format.spec import ARRAYS, FeatureSpec
from cache.maintenance.convert_rows import Conversion
from cache.maintenance.copy_rows import (
    ROW_OVERHEAD,
    copy_rows,
    damage_text,
    missing,
)
from cache.maintenance.encode_command import encode_command
from cache.store.files import disk_errors
from cache.store.index_file import save_index
from cache.store.locks import DriverLock, holder_text
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space, read_info, tail_bytes
from configs import UserError, command, load, parse
from configs.console import bytes_text, check_room
from configs.hardware import cores
from configs.progress import Meter, number_text
from configs.signals import Interrupts
from configs.text import say

WORKER_BYTES = 128 << 20
"""Bytes of the source for which another process is worth starting: half a second of work to int8."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Convert an fp16 space."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """The fp16 space to convert: its name, or the start of it; optional when there is only one."""
    codec: Literal["fp16", "int8", "int4"] = "fp16"
    """Codec of the new space."""
    pool: int | None = None
    """Average n x n patches of an image; default: as in the source."""
    frame_pool: int | None = None
    """Average n x n patches of a video frame; default: as in the source."""
    format: Literal["zarr", "webdataset"] | None = None
    """Shard format of the new space; default: as in the source."""
    workers: int | None = None
    """Processes that convert; default: one for each core, fewer for few rows."""
    plan: bool = False
    """Print what there is to do, and stop."""

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: must be 1 or more")


STOPPING = "stopping: what is converted is committed; once more to stop at once\n"


def find_source(root: CacheRoot, name: str | None) -> FeatureReader:
    """Open the named space, or the only fp16 space of a cache.

    Raises:
        UserError: there is no fp16 space, there are several and no name, or the named one is not fp16.
        CacheError: the cache has no space of that name.
    """
    command = encode_command(root, None, None, load("encoders"), codec="fp16")
    way_out = f"create one to convert from: {command}"
    if name is None and (all_names := root.space_names()):
        names = [n for n in all_names if read_info(root.space(n)).spec.codec == "fp16"]
        if not names:
            raise UserError(f"no fp16 space under {root.path}/ ({', '.join(all_names)}); {way_out}")
        if len(names) > 1:
            raise UserError(
                f"{len(names)} fp16 spaces under {root.path}/, say which: --space {' | '.join(names)}"
            )
        name = names[0]
    reader = FeatureReader(find_space(root, name))
    if reader.spec.codec != "fp16":
        raise UserError(
            f"{reader.paths.name} is stored as {reader.spec.codec}, which is lossy; {way_out}"
        )
    return reader


def target_spec(source: FeatureReader, options: Options) -> FeatureSpec:
    """Return the spec that `encode.run` with these options gives its space.

    Raises:
        UserError: the options are invalid for the source, or the rows would differ from encoded ones.
    """
    spec = source.spec
    try:
        target = replace(
            spec,
            codec=options.codec,
            pool_image=spec.pool_image if options.pool is None else options.pool,
            pool_frame=spec.pool_frame if options.frame_pool is None else options.frame_pool,
            container=options.format or spec.container,
        )
        target.row_bytes("image")  # raises for a width that the codec cannot divide into blocks
    except ValueError as error:
        raise UserError(f"{source.paths.name}: {error}") from None
    for array in ARRAYS:
        if spec.pool(array) not in (1, target.pool(array)) and source.rows(array):
            raise UserError(
                f"{source.paths.name}: its {array} rows are pooled {spec.pool(array)} x {spec.pool(array)} "
                "and rounded; pooling them again gives other values than encoding: convert a space with "
                "pool 1, or encode them"
            )
    if target.fingerprint == spec.fingerprint:
        raise UserError(
            f"{source.paths.name} has these options already; choose others: "
            "--codec, --pool, --frame-pool, --format"
        )
    return target


def target_load(source: FeatureReader, spec: FeatureSpec) -> dict[str, Any]:
    """Return how to build the encoder of the new space: that of the source with another pooling."""
    load = {**source.load, "converted_from": source.paths.name}
    # With a tail, the pooling of the encoder's entry is what training does, and no row is pooled.
    if isinstance(encoder := load.get("encoder"), Mapping) and spec.tail is None:
        pools = {"pool_image": spec.pool_image, "pool_frame": spec.pool_frame}
        load["encoder"] = {**encoder, **pools}
    return load


def convert(root: CacheRoot, source: FeatureReader, options: Options) -> list[CorruptError]:
    """Create or complete the new space, and return one error for each damaged row of the source.

    Raises:
        UserError: the options do not fit the source, or the disk is too small.
        InUseError: a job writes to the target.
        CacheError: a process that converts has ended.
        SystemExit: a signal has stopped the command; what was converted is committed.
    """
    spec = target_spec(source, options)
    paths = root.space(spec.name)
    lock = DriverLock(paths, holder_text("cache.convert"))
    with contextlib.nullcontext() if options.plan else lock:
        here = FeatureReader(paths) if paths.space_json.exists() else None
        positions = {array: missing(source, here, array) for array in ARRAYS}
        rows = sum(map(len, positions.values()))
        nbytes = sum(len(found) * spec.row_bytes(array) for array, found in positions.items())
        total = sum(map(source.rows, ARRAYS))
        size = bytes_text(nbytes)
        say(f"space    {spec.name}: {rows:,} of {total:,} rows to convert ({size})", flush=True)
        if options.plan:
            return []
        check_room(root.path, nbytes + rows * ROW_OVERHEAD, f"the space {spec.name}")
        tail = tail_bytes(source.paths, source.spec)
        space = Space.create(root, spec, target_load(source, spec), tail=tail)
        to_read = sum(len(found) * source.spec.row_bytes(a) for a, found in positions.items())
        workers = options.workers or max(1, min(cores(), to_read // WORKER_BYTES))
        damaged: list[CorruptError] = []
        seen = 0
        with Interrupts(STOPPING) as interrupts, Meter("convert", rows, text=number_text) as meter:

            def done(count: int, _nbytes: int, bound: str) -> None:
                nonlocal seen
                seen += count
                meter.add(count, bound=bound)

            try:
                for array, found in positions.items():
                    if not interrupts.stopping():
                        damaged += copy_rows(
                            source,
                            space,
                            array,
                            found,
                            conversion=Conversion.between(
                                source.spec, spec, array, len(found) / workers
                            ),
                            workers=workers,
                            fence=lock.fence,
                            done=done,
                            stop=interrupts.stopping,
                        )
            except LostProcessError as error:
                again = _command(root, source, options, max(1, workers // 2))
                raise CacheError(f"{error}; everything committed is kept: {again}") from None
        save_index(space.paths, space.info)
    say(f"converted {source.paths.name}: {seen - len(damaged):,} rows")
    if seen < rows:
        say(f"stopped: {rows - seen:,} rows are left, which the same command converts")
        raise SystemExit(interrupts.exit_code)
    return damaged


def _command(root: CacheRoot, source: FeatureReader, options: Options, workers: int) -> str:
    """Return the command that continues, with this many processes."""
    words: list[object] = ["--features", root.path, "--space", source.paths.name]
    words += ["--codec", options.codec]
    for name in ("pool", "frame_pool", "format"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name.replace('_', '-')}", value]
    return command_line("cache.convert", *words, "--workers", workers)


def main() -> int:
    """Run the command; return 1 when rows of the source are damaged, else 0."""
    options = parse(Options, prog="python -m cache.convert", description=__doc__)
    root = CacheRoot(options.features)
    source = find_source(root, options.space)
    with disk_errors(root.path):
        damaged = convert(root, source, options)
    if damaged:
        say(damage_text(damaged))
    return 1 if damaged else 0


if __name__ == "__main__":
    command(main, errors=(CacheError,))
