"""Remove what crashes left behind in a cache.

python -m cache.gc                           # say what there is; removes nothing
python -m cache.gc --delete                  # remove it

That is: files that were never finished, and shards that were never committed. Nothing that is part of a
cache is ever removed; rows that no sample mentions any more are counted, and kept. Refused while a job
writes to a space.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cache.layout import PARTIAL, CacheRoot, SpacePaths, fsync_folder
from cache.locks import DriverLock, driver_holder
from cache.printing import bytes_text
from cache.spec import KINDS
from cache.survey import mentioned_keys, open_spaces
from configs import UserError, command, parse

REST_S = 3600.0
"""Unfinished samples and media younger than this may still be finished: no lock guards those."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to remove."""

    features: Path = Path("cache")
    """Folder of the cache."""
    delete: bool = False
    """Remove what is found, instead of saying so."""


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file or folder that nothing refers to."""

    path: Path
    """Where."""
    what: str
    """What it was to become."""
    nbytes: int
    """Its size on disk."""


def find_garbage(root: CacheRoot, spaces: Sequence[SpacePaths]) -> list[Garbage]:
    """What can go from samples, media and these spaces. Sure only while nobody writes to them."""
    old = time.time() - REST_S
    partial = [p for folder in (root.samples_dir, root.media_dir) for p in _partial(folder)]
    found = [_garbage(path, "never finished") for path in partial if path.stat().st_mtime < old]
    for space in spaces:
        found += _space_garbage(space)
    return found


def _space_garbage(paths: SpacePaths) -> Iterator[Garbage]:
    for kind in KINDS:
        orphans = sorted(set(paths.started(kind)) - set(paths.committed(kind)))
        if orphans and not paths.commits_dir.is_dir():
            raise UserError(
                f"{paths.commits_dir} is missing, so every shard looks uncommitted; "
                f"put it back, or delete {paths.root} yourself"
            )
        for number in orphans:
            yield _garbage(paths.shards_dir(kind) / str(number), "shard, never committed")
    shards = tuple(map(paths.shards_dir, KINDS))
    for path in _partial(paths.root):
        if not any(path.is_relative_to(folder) for folder in shards):
            yield _garbage(path, "never finished")


def _partial(folder: Path) -> list[Path]:
    return sorted(folder.rglob(f"*{PARTIAL}"))


def _garbage(path: Path, what: str) -> Garbage:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return Garbage(path=path, what=what, nbytes=sum(file.stat().st_size for file in files))


@contextlib.contextmanager
def _locked(spaces: Sequence[SpacePaths]) -> Iterator[None]:
    """Keep writing jobs away from these spaces, or raise UserError naming one that is there."""
    holder = f"cache.gc (pid {os.getpid()} on {socket.gethostname()})"
    with contextlib.ExitStack() as locks:
        for space in spaces:
            locks.enter_context(DriverLock(space, holder))
        yield


def remove(garbage: Garbage) -> None:
    """Gone, durably."""
    if garbage.path.is_dir():
        shutil.rmtree(garbage.path)
    else:
        garbage.path.unlink()
    fsync_folder(garbage.path.parent)


def main() -> None:
    """The command."""
    options = parse(Options, prog="python -m cache.gc", description=__doc__)
    root = CacheRoot(options.features)
    if not options.features.is_dir():
        raise UserError(f"no cache at {options.features}/ (say where: --features DIR)")
    spaces = [SpacePaths(folder) for folder in sorted(root.spaces_dir.glob("*/"))]
    if options.delete:
        with _locked(spaces):
            found = find_garbage(root, spaces)
            for garbage in found:
                remove(garbage)
    else:
        for space in spaces:
            if holder := driver_holder(space):
                raise UserError(f"{space.root} is being written by {holder}; wait until that ends")
        found = find_garbage(root, spaces)
    for garbage in found:
        print(f"{garbage.path}: {garbage.what}, {bytes_text(garbage.nbytes)}")
    total = bytes_text(sum(garbage.nbytes for garbage in found))
    verb = "removed" if options.delete else "to remove"
    way = "" if options.delete or not found else "; do it: python -m cache.gc --delete"
    print(f"{verb}: {len(found)} ({total}){way}")
    _print_unreferenced(root)


def _print_unreferenced(root: CacheRoot) -> None:
    mentioned = mentioned_keys(root)
    for name, reader in open_spaces(root)[1].items():
        for kind, index in reader.index.items():
            count = sum(key.tobytes() not in mentioned for key in index.keys)
            if count:
                size = bytes_text(count * reader.geometry[kind].slot_bytes)
                print(f"{name}: no sample mentions {count:,} {kind} rows ({size}); kept")


if __name__ == "__main__":
    command(main)
