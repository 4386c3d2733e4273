"""Write and remove files: they appear whole, and no link leads out of the cache.

with new_file(path) as file:
    file.write(data)                 # `path` exists once the block has ended without an error

Every function takes `root`, the cache's folder that the user named. Each folder between it and the file is
opened relative to the one above, and never through a link: a link that somebody put into a cache would make
us write or remove what it leads to. A link, FIFO or device where a file or folder of ours belongs is a
CorruptError. `root=None` is for files outside of caches: the folder is taken as it was named.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from cache.errors import DATA_FOLDERS, CorruptError, DiskError
from cache.format.gate import refusal, refuse_links
from cache.store.paths import LISTING

PARTIAL = ".partial"
"""Suffix of a file that is still being written. Readers ignore it; `cache.gc` removes those left behind."""

ROW_GROUP = 8192
"""Samples or media records that are written, and read back, at a time."""

MAX_DEPTH = 64
"""Folders below one another in a cache, at most. We make eight."""

Fence = Callable[[], None]
"""Called just before a rename; raises when this process has lost the right to write."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after this."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _named(*paths: Path) -> Iterator[None]:
    """Give an OSError of the block the whole paths: the system names a file as it was called, `0`."""
    try:
        yield
    except OSError as error:
        error.filename = str(paths[0])
        if len(paths) > 1:
            error.filename2 = str(paths[1])
        raise


def _enter(above: int, folder: Path, create: bool, durable: bool) -> int:
    """Open `folder` relative to the open folder above it."""
    for _ in range(2):
        with _named(folder):
            try:
                return os.open(folder.name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
            except FileNotFoundError:
                if not create:
                    raise
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP, errno.EMLINK):
                    raise
                mode = os.stat(folder.name, dir_fd=above, follow_symlinks=False).st_mode
                raise refusal(folder, mode) from None
            with contextlib.suppress(FileExistsError):  # another process makes it too
                os.mkdir(folder.name, dir_fd=above)
            if durable:
                os.fsync(above)
    raise CorruptError(folder, "it disappears while it is used")


@contextlib.contextmanager
def open_folder(
    folder: Path, root: Path | None = None, *, create: bool = False, durable: bool = True
) -> Iterator[int]:
    """Yield a descriptor of a folder, for functions that take `dir_fd`.

    Args:
        folder: the folder.
        root: the cache's folder; what it is itself does not matter. None: links are followed.
        create: whether to make the folders that are missing, those above `root` too.
        durable: whether these must survive a power cut.

    Raises:
        CorruptError: a link, or anything else that is no folder, is where a folder belongs.
        OSError: it cannot be opened; FileNotFoundError: it does not exist.
    """
    base = folder if root is None else root
    parts = folder.relative_to(base).parts
    if ".." in parts:
        raise CorruptError(folder, "not below its cache, refused")
    if create:
        _make_above(base, durable)
    fd, here = os.open(base, _FOLDER), base
    try:
        for part in parts:
            here = here / part
            inner = _enter(fd, here, create, durable)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def _make_above(folder: Path, durable: bool) -> None:
    if durable and not folder.is_dir():
        _make_above(folder.parent, durable)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)
    elif not durable:
        folder.mkdir(parents=True, exist_ok=True)


def make_folder(folder: Path, root: Path | None = None, *, durable: bool = True) -> None:
    """Create `folder` and its parents, where they are missing. Arguments and errors: see `open_folder`."""
    with open_folder(folder, root, create=True, durable=durable):
        pass


def new_folder(folder: Path, root: Path) -> None:
    """Create a folder whose parent exists. The caller makes its name durable.

    Raises:
        FileExistsError: something has this name.
    """
    with open_folder(folder.parent, root) as above, _named(folder):
        os.mkdir(folder.name, dir_fd=above)


def create_file(path: Path, root: Path | None) -> int:
    """Create a file in a folder that exists, and return a descriptor to write to.

    Raises:
        FileExistsError: something has this name.
    """
    with open_folder(path.parent, root) as folder:
        return _create(path, folder, os.O_WRONLY)


def _create(path: Path, folder: int, mode: int) -> int:
    flags = mode | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with _named(path):
        return os.open(path.name, flags, 0o666, dir_fd=folder)


def open_in_place(path: Path, root: Path) -> int:
    """Open a file of the cache to read it and write it in place; create it, and its folder, if missing.

    Raises:
        CorruptError: it is a link, a FIFO, a device or a folder, or has a second name (a hard link).
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    with open_folder(path.parent, root, create=True, durable=False) as folder, _named(path):
        _check_file(path, folder)
        fd = os.open(path.name, flags, 0o666, dir_fd=folder)
    if os.fstat(fd).st_nlink > 1:
        os.close(fd)
        raise CorruptError(path, "it has several names (hard links), refused", f"remove {path}")
    return fd


def _check_file(path: Path, folder: int) -> None:
    """Raise CorruptError if something that is no regular file has the name of `path`."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode
        if not stat.S_ISREG(mode):
            raise refusal(path, mode)


