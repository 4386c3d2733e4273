"""Let one job at a time write to a space: its driver, and the workers that the driver started, on any nodes.

    driver.lock       name, node and token of the newest driver; written when a driver takes the space
    alive-<token>     its driver writes another number to it twice a second, and holds its lock
    workers.lock      shared by all workers while they run
    worker-<id>.lock  held exclusively by that worker; the token of a job whose driver has replaced it

A lease saves work, and no row depends on it: rows are idempotent (`cache.store.row_index`), so a process that
writes without a lease may double bytes, never rows. Therefore no job waits for a process that is frozen. A
driver that finds a space taken looks at the number. When it changes, the space is in use. When STALE_LOOKS
looks show the same number, the other driver is frozen or its node is gone, and the space is taken over. The
clocks of two nodes are never compared. Tokens ascend: each process of a job compares its own with the newest
before it renames a file, and stops once that is higher.

Locks of the kernel (`flock`) only save time: a driver that was killed on this node is noticed at once, and of
two drivers that start together only one begins. File systems without them may be used.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from msgspec import Meta

from cache.errors import DATA_FOLDERS, CorruptError, InUseError, StaleJobError
from cache.format.gate import fit, open_file, parse_json, read_file, refuse_links
from cache.store.files import open_in_place, remove_file
from cache.store.paths import SpacePaths

log = logging.getLogger(__name__)

BEAT_S = 0.5
"""Seconds between two numbers that a driver writes, and between two looks at them."""
STALE_LOOKS = 60
"""Looks at an unchanged number after which a driver counts as frozen: 30 s or more. Looks are counted and not
seconds, because whoever looks may be frozen too, or both may wait for one file server."""
QUIET_LOOKS = 6
"""Looks at an unchanged number after which a line is printed about it."""
ORPHANS_S = 15.0
"""Seconds for which a driver waits for the workers of an earlier job. They can commit nothing, but they use
the processors and the GPUs."""
GUARD_S = 2.0
"""Seconds for which a driver waits for another one that is taking the space, or for a worker's lock."""
POLL_S = 0.02

MAX_FIELD = 500
"""Characters of one field of driver.lock, at most."""
MAX_LOCK_BYTES = 65536
"""Bytes of a lock file, at most."""
RECORD_BYTES = 8192
"""Bytes of driver.lock. It is written in place with one call, since a network file system shows other nodes
such a change at their next `open`, and another file of the same name only after up to a minute."""

_TOKEN = re.compile(r"[0-9]{12}-[0-9a-f]{32}")
_LAST = 10**12 - 1


