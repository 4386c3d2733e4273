"""Let one job at a time write to a space: its driver, and the workers that the driver started.

    driver.lock       held exclusively by the driver; contains its name and a token, new for each job
    workers.lock      shared by all workers while they run
    worker-<id>.lock  held exclusively by that worker

A driver may die and leave workers behind. The next driver writes a new token and then takes `workers.lock`
exclusively for a moment: it waits until the last of these workers has ended. A worker of the dead driver that
starts later finds a token that is not its own, and stops. All locks are `flock`s, which the kernel releases
when the process that holds them ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import time
from pathlib import Path
from typing import Annotated, Self

from msgspec import Meta

from cache.errors import DATA_FOLDERS, CacheError, InUseError, StaleJobError
from cache.format.gate import fit, open_file, parse_json, read_file, refuse_links
from cache.store.files import open_in_place, remove_file
from cache.store.paths import SpacePaths

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 1.0
"""Seconds for which a driver tries to get the lock: `driver_holder` holds it for an instant."""

POLL_S = 0.02

MAX_FIELD = 500
"""Characters of the holder's name or its token, at most."""
MAX_LOCK_BYTES = 65536
"""Bytes of a lock file, at most."""


class _Flock:
    """An open lock file."""

    def __init__(self, path: Path, root: Path):
        self.path = path
        self._fd = open_in_place(path, root)

    def acquire(self, how: int) -> None:
        """Get the lock, and wait for it as long as it takes."""
        fcntl.flock(self._fd, how)

    def try_acquire(self, how: int, timeout_s: float) -> bool:
        """Try to get the lock for `timeout_s` seconds. Return whether it was acquired."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(self._fd, how | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return False
            except OSError as error:  # some network file systems
                raise CacheError(
                    f"{self.path}: this file system cannot lock files ({error.strerror}); "
                    "mount it with flock, or put --features on another"
                ) from None
            time.sleep(POLL_S)

    def read(self) -> str:
        return os.pread(self._fd, MAX_LOCK_BYTES, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def close(self) -> None:
        """Release the lock, even if a forked child still has the file open."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


def _open_lock(paths: SpacePaths, path: Path) -> contextlib.closing[_Flock]:
    return contextlib.closing(_Flock(path, paths.cache_root))


class DriverLock(contextlib.ExitStack):
    """Hold the right to write to one space, as a context manager. `token` is for the workers of the job.

    Raises:
        InUseError: another job has it; the message names that job.
        CorruptError: a folder of the cache is a link, or a lock is no file.
    """

    def __init__(self, paths: SpacePaths, holder: str):
        super().__init__()
        self._paths, self._holder = paths, holder
        self.token = ""

    def __enter__(self) -> Self:
        for name in DATA_FOLDERS:  # whoever writes is told before anything has changed
            refuse_links(self._paths.cache_root / name, self._paths.cache_root)
        with contextlib.ExitStack() as locks:
            lock = locks.enter_context(_open_lock(self._paths, self._paths.driver_lock))
            if not lock.try_acquire(fcntl.LOCK_EX, LOCK_TIMEOUT_S):
                raise InUseError(
                    f"{self._paths.root} is being written by {_field(lock.read(), 'holder')}; "
                    "wait until that job ends, or stop it"
                )
            self.token = secrets.token_hex(16)
            lock.write(json.dumps({"holder": self._holder, "token": self.token}))
            self._wait_for_orphans()
            self.enter_context(locks.pop_all())  # released when this lock is
        return self

    def _wait_for_orphans(self) -> None:
        with _open_lock(self._paths, self._paths.workers_lock) as workers:
            if not workers.try_acquire(fcntl.LOCK_EX, 0):
                log.warning("waiting for workers of an earlier job on %s to end", self._paths.root)
                workers.acquire(fcntl.LOCK_EX)
            # No worker is left that could hold one of these.
            for path in self._paths.locks_dir.glob("worker-*.lock"):
                remove_file(path, self._paths.cache_root)


class WorkerLease(contextlib.ExitStack):
    """Hold a worker's right to write for the job with `token`, as a context manager.

    Raises:
        StaleJobError: that job is over, or its driver replaced this worker (`wait_for_exit`).
    """

    def __init__(self, paths: SpacePaths, token: str, worker_id: str):
        super().__init__()
        self._paths, self._token, self._worker_id = paths, token, worker_id

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as locks:
            shared = locks.enter_context(_open_lock(self._paths, self._paths.workers_lock))
            shared.acquire(fcntl.LOCK_SH)
            self.fence()
            own_path = self._paths.worker_lock(self._worker_id)
            own = locks.enter_context(_open_lock(self._paths, own_path))
            if not own.try_acquire(fcntl.LOCK_EX, 0) or own.read() == self._token:
                raise StaleJobError(f"worker {self._worker_id} was replaced by its driver")
            self.enter_context(locks.pop_all())  # released when this lease is
        return self

    def fence(self) -> None:
        """Raise StaleJobError unless the space still belongs to this worker's job."""
        if driver_token(self._paths) != self._token:
            raise StaleJobError(f"{self._paths.root} belongs to another job now")


def holder_text(command: str) -> str:
    """Return who holds a DriverLock: the command and its process, machine and start, in words."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{command} (process {os.getpid()} on {socket.gethostname()} since {since})"


def driver_token(paths: SpacePaths) -> str | None:
    """Return the token of the latest driver; None if the space never had one."""
    try:
        text = read_file(paths.driver_lock, paths.cache_root, most=MAX_LOCK_BYTES)
        return _field(text.decode(errors="replace"), "token")
    except FileNotFoundError:
        return None


def driver_holder(paths: SpacePaths) -> str | None:
    """Return the name of the job that writes to the space now; None if none does."""
    try:
        file = open_file(paths.driver_lock, paths.cache_root, most=MAX_LOCK_BYTES)
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _field(file.read().decode(errors="replace"), "holder")
    return None


def wait_for_exit(paths: SpacePaths, worker_id: str, timeout_s: float) -> bool:
    """Wait up to `timeout_s` seconds until a worker has ended. Return whether it has.

    If so, a process of that worker that starts later cannot write for this job.
    """
    with _open_lock(paths, paths.worker_lock(worker_id)) as own:
        if not own.try_acquire(fcntl.LOCK_EX, timeout_s):
            return False
        own.write(driver_token(paths) or "")
        return True


def _field(text: str, name: str) -> str:
    """Return one field of driver.lock; while its owner is writing it, a text that equals no token."""
    try:
        values = fit(parse_json(text), dict[str, Annotated[str, Meta(max_length=MAX_FIELD)]])
        return values[name]
    except (ValueError, KeyError):
        return "a job that is just starting"