@contextlib.contextmanager
def new_file(
    path: Path, fence: Fence | None = None, *, root: Path | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """Yield a file to write and read back. It becomes `path` when the block ends without an error.

    Args:
        path: final name. An existing file is replaced; after an error it is unchanged.
        fence: called before the rename.
        root: see the top of this file.
        durable: whether the file must survive a power cut. Without, it costs no wait for the disk; then the
            reader must notice a torn file, by its seal or hash.

    Raises:
        CorruptError: see `open_folder`; or `path` is no file.
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    with open_folder(path.parent, root, create=True, durable=durable) as folder:
        if root is not None:
            _check_file(path, folder)
        try:
            with os.fdopen(_create(temporary, folder, os.O_RDWR), "r+b") as file:
                yield file
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if fence is not None:
                fence()
            with _named(temporary, path):
                os.rename(temporary.name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary.name, dir_fd=folder)
            raise
        if durable:
            os.fsync(folder)


def write_atomic(
    path: Path, data: bytes, fence: Fence | None = None, *, root: Path | None = None
) -> None:
    """Write `data` to `path` atomically and durably. Arguments and errors: see `new_file`."""
    with new_file(path, fence, root=root) as file:
        file.write(data)


def move(path: Path, target: Path, root: Path) -> None:
    """Rename a file or folder of the cache durably; the folder of `target` is created."""
    with (
        open_folder(path.parent, root) as old,
        open_folder(target.parent, root, create=True) as new,
    ):
        with _named(path, target):
            os.rename(path.name, target.name, src_dir_fd=old, dst_dir_fd=new)
        os.fsync(new)
        if path.parent != target.parent:
            os.fsync(old)


def remove_file(path: Path, root: Path | None) -> None:
    """Remove one name durably. Of a link, that is the link itself."""
    with open_folder(path.parent, root) as folder:
        with _named(path):
            os.unlink(path.name, dir_fd=folder)
        os.fsync(folder)


def remove_tree(folder: Path, root: Path) -> None:
    """Remove a folder with all that is in it, durably. Links in it are removed, not followed."""
    with open_folder(folder.parent, root) as above:
        os.close(_enter(above, folder, create=False, durable=False))  # raises for a link
        try:
            with _named(folder):
                shutil.rmtree(folder.name, dir_fd=above)
        except RecursionError:
            raise CorruptError(folder, "nested too deeply", f"remove {folder} yourself") from None
        os.fsync(above)


# ---- what is there


def entries(top: Path, root: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield everything at or below `top` that is no folder, with the stat of itself, in no order.

    Raises:
        CorruptError: a folder above `top` is a link, or folders are nested too deeply.
    """
    refuse_links(top.parent, root)
    with contextlib.suppress(FileNotFoundError):  # removed just now
        if not stat.S_ISDIR((found := top.lstat()).st_mode):
            yield top, found
            return
    folders = [(top, 0)]
    while folders:
        folder, depth = folders.pop()
        if depth > MAX_DEPTH:
            raise CorruptError(folder, "nested too deeply", f"remove {folder} yourself")
        with contextlib.suppress(FileNotFoundError), os.scandir(folder) as found_here:
            for entry in found_here:
                if entry.is_dir(follow_symlinks=False):
                    folders.append((folder / entry.name, depth + 1))
                else:
                    with contextlib.suppress(FileNotFoundError):
                        yield folder / entry.name, entry.stat(follow_symlinks=False)


def regular_files(top: Path, root: Path) -> list[Path]:
    """Return all files at or below `top`, sorted; links are none."""
    return sorted(path for path, found in entries(top, root) if stat.S_ISREG(found.st_mode))


def strangers(root: Path) -> list[tuple[Path, int]]:
    """Return the links, FIFOs, sockets and devices in a cache, and its mode of each, sorted by path."""
    found = []
    for name in (*DATA_FOLDERS, LISTING):
        for path, status in entries(root / name, root):
            if not stat.S_ISREG(status.st_mode):
                found.append((path, status.st_mode))
    return sorted(found)


def refuse_strangers(root: Path) -> None:
    """Raise CorruptError if a cache has a link, FIFO, socket or device anywhere."""
    for path, mode in strangers(root):
        raise refusal(path, mode)


def disk_full(error: OSError, where: object) -> DiskError | None:
    """Return `error` as a DiskError if it reports a full disk or quota, else None."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return DiskError(
        f"disk full ({where}); everything committed is kept: free some space and run the same command again"
    )


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn an OSError of the block into a DiskError: one line that says what to do."""
    try:
        yield
    except OSError as error:
        place = error.filename or where
        if error.errno == errno.EXDEV:
            why = (
                f"{place} and {error.filename2} are on different disks: move the whole cache to one of them, "
                "and make its folder a link if it needs the old name"
            )
        else:
            why = (
                f"{place}: {error.strerror or error}; everything committed is kept: "
                "run the same command again"
            )
        raise disk_full(error, place) or DiskError(why) from error