class _Flock:
    """An open lock file."""

    def __init__(self, path: Path, root: Path):
        self._fd = open_in_place(path, root)

    def try_acquire(self, how: int, timeout_s: float) -> bool | None:
        """Try to get the lock for `timeout_s` seconds.

        Returns:
            Whether it was acquired; None where the file system has no locks.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._fd, how | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            except OSError:
                return None
            time.sleep(POLL_S)

    def read(self) -> str:
        return os.pread(self._fd, MAX_LOCK_BYTES, 0).decode(errors="replace")

    def write(self, text: str, nbytes: int = 0) -> None:
        """Replace the content, with spaces up to `nbytes` bytes, and show it to other nodes."""
        data, done = text.encode().ljust(nbytes), 0
        while done < len(data):  # one call, unless it is interrupted
            done += os.pwrite(self._fd, data[done:], done)
        os.ftruncate(self._fd, len(data))
        os.fsync(self._fd)

    def close(self) -> None:
        """Release the lock, even if a forked child still has the file open."""
        # Another node may have removed the file, or the file system has no locks.
        with contextlib.suppress(OSError):
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        with contextlib.suppress(OSError):
            os.close(self._fd)


def _open_lock(paths: SpacePaths, path: Path) -> contextlib.closing[_Flock]:
    return contextlib.closing(_Flock(path, paths.cache_root))


# ---- drivers


class DriverLock(contextlib.ExitStack):
    """Hold the right to write to one space, as a context manager. `token` is for the workers of the job.

    Raises:
        InUseError: another job has it; the message names that job.
        CorruptError: a folder of the cache is a link, or a lock is no file.
    """

    def __init__(self, paths: SpacePaths, holder: str):
        super().__init__()
        self._paths, self._holder = paths, holder
        self._ended = threading.Event()
        self.token = self._node = ""

    def __enter__(self) -> Self:
        for name in DATA_FOLDERS:  # an error comes before anything has changed
            refuse_links(self._paths.cache_root / name, self._paths.cache_root)
        with contextlib.ExitStack() as held:
            self._take(held)
            beats = threading.Thread(target=self._beat, name="lease", daemon=True)
            beats.start()
            held.callback(beats.join, 2 * BEAT_S)  # it may wait for a file server
            held.callback(self._ended.set)
            self._wait_for_orphans()
            self.enter_context(held.pop_all())  # released when this lock is
        return self

    def fence(self) -> None:
        """Raise StaleJobError once another job has taken over the space."""
        _check_token(self._paths, self.token)

    def _take(self, held: contextlib.ExitStack) -> None:
        """Write the record of this job, once the job before has ended or is frozen."""
        while True:
            before = _read_record(self._paths)
            if before is not None and _works(self._paths, before, STALE_LOOKS):
                raise InUseError(
                    f"{self._paths.root} is being written by {before.holder}; "
                    "wait until that job ends, or stop it"
                )
            with _open_lock(self._paths, self._paths.driver_lock) as lock:
                guarded = lock.try_acquire(fcntl.LOCK_EX, GUARD_S)
                if _read_record(self._paths) != before:
                    continue  # another driver was quicker
                self.token = _next_token(self._paths, before)
                alive = self._paths.alive_lock(self.token)
                own = held.enter_context(_open_lock(self._paths, alive))
                held.callback(_remove, self._paths, alive)
                self._node = _node() if own.try_acquire(fcntl.LOCK_EX, 0) else ""
                own.write("0")
                self._write_record(lock)
            if not guarded:  # of two drivers that wrote at the same time, one now sees the other
                time.sleep(2 * BEAT_S)
            if driver_token(self._paths) == self.token:
                break
            held.close()
        older = self._paths.alive_lock(self.token.partition("-")[0]).name
        for path in self._paths.locks_dir.glob("alive-*"):
            if path.name < older:
                _remove(self._paths, path)

    def _write_record(self, lock: _Flock) -> None:
        record = {"holder": self._holder[:MAX_FIELD], "node": self._node, "token": self.token}
        lock.write(json.dumps(record), RECORD_BYTES)

    def _beat(self) -> None:
        """Write a number twice a second, until the job ends or another one has taken over."""
        number, paths = 0, self._paths
        while not self._ended.wait(BEAT_S):
            number += 1
            # While a file server does not answer this process, it answers no other one that looks.
            with contextlib.suppress(OSError, CorruptError):
                newest = driver_token(paths)
                if newest is None or newest > self.token:
                    return
                if newest < self.token:  # an older driver was frozen while it wrote its record
                    with _open_lock(paths, paths.driver_lock) as lock:
                        self._write_record(lock)
                # Closing shows it to other nodes; nothing needs it to be on the disk.
                fd = open_in_place(paths.alive_lock(self.token), paths.cache_root)
                with contextlib.closing(os.fdopen(fd, "r+b", buffering=0)) as alive:
                    alive.write(str(number).encode())

    def _wait_for_orphans(self) -> None:
        paths = self._paths
        with _open_lock(paths, paths.workers_lock) as workers:
            ended = workers.try_acquire(fcntl.LOCK_EX, 0)
            if ended is False:
                log.warning("waiting for workers of an earlier job on %s to end", paths.root)
                ended = workers.try_acquire(fcntl.LOCK_EX, ORPHANS_S)
            if ended is False:
                log.warning("going on without waiting: they can no longer commit")
                _remove(paths, paths.workers_lock)  # the next driver does not wait for them again
        # A worker that still runs keeps its lock, under a name that no other worker will open.
        for path in paths.locks_dir.glob("worker-*.lock"):
            _remove(paths, path)


def holder_text(command: str) -> str:
    """Return who holds a DriverLock: the command and its process, machine and start, in words."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{command} (process {os.getpid()} on {socket.gethostname()} since {since})"


def driver_token(paths: SpacePaths) -> str | None:
    """Return the token of the newest driver; None if the space never had one."""
    record = _read_record(paths)
    return record.token if record else None


def driver_holder(paths: SpacePaths) -> str | None:
    """Return the name of the job that writes to the space now; None if none does."""
    record = _read_record(paths)
    if record is None or (first := _look(paths, record)) is None:
        return None
    return record.holder if first.locked or _works(paths, record, QUIET_LOOKS) else None


@dataclass(frozen=True)
class _Record:
    """Content of driver.lock."""

    holder: str
    node: str
    """Where its kernel's lock says whether the driver's process exists; empty where none can be had."""
    token: str


@dataclass(frozen=True)
class _Look:
    """What is seen of a driver that has not ended its job."""

    number: bytes
    """Number that it wrote last."""
    locked: bool
    """Whether its process certainly exists. It may be frozen."""


