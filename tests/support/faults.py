"""Work on copies of a cache, with a fault at each system call that changes something; a process of its own.

python -m tests.support.faults FOLDER write       # FOLDER/cache is copied to FOLDER/0, FOLDER/1, ...

One copy for each fault at each call, enumerated. A process that dies just before a call, without any cleanup
as with `kill -9`, leaves what is on disk then: so one undisturbed child copies its folder before each call.
For every other fault a forked child does the work, and the fault strikes at its n-th call, n = 0, 1, ...
Prints a JSON line for each copy: its folder, the fault, the call it struck, how it ended.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cache import gc, merge
from cache.errors import CacheError
from cache.format.spec import ARRAYS
from cache.maintenance.repair import Repair
from cache.store import locks
from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot
from cache.store.space import Space
from cache.store.writer import NewRow
from configs import UserError
from encode.worker.media_item import MediaItem
from encode.worker.messages import Outcome, SourceTask
from encode.worker.row_writer import RowWriter
from tests.support import ROOT
from tests.support.spaces import key, row

WRITES = ("write", "pwrite", "pwritev")
NAMES = ("mkdir", "open", "rename", "unlink", "rmdir")
CALLS = (*WRITES, *NAMES, "ftruncate", "fsync", "close")
"""All that our code uses; files opened by name write through `write`, see `_Raw`."""

FULL = (*WRITES, "mkdir", "open", "rename", "ftruncate", "fsync")
"""Where a full disk can refuse."""

READ_ONLY = (*WRITES, *NAMES, "ftruncate")
"""Where a file system that was mounted read-only meanwhile does."""

FAULTS: dict[str, tuple[int, tuple[str, ...], bool]] = {
    "kill": (0, CALLS, False),
    "short": (0, WRITES, False),
    "stays full": (errno.ENOSPC, FULL, True),
    "full": (errno.ENOSPC, FULL, False),
    "error": (errno.EIO, CALLS, False),
    "stays in error": (errno.EIO, CALLS, True),
    "read-only": (errno.EROFS, READ_ONLY, True),
    "short, then full": (errno.ENOSPC, WRITES, True),
}
"""Name -> errno, calls it can strike, whether it strikes all later ones, too."""

NEW = (11, 12, 13, 14, 15)
"""Images that `write` adds: a full shard and one more row."""

FINISHED, REFUSED, NEVER, DIED, WRONG = 0, 3, 8, 9, 10


NO_FILES = ("a FIFO", "a socket", "a device", "a folder", "a link to itself", "a dangling link")
"""What may be in the place of a file, beside a regular one. The device has no end."""
HUGE = 10 << 30
"""Bytes of `put_in_place(path, "10 GB")`: a file with a hole, which takes no room."""


def put_in_place(path: Path, what: str) -> None:
    """Put one of NO_FILES, or a file that is `empty`, `zeros` or `10 GB` long, in the place of a file."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match what:
        case "a FIFO":
            os.mkfifo(path)
        case "a socket":
            with socket.socket(socket.AF_UNIX) as listener:
                fd = os.open(path.parent, os.O_PATH)  # a path of a socket has 107 bytes at most
                listener.bind(f"/proc/self/fd/{fd}/{path.name}")
                os.close(fd)
        case "a device":
            path.symlink_to("/dev/zero")
        case "a folder":
            path.mkdir()
        case "a link to itself":
            path.symlink_to(path.name)
        case "a dangling link":
            path.symlink_to("nowhere")
        case _:
            path.touch()
            os.truncate(path, {"empty": 0, "zeros": 1 << 20, "10 GB": HUGE}[what])


class TooLongError(BaseException):
    """Work takes too long. No handler for an Exception catches it."""


@contextlib.contextmanager
def in_time(seconds: int = 5, memory: int = 1 << 30) -> Iterator[None]:
    """Fail with a TooLongError where work hangs, and with a MemoryError where it takes more memory."""

    def late(*_: object) -> None:
        raise TooLongError(f"not done after {seconds} s")

    limit = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file: number `bit`, counted from its first byte's lowest."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def garble(path: Path, at: int, length: int = 20) -> None:
    """Change `length` bytes, every second bit of them: what no single flip explains."""
    data = bytearray(path.read_bytes())
    for place in range(at, at + length):
        data[place] ^= 0x55
    path.write_bytes(data)


