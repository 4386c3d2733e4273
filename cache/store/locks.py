"""Who may write to a space: one driver at a time, and only its own workers.

    driver.lock       held exclusively by the job; holds its name and a token, fresh for each job
    workers.lock      held shared by each worker while it lives
    worker-<id>.lock  held exclusively by that worker

A driver may die and leave workers behind. The next one writes a new token, then takes `workers.lock`
exclusively for a moment: it waits until the last orphan is gone, while workers that only now start find
a token that is not theirs. All are `flock`s: the kernel drops them with the process that held them.
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
from types import TracebackType
from typing import Self

from cache.errors import CacheError, InUseError, StaleJobError
from cache.store.paths import SpacePaths

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long a driver tries: `driver_holder` holds the lock for an instant when it looks."""

POLL_S = 0.02


class _Flock:
    """An open lock file."""

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)

    def take(self, how: int) -> None:
        """Wait for the lock."""
        fcntl.flock(self._fd, how)

    def try_for(self, how: int, timeout_s: float) -> bool:
        """Whether the lock could be had within `timeout_s`."""
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
        return os.pread(self._fd, 65536, 0).decode(errors="replace")

    def write(self, text: str) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def close(self) -> None:
        """Let go, also of what a forked child still has open."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)


class DriverLock:
    """Context manager: the right to write to one space. `token` is for this job's workers.

    Raises:
        CacheError: another job has it; names that job.
    """

    def __init__(self, paths: SpacePaths, holder: str):
        self._paths, self._holder = paths, holder
        self.token = ""

    def __enter__(self) -> Self:
        self._lock = _Flock(self._paths.driver_lock)
        try:
            if not self._lock.try_for(fcntl.LOCK_EX, PATIENCE_S):
                raise InUseError(
                    f"{self._paths.root} is being written by {_field(self._lock.read(), 'holder')}; "
                    "wait until that job ends, or stop it"
                )
            self.token = secrets.token_hex(16)
            self._lock.write(json.dumps({"holder": self._holder, "token": self.token}))
            self._wait_for_orphans()
        except BaseException:
            self._lock.close()
            raise
        return self

    def _wait_for_orphans(self) -> None:
        with contextlib.closing(_Flock(self._paths.workers_lock)) as workers:
            if not workers.try_for(fcntl.LOCK_EX, 0):
                log.warning("waiting for workers of an earlier job on %s to end", self._paths.root)
                workers.take(fcntl.LOCK_EX)
            for path in self._paths.locks_dir.glob("worker-*.lock"):  # nobody can hold one now
                path.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()


class WorkerLease:
    """Context manager: one worker's share in the job whose driver has `token`.

    Raises:
        StaleJobError: that job is over, or gave this worker up (`wait_gone`).
    """

    def __init__(self, paths: SpacePaths, token: str, worker_id: str):
        self._paths, self._token, self._worker_id = paths, token, worker_id

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as locks:
            shared = locks.enter_context(contextlib.closing(_Flock(self._paths.workers_lock)))
            shared.take(fcntl.LOCK_SH)
            self.fence()
            own = locks.enter_context(
                contextlib.closing(_Flock(self._paths.worker_lock(self._worker_id)))
            )
            if not own.try_for(fcntl.LOCK_EX, 0) or own.read() == self._token:
                raise StaleJobError(f"worker {self._worker_id} was given up by its driver")
            self._locks = locks.pop_all()
        return self

    def fence(self) -> None:
        """Raise StaleJobError unless the space still belongs to this worker's job."""
        if driver_token(self._paths) != self._token:
            raise StaleJobError(f"{self._paths.root} belongs to another job now")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._locks.close()


def holder_text(command: str) -> str:
    """Return who holds a DriverLock: the command and its process, machine and start, in words."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"{command} (process {os.getpid()} on {socket.gethostname()} since {since})"


def driver_token(paths: SpacePaths) -> str | None:
    """The token of the newest driver; None when there never was one."""
    try:
        return _field(paths.driver_lock.read_text(errors="replace"), "token")
    except FileNotFoundError:
        return None


def driver_holder(paths: SpacePaths) -> str | None:
    """The name of the job that writes to the space now; None when none does."""
    try:
        fd = os.open(paths.driver_lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _field(os.pread(fd, 65536, 0).decode(errors="replace"), "holder")
    finally:
        os.close(fd)
    return None


def wait_gone(paths: SpacePaths, worker_id: str, timeout_s: float) -> bool:
    """Whether the worker has ended within `timeout_s`; if so it can never start late in this job."""
    with contextlib.closing(_Flock(paths.worker_lock(worker_id))) as own:
        if not own.try_for(fcntl.LOCK_EX, timeout_s):
            return False
        own.write(driver_token(paths) or "")
        return True


def _field(text: str, name: str) -> str:
    """One field of driver.lock; while its owner is just writing it, a text that equals no token."""
    try:
        return str(json.loads(text)[name])
    except json.JSONDecodeError:
        return "a job that is just starting"
