"""Write to copies of a space, dying each time one system call later; run as a process of its own.

python -m tests.crash_points FOLDER [merge]     # FOLDER/cache is copied to FOLDER/0, FOLDER/1, ...

With `merge` it is FOLDER/b that is merged into each copy.

Dying is `os._exit` in a forked child just before the call: no cleanup of ours runs, as with `kill -9`.
Prints how many calls there were.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache import merge
from cache.layout import CacheRoot
from cache.writer import ShardWriter, Space
from tests.toy_space import key, row

CALLS = (
    "mkdir",
    "open",
    "pwritev",
    "pwrite",
    "ftruncate",
    "fsync",
    "rename",
    "close",
    "unlink",
    "rmdir",
)
DIED = 9


def write(folder: Path) -> None:
    """What a job does: create or complete the space, fill a shard, commit it, grow the array."""
    root = CacheRoot(folder)
    made = Space.open(root.space(root.space_names()[0])) if root.space_names() else None
    assert made is not None
    space = Space.create(root, made.spec, made.load)
    writer = ShardWriter(space, "picture", space.next_shard("picture"))
    for number in (11, 12):
        writer.append(key(number), "full", row(number))
    writer.commit()
    space.grow("picture")


def merge_into(folder: Path) -> None:
    """What `cache.merge` does, its words apart."""
    other = folder.parent / "b"
    with contextlib.redirect_stdout(None):
        merge.merge(CacheRoot(folder), CacheRoot(other), merge.Options(source=(other,)))


def die_at(call: int, calls: Sequence[str] = CALLS) -> None:
    """Let the process end just before its `call`-th system call that changes something."""
    count = 0

    def guarded(real: Callable[..., Any]) -> Callable[..., Any]:
        def call_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == call:
                os._exit(DIED)
            count += 1
            return real(*args, **kwargs)

        return call_or_die

    for name in calls:
        setattr(os, name, guarded(getattr(os, name)))


def main() -> None:
    """Copies and deaths, until one survives."""
    folder = Path(sys.argv[1])
    work = merge_into if sys.argv[2:] == ["merge"] else write
    call = 0
    while True:
        copy = folder / str(call)
        shutil.copytree(folder / "cache", copy)
        child = os.fork()
        if child == 0:
            # A merge opens and closes many files that it only reads.
            die_at(call, CALLS if work is write else sorted({*CALLS} - {"open", "close"}))
            work(copy)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        assert code == DIED, f"call {call}: exit code {code}"
        call += 1
    print(call)


if __name__ == "__main__":
    main()