# ---- the work


def write(root: CacheRoot, said: list[str]) -> None:
    """What a job does with the disk: complete the space, write what is missing, commit, grow the arrays."""
    made = Space.open(root.space(root.space_names()[0]))
    space = Space.create(root, made.spec, made.load)
    missing = [number for number in NEW if (key(number), "full") not in space.keys("image")]
    numbers = {kind: space.next_shard(kind) for kind in ARRAYS}

    def next_shard(kind: str) -> int:
        numbers[kind] += 1
        return numbers[kind] - 1

    def done(outcome: Outcome) -> None:
        if outcome.result == "ok":
            said.append(outcome.record.source)

    writer = RowWriter(
        space, next_shard=next_shard, fence=lambda: None, done=done, commit_every_s=60.0
    )
    try:
        for number in missing:
            record = MediaRecord(source=str(number), key=key(number))
            image = NewRow(key=key(number), view="full", payload=row(number), error=0.005)
            task = SourceTask(source=str(number))
            writer.put(MediaItem(task=task, record=record, rows=[image]))
        writer.commit()
    finally:
        writer.close()
    for kind in ARRAYS:
        space.grow(kind)


def repair(root: CacheRoot, said: list[str]) -> None:
    """`cache.verify --deep --repair`."""
    Repair(root, deep=True, tell=said.append, progress=lambda _: None).run(None)


def collect(root: CacheRoot, said: list[str]) -> None:
    """`cache.gc --unreferenced --delete`."""
    options = gc.Options(features=root.path, unreferenced=True, delete=True)
    with contextlib.redirect_stdout(io.StringIO()):
        gc.run(options)


def merge_other(root: CacheRoot, said: list[str]) -> None:
    """`cache.merge` of the cache in the folder `b` beside."""
    other = root.path.parent / "b"
    with contextlib.redirect_stdout(io.StringIO()):
        merge.merge(root, CacheRoot(other), merge.Options(source=(other,)))


WORK = {"write": write, "repair": repair, "gc": collect, "merge": merge_other}


# ---- the faults


