"""Export a space as standard files, for people and tools that do not have this package.

python -m cache.export --to webdataset --out tars                    # every row: <key>.<view>.npy and .json
python -m cache.export --to webdataset --out tars --dataset demo     # one data set: its text and features
python -m cache.export --to safetensors --out st --unpack            # a float16 tensor a row, and index.json

Rows are exported as they are stored, bit for bit. With --unpack they are float16, for readers without our
codec. Each row's checksum is verified before it is written. With --dataset, a tar holds one sample for each
image or video (or tuple of them) with the text and the features; a safetensors export adds one JSON line a
sample. The files are written to the folder NAME.partial, which is renamed to NAME when all are complete; an
interrupted export leaves NAME.partial behind, and the next run replaces it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cache.errors import CacheError
from cache.export.rows import OutputFile, Source, safetensors_files, tar_files, unique_rows
from cache.export.samples import exported_rows, gather_dataset, json_lines, sample_files
from cache.format.spec import ARRAYS
from cache.store.files import (
    PARTIAL,
    disk_errors,
    fsync_folder,
    make_folder,
    new_file,
    write_atomic,
)
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import samples_digest
from cache.store.space import find_space
from configs import UserError, command, parse
from configs.console import bytes_text, check_room
from configs.progress import Meter

ABOUT = "export.json"
"""The file of each export that describes it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Export a space as standard files."""

    to: Literal["webdataset", "safetensors"]
    """The file format."""
    out: Path
    """The folder to create; it may exist if it is empty."""
    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """Name of the space, or the start of it; optional when the cache has one space."""
    dataset: tuple[str, ...] = ()
    """Export only the media that these data sets refer to, with their text. Default: all rows, no text."""
    unpack: bool = False
    """Write float16 instead of packed rows; int8 rows then take twice the space."""


def run(options: Options) -> str:
    """Write all files of an export, and return the lines that the command prints at its end.

    Raises:
        UserError: the folder is not empty, another export writes there, or the disk is too small.
        CacheError: no such space or data set.
        DiskError: the disk is full or fails.
        CorruptError: a row fails its checksum.
    """
    out = options.out.expanduser().absolute()
    refuse_nonempty(out)
    root = CacheRoot.existing(options.features)
    reader = FeatureReader(find_space(root, options.space))
    source = Source(reader=reader, codec="fp16" if options.unpack else reader.spec.codec)
    datasets = [gather_dataset(root, name, reader) for name in dict.fromkeys(options.dataset)]
    rows = {
        array: exported_rows(reader, array, datasets) if datasets else unique_rows(reader, array)
        for array in ARRAYS
    }
    if options.to == "safetensors":
        files = [OutputFile(f"{d.name}.jsonl", d.table.nbytes, json_lines(d)) for d in datasets]
        files += safetensors_files(source, rows)
    elif datasets:
        files = [file for data in datasets for file in sample_files(source, data)]
    else:
        files = list(tar_files(source, rows))
    about = {
        "to": options.to,
        "space": reader.paths.name,
        "fingerprint": reader.spec.fingerprint,
        "codec": source.codec,
        "stored_as": reader.spec.codec,
        "width": reader.spec.width,
        "tokens": {array: reader.spec.tokens(array) for array in ARRAYS},
        "rows": {array: len(positions) for array, positions in rows.items()},
        "datasets": {data.name: samples_digest(root, data.name) for data in datasets},
        "files": [file.name for file in files],
        "spec": reader.spec.to_json(),
    }
    write(out, about, files)
    counts = ", ".join(f"{len(positions):,} {array} rows" for array, positions in rows.items())
    size = sum(path.stat().st_size for path in out.iterdir())
    lines = [f"{options.out}: {counts} as {source.codec}, {bytes_text(size)}"]
    for data in datasets:
        line = f"{data.name}: {sum(len(group.samples) for group in data.groups):,} samples"
        if data.lacking:
            line += f"; {data.lacking:,} left out, whose media have no features in this space"
        if data.mismatched:
            line += (
                f"; {data.mismatched:,} left out, whose source has another sha256 than they state"
            )
        lines.append(line)
    return "\n".join(lines)


def write(out: Path, about: Mapping[str, object], files: Sequence[OutputFile]) -> None:
    """Write the files and export.json to the folder `out`, which appears when all are complete."""
    folder = out.with_name(out.name + PARTIAL)
    nbytes = sum(file.nbytes for file in files)
    with disk_errors(folder), empty_folder(folder):
        check_room(out.parent, nbytes, "the export")
        # The next run removes the folder's contents only where it finds this file: so it is the first.
        write_atomic(folder / ABOUT, json.dumps(about, indent=2).encode() + b"\n")
        with Meter("export", nbytes) as meter:
            for output in files:
                with new_file(folder / output.name) as file:
                    for block in output.blocks:
                        meter.add(file.write(block))
        folder.rename(out)
        fsync_folder(out.parent)


def refuse_nonempty(out: Path) -> None:
    """Raise UserError when the target folder of an export has contents, or is a file."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; name another folder, or remove it first")


@contextlib.contextmanager
def empty_folder(folder: Path) -> Iterator[None]:
    """Create the folder, or remove what an interrupted export left in it; lock it within the block.

    Raises:
        UserError: another process is exporting to it, or its contents are not an export's.
    """
    make_folder(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another export is writing to {folder}; wait until it ends") from None
        found = list(folder.iterdir())
        # An export writes ABOUT first. Killed before that, it leaves only the temporary file of ABOUT.
        if any(not path.name.startswith(ABOUT) for path in found) and folder / ABOUT not in found:
            raise UserError(f"{folder} is not an unfinished export; move it away")
        for path in found:
            path.unlink()
        yield
    finally:
        os.close(fd)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    print(run(parse(Options, argv, prog="python -m cache.export", description=__doc__)))


if __name__ == "__main__":
    command(main, errors=(CacheError,))