def _read_record(paths: SpacePaths) -> _Record | None:
    """Return the content of driver.lock; None where there is none, or none of ours."""
    for _ in range(3):  # a record may be seen half written
        try:
            data = read_file(paths.driver_lock, paths.cache_root, most=MAX_LOCK_BYTES)
        except FileNotFoundError:
            return None
        if not data:
            return None
        with contextlib.suppress(ValueError, KeyError):
            text = parse_json(data.decode(errors="replace"))
            values = fit(text, dict[str, Annotated[str, Meta(max_length=MAX_FIELD)]])
            # A token becomes the name of a file.
            if _TOKEN.fullmatch(values["token"]):
                return _Record(values["holder"], values["node"], values["token"])
        time.sleep(POLL_S)
    return None


def _look(paths: SpacePaths, record: _Record) -> _Look | None:
    """Look at a driver; None if its job has ended, or its process has on this node."""
    try:
        file = open_file(paths.alive_lock(record.token), paths.cache_root, most=MAX_LOCK_BYTES)
    except FileNotFoundError:
        return None
    locked = False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            locked = True
        except OSError:
            pass  # no locks here
        else:
            # Locks of one kernel are certain; some file systems do not show them to other nodes.
            if record.node == _node():
                return None
        return _Look(file.read(), locked)


def _works(paths: SpacePaths, record: _Record, looks: int) -> bool:
    """Return whether a driver changes its number. If not, it has ended, or was quiet for `looks` looks."""
    first = _look(paths, record)
    for at in range(looks):
        if first is None:
            return False
        time.sleep(BEAT_S)
        if (now := _look(paths, record)) is None:
            return False
        if now.number != first.number:
            return True
        if at == QUIET_LOOKS:
            log.warning(
                "%s is taken by %s, which shows no sign of life; taking over in %.0f s unless it does",
                paths.root,
                record.holder,
                (looks - at) * BEAT_S,
            )
    return False


def _next_token(paths: SpacePaths, before: _Record | None) -> str:
    number = int(before.token.partition("-")[0]) + 1 if before else 1
    if number > _LAST:
        raise CorruptError(paths.driver_lock, "no token can be higher", f"remove {paths.locks_dir}")
    return f"{number:012}-{secrets.token_hex(16)}"


def _check_token(paths: SpacePaths, token: str) -> None:
    """Raise StaleJobError once a driver with a higher token than `token` has taken the space.

    An older driver that was frozen while it wrote its record may leave a lower one, for an instant.
    """
    record = _read_record(paths)
    if record is None or not _TOKEN.fullmatch(token) or record.token > token:
        by = f" ({record.holder})" if record else ""
        raise StaleJobError(
            f"{paths.root} belongs to another job now{by}: this one showed no sign of life. Everything "
            "committed is kept: once the other job has ended, run the same command again"
        )


@functools.cache
def _node() -> str:
    """Return what names this kernel until it restarts; containers on it share it."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def _remove(paths: SpacePaths, path: Path) -> None:
    with contextlib.suppress(OSError):  # a file that is left does no harm
        remove_file(path, paths.cache_root)


# ---- workers


class WorkerLease(contextlib.ExitStack):
    """Hold a worker's right to write for the job with `token`, as a context manager.

    Raises:
        StaleJobError: that job is over, or its driver replaced this worker (`wait_for_exit`).
    """

    def __init__(self, paths: SpacePaths, token: str, worker_id: str):
        super().__init__()
        self._paths, self._token, self._own = paths, token, paths.worker_lock(worker_id)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as locks:
            shared = locks.enter_context(_open_lock(self._paths, self._paths.workers_lock))
            shared.try_acquire(fcntl.LOCK_SH, GUARD_S)
            self.fence()
            own = locks.enter_context(_open_lock(self._paths, self._own))
            if own.try_acquire(fcntl.LOCK_EX, 0) is False or own.read() == self._token:
                raise self._replaced()
            self.enter_context(locks.pop_all())  # released when this lease is
        return self

    def fence(self) -> None:
        """Raise StaleJobError once another job has the space, or the driver has replaced this worker."""
        _check_token(self._paths, self._token)
        with contextlib.suppress(FileNotFoundError):
            by = read_file(self._own, self._paths.cache_root, most=MAX_LOCK_BYTES)
            if by.decode(errors="replace") == self._token:
                raise self._replaced()

    def _replaced(self) -> StaleJobError:
        return StaleJobError(f"{self._own.stem.replace('-', ' ')} was replaced by its driver")


def wait_for_exit(paths: SpacePaths, worker_id: str, timeout_s: float) -> bool:
    """Replace a worker, and wait up to `timeout_s` seconds until it has ended. Return whether it has.

    From the beginning on it loses the right to write for this job, and so does a process of that worker that
    starts later. What it commits at this moment may double rows of the worker that replaces it.
    """
    with _open_lock(paths, paths.worker_lock(worker_id)) as own:
        own.write(driver_token(paths) or "")
        return own.try_acquire(fcntl.LOCK_EX, timeout_s) is not False