class Fault:
    """One fault, at the `at`-th call that changes something; or `kill`, at every call."""

    def __init__(self, name: str, at: int, report: Path, copy_of: Callable[[int], Path]):
        """Prepare a fault.

        Args:
            name: of FAULTS.
            at: the number of the call.
            report: a file to which a JSON line is added.
            copy_of: returns the folder of the copy that dies at a call, by its number.
        """
        self.error, self.applies, self.stays = FAULTS[name]
        self.name, self.at, self.report, self.copy_of = name, at, report, copy_of
        self.lock, self.copying = threading.RLock(), False
        self.count = 0
        self.struck = ""
        self.said: list[str] = []
        self.real = {call: getattr(os, call) for call in CALLS}
        self.written: set[int] = set()  # files that are open for writing

    def install(self, folder: Path) -> None:
        """Let the calls of this process go through the fault; what it changes is in `folder`."""
        self.folder = folder
        for call in CALLS:
            setattr(os, call, self._guarded(call))
        self._open = io.open
        io.open = self._open_file

    def _guarded(self, call: str) -> Callable[..., Any]:
        real = self.real[call]

        def guarded(*args: Any, **kwargs: Any) -> Any:
            with self.lock:  # no other thread changes anything while a copy is made
                return called(*args, **kwargs)

        def called(*args: Any, **kwargs: Any) -> Any:
            if self.copying:
                return real(*args, **kwargs)
            if call == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*args, **kwargs)
            if call == "close" and args[0] not in self.written:
                return real(*args, **kwargs)
            here, self.count = self.count, self.count + 1
            if self.name == "kill":
                self._copy(here, call)
            elif here == self.at:
                self.struck = call
            if call == "close":
                self.written.discard(args[0])
            if here == self.at and call in WRITES and self.name.startswith("short"):
                return self._half(call, *args)
            strikes = here >= self.at if self.stays else here == self.at
            if strikes and self.error and call in self.applies:
                if call == "close":  # Linux closes all the same
                    real(*args)
                raise OSError(self.error, os.strerror(self.error))
            result = real(*args, **kwargs)
            if call == "open":
                self.written.add(result)
            return result

        return guarded

    def _half(self, call: str, fd: int, data: Any, *offset: int) -> int:
        data = b"".join(data) if call == "pwritev" else bytes(data)
        half = data[: len(data) // 2]
        return self.real["pwrite"](fd, half, *offset) if offset else self.real["write"](fd, half)

    def _copy(self, number: int, call: str) -> None:
        """Copy what a process leaves that dies before this call."""
        self.copying = True
        copy = self.copy_of(number)
        shutil.copytree(self.folder, copy)
        self.tell(copy, call, DIED)
        self.copying = False

    def tell(self, copy: Path, call: str, code: int) -> None:
        """Add a line to the report."""
        values = {"folder": str(copy), "fault": self.name, "code": code, "call": call}
        with self._open(self.report, "a") as file:
            file.write(json.dumps({**values, "said": self.said}) + "\n")

    def _open_file(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set("wxa+"):
            return self._open(path, mode, *args, **kwargs)
        assert mode == "r+b", f"a file opened with {mode!r}: say here how it writes"
        assert isinstance(path, int), f"{path} is opened by name: links are followed"
        return io.BufferedRandom(_Raw(path))


class _Raw(io.FileIO):
    """A file whose writes are calls of `os`, as the C library's are not."""

    def __init__(self, fd: int):
        super().__init__(fd, "r+b", closefd=False)
        self._own = fd

    def write(self, data: Any) -> int:
        return os.write(self.fileno(), data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._own)


def child(work: Callable[[CacheRoot, list[str]], None], folder: Path, fault: Fault) -> int:
    """Do the work in `folder` under the fault; return how it ended."""
    locks.BEAT_S = 3600.0  # the calls of another thread would be counted too
    fault.install(folder)
    code = FINISHED
    try:
        work(CacheRoot(folder), fault.said)
    except (OSError, UserError, CacheError):
        code = REFUSED
    except BaseException:
        traceback.print_exc()
        code = WRONG
    if fault.name == "kill":
        return code
    if code == FINISHED and fault.count <= fault.at:
        return NEVER
    fault.copying = True
    fault.tell(folder, fault.struck, code)
    return code


def struck(folder: Path, work: str, *faults: str) -> list[dict[str, Any]]:
    """All copies of `folder`/cache after `work` (a key of WORK) with a fault in it, by another process."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.faults", str(folder), work, "/".join(faults)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    copies = [json.loads(line) for line in run.stdout.splitlines()]
    assert {copy["code"] for copy in copies} <= {FINISHED, REFUSED, DIED}, run.stderr
    for copy in copies:
        assert copy["code"] == DIED if copy["fault"] == "kill" else copy["code"] != DIED
    return copies


def main() -> None:
    """Every fault at every call."""
    folder, work = Path(sys.argv[1]), WORK[sys.argv[2]]
    faults = sys.argv[3].split("/") if len(sys.argv) > 3 else list(FAULTS)
    report = folder / "report.jsonl"

    def strike(copy: Path, name: str, at: int) -> int:
        shutil.copytree(folder / "cache", copy)
        pid = os.fork()
        if pid == 0:
            fault = Fault(name, at, report, lambda number: folder / f"kill-{number}")
            os._exit(child(work, copy, fault))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    # Undisturbed; the copies are those of `kill`, and it says which call is which.
    undisturbed = strike(folder / "undisturbed", "kill", -1)
    assert undisturbed == FINISHED, undisturbed
    calls = [json.loads(line)["call"] for line in report.read_text().splitlines()]
    if "kill" in faults:
        sys.stdout.write(report.read_text())
    report.unlink()
    for name in faults:
        for at, call in enumerate(calls):
            if name != "kill" and call in FAULTS[name][1]:
                code = strike(folder / f"{name}-{at}", name, at)
                assert code in (FINISHED, REFUSED, NEVER, WRONG), (name, at, code)
    if report.exists():
        sys.stdout.write(report.read_text())


if __name__ == "__main__":
    main()
