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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cache.errors import CacheError
from cache.export.rows import (
    OutputFile,
    Positions,
    Source,
    safetensors_files,
    tar_files,
    unique_rows,
    write_index,
)
from cache.export.samples import (
    ExportedDataset,
    exported_rows,
    gather_dataset,
    sample_files,
    write_json_lines,
)
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
from configs.console import Meter, bytes_text, check_room

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


@dataclass(kw_only=True)
class Export:
    """The plan of one export."""

    options: Options
    root: CacheRoot
    source: Source
    data: list[ExportedDataset]
    """The requested data sets."""
    rows: dict[str, Positions]
    """Array -> positions of the rows to export."""

    @staticmethod
    def plan(options: Options) -> Export:
        """Find the rows and samples to export.

        Raises:
            CacheError: no such space or data set.
        """
        root = CacheRoot.existing(options.features)
        reader = FeatureReader(find_space(root, options.space))
        source = Source(reader=reader, unpack=options.unpack)
        data = [gather_dataset(root, name, reader) for name in dict.fromkeys(options.dataset)]
        if data:
            rows = {array: exported_rows(reader, array, data) for array in ARRAYS}
        else:
            rows = {array: unique_rows(reader, array) for array in ARRAYS}
        return Export(options=options, root=root, source=source, data=data, rows=rows)

    def files(self) -> Iterator[OutputFile]:
        """Yield the files to write, in order."""
        if self.options.to == "safetensors":
            yield from safetensors_files(self.source, self.rows)
            for data in self.data:
                write = partial(write_json_lines, data=data)
                yield OutputFile(f"{data.name}.jsonl", data.table.nbytes, write)
            write = partial(write_index, source=self.source, rows=self.rows)
            yield OutputFile("index.json", 1, write)
        elif self.data:
            for data in self.data:
                yield from sample_files(self.source, data)
        else:
            yield from tar_files(self.source, self.rows)

    def about(self, files: Sequence[OutputFile]) -> bytes:
        """Return the file export.json: the source, the formats and the counts. Equal for equal exports."""
        spec = self.source.reader.spec
        values = {
            "to": self.options.to,
            "space": self.source.reader.paths.name,
            "fingerprint": spec.fingerprint,
            "codec": self.source.codec,
            "stored_as": spec.codec,
            "width": spec.width,
            "tokens": {array: spec.tokens(array) for array in ARRAYS},
            "rows": {array: len(rows) for array, rows in self.rows.items()},
            "datasets": {data.name: samples_digest(self.root, data.name) for data in self.data},
            "files": [file.name for file in files],
            "spec": spec.to_json(),
        }
        return json.dumps(values, indent=2).encode() + b"\n"


def run(export: Export) -> None:
    """Write all files of an export.

    Raises:
        UserError: the folder is not empty, another export writes there, or the disk is too small.
        DiskError: the disk is full or fails.
        CorruptError: a row fails its checksum.
    """
    out = export.options.out.expanduser().absolute()
    refuse_nonempty(out)
    folder = out.with_name(out.name + PARTIAL)
    files = list(export.files())
    nbytes = sum(file.nbytes for file in files)
    with disk_errors(folder), empty_folder(folder):
        check_room(out.parent, nbytes, "the export")
        # The next run removes the folder's contents only where it finds this file: so it is the first.
        write_atomic(folder / ABOUT, export.about(files))
        meter = Meter("written", nbytes)
        for output in files:
            with new_file(folder / output.name) as file:
                output.write(file, meter.add)
        meter.close()
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


def summary(export: Export, out: Path) -> str:
    """Return the lines that the command prints at its end: rows, size, and samples left out."""
    rows = ", ".join(f"{len(rows):,} {array} rows" for array, rows in export.rows.items())
    size = sum(path.stat().st_size for path in out.iterdir())
    lines = [f"{out}: {rows} as {export.source.codec}, {bytes_text(size)}"]
    for data in export.data:
        samples = sum(len(group.samples) for group in data.groups)
        line = f"{data.name}: {samples:,} samples"
        if data.lacking:
            line += f"; {data.lacking:,} left out, whose media have no features in this space"
        if data.mismatched:
            line += (
                f"; {data.mismatched:,} left out, whose source has another sha256 than they state"
            )
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    options = parse(Options, argv, prog="python -m cache.export", description=__doc__)
    refuse_nonempty(options.out)
    export = Export.plan(options)
    run(export)
    print(summary(export, options.out))


if __name__ == "__main__":
    command(main, errors=(CacheError,))
