"""Hand a space on as standard files, for people and tools that know nothing of this cache.

python -m cache.export --to webdataset --out tars                    # every row: <key>.<view>.npy and .json
python -m cache.export --to webdataset --out tars --dataset demo     # that data set: text and features
python -m cache.export --to safetensors --out st --unpack            # a tensor a row, float16, and index.json

Rows leave as they are stored, bit for bit; with --unpack as float16, for readers that lack our codec. Each
row is checked on the way. With --dataset, tars hold a sample for each image or video (or tuple of them):
what the data set says of it, and its features; safetensors come with a line of JSON a sample. The folder
appears under its name when all of it is there; until then it is called NAME.partial, and the same command
goes on with it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal

from cache.export.rows import (
    Part,
    Positions,
    Progress,
    Source,
    chosen_rows,
    safetensors_parts,
    tar_parts,
    write_index,
)
from cache.export.samples import Exported, Views, all_views, gather, sample_parts, texts
from cache.format.spec import ARRAY_OF, ARRAYS
from cache.store.files import PARTIAL, fsync_folder, make_folder, new_file, write_atomic
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.samples import samples_digest
from cache.store.space import find_space
from configs import UserError, command, parse
from configs.console import Meter, bytes_text

ABOUT = "export.json"
"""In every export: what it is of. In an unfinished one, written first."""

SPARE_BYTES = 64 << 20
"""What must stay free on the disk."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Hand a space on as standard files."""

    to: Literal["webdataset", "safetensors"]
    """What to write."""
    out: Path
    """Folder to make; it may exist while it is empty."""
    features: Path = Path("cache")
    """Folder of the cache."""
    space: str | None = None
    """The space: its name, or how it begins; not needed where there is one."""
    dataset: tuple[str, ...] = ()
    """Only what these data sets mention, and what they say. Without: all rows, and no text."""
    unpack: bool = False
    """Write float16 instead of packed rows: what int8 rows become takes twice the space."""


@dataclass(kw_only=True)
class Export:
    """One export, planned."""

    options: Options
    root: CacheRoot
    source: Source
    data: list[Exported]
    """The data sets asked for."""
    views: dict[str, Views]
    """Where the rows of a media are; empty without data sets."""
    rows: dict[str, Positions]
    """Array of array -> the rows that leave."""

    @staticmethod
    def plan(options: Options) -> Export:
        """What there is to do.

        Raises:
            UserError: there is no such space or data set.
        """
        root = CacheRoot.existing(options.features)
        reader = FeatureReader(find_space(root, options.space))
        source = Source(reader=reader, unpack=options.unpack)
        views = all_views(reader) if options.dataset else {}
        data = [gather(root, name, views) for name in dict.fromkeys(options.dataset)]
        rows = {}
        for array in ARRAYS:
            keys = None
            if options.dataset:
                media = (one for d in data for group in d.groups for one in group.media)
                keys = {bytes.fromhex(one.key) for one in media if ARRAY_OF[one.kind] == array}
            rows[array] = chosen_rows(reader, array, keys)
        return Export(options=options, root=root, source=source, data=data, views=views, rows=rows)

    def parts(self) -> Iterator[Part]:
        """The files, in order."""
        if self.options.to == "safetensors":
            yield from safetensors_parts(self.source, self.rows)
            for data in self.data:
                yield Part(
                    f"{data.name}.jsonl", data.table.nbytes, partial(self._write_texts, data)
                )
            yield Part("index.json", 1, lambda file, _: write_index(file, self.source, self.rows))
        elif self.data:
            for data in self.data:
                yield from sample_parts(self.source, self.views, data)
        else:
            yield from tar_parts(self.source, self.rows)

    def _write_texts(self, data: Exported, file: BinaryIO, progress: Progress) -> None:
        for line in texts(self.root, data):
            progress(file.write(line))

    def _state(self) -> str:
        """sha256 (hex) of which rows leave with which samples. A shard's number is never used again."""
        digest = hashlib.sha256()
        for array, rows in self.rows.items():
            index = self.source.reader.index[array]
            digest.update(f"{array} {index.shards.tolist()} {len(index)}".encode())
            digest.update(rows.tobytes())
        for data in self.data:
            for group in data.groups:
                digest.update(f"{group.media} {group.samples}".encode())
        return digest.hexdigest()

    def about(self, parts: Sequence[Part]) -> bytes:
        """The file export.json: what the export is of. Equal for equal exports."""
        spec = self.source.reader.spec
        values = {
            "to": self.options.to,
            "space": self.source.reader.paths.name,
            "fingerprint": spec.fingerprint,
            "codec": self.source.layout,
            "stored_as": spec.layout,
            "width": spec.width,
            "tokens": {array: spec.tokens(array) for array in ARRAYS},
            "rows": {array: len(rows) for array, rows in self.rows.items()},
            "datasets": {data.name: samples_digest(self.root, data.name) for data in self.data},
            "files": [part.name for part in parts],
            "state": self._state(),
            "spec": spec.to_json(),
        }
        return json.dumps(values, indent=2).encode() + b"\n"


