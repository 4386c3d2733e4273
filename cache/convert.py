"""Make another space of a float16 one, without the encoder: what encoding that way would have made.

python -m cache.convert --codec int8                                # of the only fp16 space here
python -m cache.convert --space clip --codec int4 --pool 2          # of that one; images pooled 2 x 2
python -m cache.convert --codec fp16 --pool 2 --format webdataset

The new space has the fingerprint that `encode.run` with these options gives, and the same stored bytes, so
either may go on with it. That holds because features are rounded to float16 before they are pooled and
packed; what rounding has changed otherwise is refused: rows of a lossy codec, rows pooled already. Only rows
that are not there yet are converted: run it again when the first space has grown. Killed, the same command
goes on. Exit 1: rows of the source were damaged; they are told, never converted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cache.errors import CorruptError
from cache.format import codec
from cache.format.spec import ARRAYS, FeatureSpec
from cache.maintenance.copy_rows import (
    ROW_OVERHEAD,
    Change,
    Rows,
    check_room,
    copy_rows,
    damage_text,
    full_disk_is_said,
    holder,
    missing,
)
from cache.store.index_file import save_index
from cache.store.locks import DriverLock
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space, read_info
from configs import UserError, command, parse
from configs.console import Meter, bytes_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Make another space of a float16 one."""

    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """The fp16 space to convert: its name, or how it begins; not needed where there is one."""
    codec: Literal["fp16", "int8", "int4"] = "fp16"
    """How rows of the new space are stored."""
    pool: int | None = None
    """Average n x n patches of an image; as in the source when not given."""
    frame_pool: int | None = None
    """The same for frames of videos."""
    format: Literal["zarr", "webdataset"] | None = None
    """What the new space's shards are; as in the source when not given."""
    plan: bool = False
    """Say what there is to do, and stop."""


def find_source(root: CacheRoot, name: str | None) -> FeatureReader:
    """The space to convert: the one named, or the only fp16 one.

    Raises:
        UserError: there is none, or there are several; or its codec has lost what it would take.
    """
    way_out = f"make one to convert from: python -m encode.run --codec fp16 --features {root.path}"
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
            f"{reader.paths.name} is stored as {reader.spec.codec}, which has lost what encoding starts "
            f"from; {way_out}"
        )
    return reader


def target_spec(source: FeatureReader, options: Options) -> FeatureSpec:
    """The spec that encoding with these options has.

    Raises:
        UserError: no such space can be, or it would not be identical to encoding it.
    """
    spec = source.spec
    pools = {"image": options.pool, "frame": options.frame_pool}
    new = {array: spec.pool(array) if given is None else given for array, given in pools.items()}
    try:
        target = replace(
            spec,
            codec=options.codec,
            pool_image=new["image"],
            pool_frame=new["frame"],
            container=options.format or spec.container,
            packed_from="float16",
        )
        target.row_bytes("image")  # refuses a width the codec cannot divide
    except ValueError as error:
        raise UserError(f"{source.paths.name}: {error}") from None
    for array in ARRAYS:
        if spec.pool(array) == 1 or not source.rows(array):
            continue
        if new[array] != spec.pool(array):
            raise UserError(
                f"{source.paths.name}: its {array} rows are pooled {spec.pool(array)} x {spec.pool(array)} "
                "and rounded; pooled again they would not be what encoding makes: convert a space with "
                "pool 1, or encode them"
            )
        if spec.packed_from != "float16":
            raise UserError(
                f"{source.paths.name}: its {array} rows were pooled before they were rounded, by an older "
                "version; encoding does not make them so any more: encode them again"
            )
    if target.fingerprint == spec.fingerprint:
        raise UserError(
            f"{source.paths.name} is that already; say what to make: --codec, --pool, --frame-pool, --format"
        )
    return target


def target_load(load: Mapping[str, Any], spec: FeatureSpec, source: str) -> dict[str, Any]:
    """How the encoder of the new space is built: as that of the source, but for the pooling."""
    new = {**load, "converted_from": source}
    if isinstance(load.get("encoder"), Mapping):
        pools = {"pool_image": spec.pool_image, "pool_frame": spec.pool_frame}
        new["encoder"] = {**load["encoder"], **pools}
    return new


