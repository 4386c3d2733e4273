"""Prepare a Ray that no other user and no other machine can reach: its folder, token and environment.

    with private_folder() as folder, ray_environment(folder / "token"):
        ray.init(..., _temp_dir=str(folder / "ray"))

    nm2-k3j5x8a2/             nobody else can enter it (mode 0700)
        token                 the secret of this Ray (mode 0600)
        ray/                  for Ray, which opens its own folders to everybody (mode 0777)
        nanomolmo2-session    an empty file that the driver locks while it runs

A driver that is killed leaves its folder behind, and the next one removes it: only a folder that is this
user's own, that nobody else can enter, and whose `nanomolmo2-session` is a file that nobody has locked.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from configs import UserError

LOOPBACK = "127.0.0.1"
"""An address that no other machine can reach. Ray 2.60 does not find its own server at ::1."""

PREFIX = "nm2-"

SESSION = "nanomolmo2-session"

SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Longest path of a Unix socket."""

SOCKET = "nm2-12345678/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""Longest path that Ray gives to a socket, below the folder of temporary files."""

SHORT_FOLDER = "/tmp"  # noqa: S108
"""Taken where TMPDIR is too long for SOCKET."""

TOKEN_BYTES = 32


@contextlib.contextmanager
def ray_environment(token: Path) -> Iterator[None]:
    """Set the variables of Ray, and of all processes that it starts: each call needs what is in `token`."""
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": None,  # would be preferred to the file
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",  # statistics would be sent over the network
        "RAY_enable_metrics_collection": "0",  # ray[default] would open a port for them
        "RAY_worker_niceness": "0",  # Ray's 15: 3 % of a core that another process wants
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it, each start prints a warning
    }
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """Create the folder of one session, and remove it at the end. Remove the folders of dead sessions first.

    Raises:
        UserError: no folder can be created, or its path would be too long for a socket.
    """
    try:
        parent = _parent()
        remove_dead(parent)
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    except OSError as error:
        raise UserError(
            f"Ray needs a folder for temporary files ({error}): set TMPDIR to one whose path has at most "
            f"{SOCKET_BYTES - len(SOCKET) - 1} bytes, or encode without Ray: --workers 0"
        ) from error
    lock = -1
    try:
        lock = _lock(folder)
        token = os.open(folder / "token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(token, "w") as file:
            file.write(secrets.token_hex(TOKEN_BYTES))
        yield folder
    finally:
        _remove(folder)
        if lock >= 0:
            os.close(lock)


def remove_dead(parent: Path) -> None:
    """Remove the folders in `parent` that drivers of this user have left behind when they were killed."""
    with os.scandir(parent) as entries:
        for entry in entries:
            # One that is removed meanwhile, by its driver or by another one that starts.
            with contextlib.suppress(FileNotFoundError):
                if entry.name.startswith(PREFIX) and _is_ours(entry.stat(follow_symlinks=False)):
                    _remove_if_dead(Path(entry.path))


def _remove_if_dead(folder: Path) -> None:
    # Not through links: `folder` is none (`_is_ours`), and nobody else can replace it or what is in it.
    try:
        lock = os.open(folder / SESSION, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # another program's folder, or one that its driver is just creating or removing
        return
    try:
        if stat.S_ISREG(os.fstat(lock).st_mode):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
    except OSError:  # BlockingIOError: its driver lives
        pass
    finally:
        os.close(lock)


def _is_ours(status: os.stat_result) -> bool:
    private = not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and private


def _lock(folder: Path) -> int:
    """Create the file `nanomolmo2-session`, which is locked from the moment at which it has this name."""
    new = folder / f".{SESSION}"
    lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    # A file system without locks: the folder never counts as one of a dead session.
    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)
        new.rename(folder / SESSION)
    return lock


def _remove(folder: Path) -> None:
    """Remove a folder. What cannot be removed yet still counts as one of a dead session."""
    shutil.rmtree(folder / "ray", ignore_errors=True)
    if not os.path.lexists(folder / "ray"):
        shutil.rmtree(folder, ignore_errors=True)


def _parent() -> Path:
    """Return the folder for temporary files; a short one if Ray's sockets would not fit into it."""
    folder = tempfile.gettempdir()
    fits = len(os.fsencode(folder)) + 1 + len(SOCKET) <= SOCKET_BYTES
    return Path(folder if fits else SHORT_FOLDER)