def run(export: Export) -> None:
    """Write it, or what is left of it.

    Raises:
        UserError: the folder holds something, the disk is too small or full, or a row is damaged.
    """
    out = export.options.out.expanduser().absolute()
    refuse_full_folder(out)
    folder = out.with_name(out.name + PARTIAL)
    parts = list(export.parts())
    with disk_full_is_said(folder), working(folder, export.about(parts)):
        left = [part for part in parts if not (folder / part.name).exists()]
        check_room(folder, sum(part.nbytes for part in left))
        meter = Meter("written", sum(part.nbytes for part in left))
        for part in left:
            with new_file(folder / part.name) as file:
                part.write(file, meter.add)
        meter.close()
        fsync_folder(folder)
        folder.rename(out)
        fsync_folder(out.parent)


def refuse_full_folder(out: Path) -> None:
    """Nothing of anybody's is written over, or mixed with an export."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there and not empty; name another folder, or remove it first")


@contextlib.contextmanager
def working(folder: Path, about: bytes) -> Iterator[None]:
    """`folder` for this export alone: new, or as the same export left it; another one's is removed.

    Raises:
        UserError: another process works there, or it is no export's.
    """
    make_folder(folder)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another export is writing to {folder}; wait until it ends") from None
        begun = folder / ABOUT
        for unfinished in folder.glob(f"{ABOUT}.*{PARTIAL}"):
            unfinished.unlink()
        if any(folder.iterdir()):
            if not begun.exists():
                raise UserError(f"{folder} is no unfinished export of ours; move it away")
            same = begun.read_bytes() == about
            for path in folder.iterdir():
                if not same or path.name.endswith(PARTIAL):
                    path.unlink()
        write_atomic(begun, about)
        yield
    finally:
        os.close(fd)


def check_room(folder: Path, nbytes: int) -> None:
    """Refuse before writing what the disk cannot hold."""
    free = shutil.disk_usage(folder).free
    if nbytes + SPARE_BYTES > free:
        raise UserError(
            f"the export needs about {bytes_text(nbytes)}, {bytes_text(free)} are free in {folder.parent}; "
            "give --out on another disk, or fewer data sets"
        )


@contextlib.contextmanager
def disk_full_is_said(folder: Path) -> Iterator[None]:
    """In one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"disk full ({folder}); whole files are kept: free some space and run the same command again"
        ) from error


def summary(export: Export, out: Path) -> str:
    """What was written, and what was left out."""
    rows = ", ".join(f"{len(rows):,} {array} rows" for array, rows in export.rows.items())
    size = sum(path.stat().st_size for path in out.iterdir())
    lines = [f"{out}: {rows} as {export.source.layout}, {bytes_text(size)}"]
    for data in export.data:
        samples = sum(len(group.samples) for group in data.groups)
        line = f"{data.name}: {samples:,} samples"
        if data.lacking:
            line += f"; {data.lacking:,} left out, whose media have no features in this space"
        lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    options = parse(Options, argv, prog="python -m cache.export", description=__doc__)
    refuse_full_folder(options.out)
    export = Export.plan(options)
    run(export)
    print(summary(export, options.out))


if __name__ == "__main__":
    command(main)