def converter(source: FeatureSpec, target: FeatureSpec, array: str) -> Change:
    """What turns stored rows of `source` into those of `target`."""
    window = target.pool(array) // source.pool(array)
    shape = source.tokens(array), source.width
    tokens = target.tokens(array)

    def change(rows: Rows) -> tuple[Rows, npt.NDArray[np.float32]]:
        """A row at a time: its values stay in the processor's cache."""
        packed = np.empty((len(rows), target.row_bytes(array)), np.uint8)
        errors = np.empty(len(rows), np.float32)
        for i, row in enumerate(rows):
            halves = codec.unpack(row, "fp16", *shape)
            features = pool(halves, window) if window > 1 else halves.astype(np.float32)
            packed[i] = codec.pack(features, target.layout)
            back = codec.unpack(packed[i], target.layout, tokens, target.width)
            errors[i] = relative_error(features, back)
        return packed, errors

    return change


def relative_error(features: npt.NDArray[np.float32], back: npt.NDArray[np.float16]) -> float:
    """|back - features| / |features|; 0 for a row of zeros."""
    norm = float(np.linalg.norm(features))
    return float(np.linalg.norm(back.astype(np.float32) - features)) / norm if norm else 0.0


def convert(root: CacheRoot, source: FeatureReader, options: Options) -> list[CorruptError]:
    """Make or complete the space; what is wrong with the rows that could not be converted.

    Raises:
        UserError: as `target_spec`; a job writes to the target; too little room.
    """
    spec = target_spec(source, options)
    paths = root.space(spec.name)
    if options.plan:
        print(_todo(source, FeatureReader(paths) if paths.space_json.exists() else None, spec)[1])
        return []
    with DriverLock(paths, holder("cache.convert")):
        here = FeatureReader(paths) if paths.space_json.exists() else None
        positions, text = _todo(source, here, spec)
        print(text, flush=True)
        rows = {array: len(found) for array, found in positions.items()}
        needed = sum(n * (spec.row_bytes(array) + ROW_OVERHEAD) for array, n in rows.items())
        check_room(root.path, needed, f"the space {spec.name}")
        space = Space.create(root, spec, target_load(source.load, spec, source.paths.name))
        meter = Meter("convert", sum(n * source.spec.row_bytes(array) for array, n in rows.items()))
        damaged = []
        for array, found in positions.items():
            change = converter(source.spec, spec, array)
            damaged += copy_rows(source, space, array, found, change=change, done=meter.add)
        meter.close()
        save_index(space.paths, space.info)
    print(f"converted {source.paths.name}: {sum(rows.values()) - len(damaged):,} rows")
    return damaged


def _todo(
    source: FeatureReader, here: FeatureReader | None, spec: FeatureSpec
) -> tuple[dict[str, npt.NDArray[np.int64]], str]:
    """Array -> positions of the rows to convert; and what to say of them."""
    positions = {array: missing(source, here, array) for array in ARRAYS}
    rows = sum(map(len, positions.values()))
    nbytes = sum(len(found) * spec.row_bytes(array) for array, found in positions.items())
    total = sum(map(source.rows, ARRAYS))
    return (
        positions,
        f"space    {spec.name}: {rows:,} of {total:,} rows to make ({bytes_text(nbytes)})",
    )


def main() -> int:
    """The command; 1 when rows of the source were damaged."""
    options = parse(Options, prog="python -m cache.convert", description=__doc__)
    root = CacheRoot(options.features)
    source = find_source(root, options.space)
    with full_disk_is_said(root.path):
        damaged = convert(root, source, options)
    if damaged:
        print(damage_text(damaged))
    return 1 if damaged else 0


if __name__ == "__main__":
    command(main)


def pool(features: npt.NDArray[np.float16], window: int) -> npt.NDArray[np.float32]:
    """Features (..., N, V) on a square grid -> (..., N / window^2, V), in the order of the grid's rows.

    Raises:
        ValueError: the patches are no square grid, or the window does not divide it.
    """
    *lead, patches, width = features.shape
    grid = math.isqrt(patches)
    if grid * grid != patches or window < 1 or grid % window:
        raise ValueError(f"{patches} patches in windows of {window} x {window}")
    side = grid // window
    blocks = features.reshape(-1, side, window, side, window, width).astype(np.float32)
    total = np.zeros((len(blocks), side, side, width), np.float32)
    for row in range(window):
        for column in range(window):
            total += blocks[:, :, row, :, column]
    total *= np.float32(1 / window**2)
    return total.reshape(*lead, side * side, width)
