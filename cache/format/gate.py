"""Open the files of a cache, and decode what they say: the only way in for what somebody else may have made.

    with open_file(path, root, most=1 << 30) as file:    # a regular file, no link, at most 1 GiB
        ...
    values = decode(data, Listing, path)                 # strict JSON into a typed structure

A seal shows that bytes are those that were written, not who wrote them. So every name, number and link in a
cache is untrusted, and what does not fit is a CorruptError: one line with the file's name.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from cache.errors import CorruptError

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""Bytes of a JSON file, at most, where its reader names no other limit."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NO_LINKS = "a cache has files and folders alone: put what it leads to in its place, or remove it"
"""What to do about a link, a FIFO or a device in a cache."""


def open_file(path: Path, root: Path | None = None, *, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting for anything.

    Args:
        path: the file.
        root: a folder above it, between which and the file no folder may be a link. What `root` itself is
            does not matter: the user named it.
        most: bytes that the file may have.

    Raises:
        CorruptError: it is a link, a folder, a FIFO or a device, is reached through a link, or is larger.
        OSError: it cannot be opened; FileNotFoundError: there is no such file.
    """
    if root is not None:
        refuse_links(path.parent, root)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise _not_a_file(path, path.lstat().st_mode) from None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _not_a_file(path, found.st_mode)
        if most is not None and found.st_size > most:
            raise CorruptError(path, f"{found.st_size:,} bytes, at most {most:,} are read")
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_file(path: Path, root: Path | None = None, *, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file; arguments and errors are those of `open_file`."""
    with open_file(path, root, most=most) as file:
        data = file.read(most + 1)
    if len(data) > most:  # it grew meanwhile
        raise CorruptError(path, f"more than the {most:,} bytes that are read")
    return data


def refuse_links(folder: Path, root: Path) -> None:
    """Raise CorruptError if `folder`, or one between it and `root`, is a link. Missing ones are none."""
    here = root
    for part in folder.relative_to(root).parts:
        here = here / part
        try:
            mode = here.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISLNK(mode):
            raise _not_a_file(here, mode)


def _not_a_file(path: Path, mode: int) -> CorruptError:
    return CorruptError(path, f"{_KINDS.get(stat.S_IFMT(mode), 'no file')}, refused", NO_LINKS)


def decode(data: bytes | str, kind: type[T], path: Path) -> T:
    """Return a JSON text as a typed structure.

    Args:
        data: the text.
        kind: a dataclass, `msgspec.Struct` or other type that `msgspec.convert` knows. Ranges are stated by
            `msgspec.Meta`; a `__post_init__` may raise ValueError.
        path: the file it is from, for messages.

    Raises:
        CorruptError: it is no JSON in UTF-8, has a key twice, NaN or too deep a nesting, or is no `kind`.
    """
    try:
        return msgspec.convert(_parse(data), kind)
    except (ValueError, RecursionError) as error:  # msgspec.ValidationError is a ValueError
        what = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else " ".join(str(error).split())
        )
        raise CorruptError(path, f"not what this program writes: {what[:200]}") from None


def _parse(data: bytes | str) -> Any:
    # msgspec's own decoder keeps the last of two equal keys.
    text = data if isinstance(data, str) else data.decode()
    return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
