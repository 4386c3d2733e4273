"""Open the files of a cache, and decode what they say: the only way in for what somebody else may have made.

    with open_file(path, root, most=1 << 30) as file:    # a regular file, no link, at most 1 GiB
        ...
    values = decode(data, Listing, path)                 # strict JSON into a typed structure

A seal shows that bytes are those that were written, not who wrote them. So every name, number and link in a
cache is untrusted, and what does not fit is a CorruptError: one line with the file's name.

    with open_regular(path) as file:                     # a file of a data set, a run or a model
        ...
    values = fit(parse_json(data), Listing)

Files outside a cache may be links, to regular files. What does not fit is an OSError or a ValueError, because
the caller knows what the user can do about it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec

from cache.errors import CorruptError, command_line, features_words

T = TypeVar("T")

MAX_JSON_BYTES = 64 << 20
"""Bytes of a JSON file, at most, where its reader names no other limit."""

_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
NO_LINKS = (
    "a cache has files and folders alone: put what it leads to in its place (mount --bind, or move the whole "
    "cache and make its folder the link), or remove it"
)
"""What to do about a link, a FIFO or a device in a cache. The folder that `--features` names may be one."""


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
    return os.fdopen(open_descriptor(path, root, most=most)[0], "rb")


def open_descriptor(
    path: Path, root: Path | None = None, *, most: int | None = None
) -> tuple[int, int]:
    """Return the descriptor of an open file, and how many bytes it has; see `open_file`."""
    if root is not None:
        refuse_links(path.parent, root)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    try:
        fd = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EMLINK):
            raise refusal(path, path.lstat().st_mode) from None
        if error.errno == errno.ENOTDIR:
            raise CorruptError(path, "a file is where its folder belongs", NO_LINKS) from None
        raise
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise refusal(path, found.st_mode)
        if most is not None and found.st_size > most:
            raise CorruptError(path, f"{found.st_size:,} bytes, at most {most:,} are read")
        return fd, found.st_size
    except BaseException:
        os.close(fd)
        raise


def read_file(path: Path, root: Path | None = None, *, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file; arguments and errors are those of `open_file`."""
    fd, size = open_descriptor(path, root, most=most)
    try:
        data = os.read(fd, size)  # all of it, unless the call is interrupted
        while len(data) < size and (more := os.read(fd, size - len(data))):
            data += more
    finally:
        os.close(fd)
    return data


def refuse_links(folder: Path, root: Path) -> None:
    """Raise CorruptError if `folder`, or one between it and `root`, is a link. Missing ones are none."""
    here = root
    for part in folder.relative_to(root).parts:
        here = here / part
        try:
            mode = here.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return
        if stat.S_ISLNK(mode):
            raise refusal(here, mode)


def kind_of(mode: int) -> str:
    """Return what a mode of `stat` says in words: `a link`."""
    return _KINDS.get(stat.S_IFMT(mode), "no file")


def refusal(path: Path, mode: int) -> CorruptError:
    """Return the error about what has the name of a file or folder of a cache, and is none."""
    way_out = NO_LINKS
    if words := features_words(path / "it"):  # of `spaces` too
        way_out += f": {command_line('cache.gc', '--delete', *words)}"
    return CorruptError(path, f"{kind_of(mode)}, refused", way_out)


# ---- files outside a cache


def what_is(mode: int) -> str:
    """Return what a mode of `stat` says, such as `a FIFO, not a file`; empty for a regular file."""
    kind = stat.S_IFMT(mode)
    return "" if kind == stat.S_IFREG else f"{_KINDS.get(kind, 'something else')}, not a file"


def check_regular(path: str | Path, *, most: int | None = None) -> os.stat_result:
    """Return the status of a regular file, or of the one that a link leads to, without opening it.

    For libraries that open a path themselves: opening a FIFO waits for ever, and a device has no end.

    Args:
        path: the file.
        most: bytes that it may have.

    Raises:
        OSError: there is no such file, it is something else, or it is larger. `strerror` is the reason.
    """
    found = os.stat(path)  # noqa: PTH116 - also of paths with surrogates, and often called
    if what := what_is(found.st_mode):
        code = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.ENXIO
        raise OSError(code, what, str(path))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"{found.st_size:,} bytes, at most {most:,} are read", str(path))
    return found


def open_regular(path: str | Path, *, most: int | None = None) -> BinaryIO:
    """Open a regular file, or the one that a link leads to, for reading; see `check_regular`."""
    # Opening alone may act on a device, so its kind is looked at before.
    check_regular(path, most=most)
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    return os.fdopen(fd, "rb")


def read_regular(path: str | Path, *, most: int = MAX_JSON_BYTES) -> bytes:
    """Return the bytes of a regular file, or of the one that a link leads to; see `check_regular`."""
    with open_regular(path, most=most) as file:
        size = os.fstat(file.fileno()).st_size  # `read(most)` would take that much memory first
        return file.read(min(size, most))


# ---- JSON


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
        return fit(parse_json(data), kind)
    except ValueError as error:
        raise CorruptError(path, f"not what this program writes: {str(error)[:200]}") from None


def fit(value: Any, kind: type[T]) -> T:
    """Return plain values as a typed structure, as `decode` does.

    Raises:
        ValueError: they are no `kind`. The reason is one line.
    """
    try:
        return msgspec.convert(value, kind)
    except ValueError as error:  # msgspec.ValidationError is a ValueError
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def parse_json(data: bytes | str, *, not_finite: bool = False) -> Any:
    """Return the value of a JSON text that all readers read in the same way.

    Args:
        data: the text.
        not_finite: whether NaN and Infinity are numbers, as `json.dumps` writes them.

    Raises:
        ValueError: it is no JSON in UTF-8, has a key twice, NaN, half a character or too deep a nesting, in
            one line.
    """
    # msgspec's own decoder keeps the last of two equal keys.
    try:
        text = data if isinstance(data, str) else data.decode()
        constant = float if not_finite else _no_constant
        value = json.loads(text, object_pairs_hook=_object, parse_constant=constant)
        if _SURROGATE.search(text):
            # Half a character is refused; one that stands for a byte of a file's name may be written.
            json.dumps(value, ensure_ascii=False).encode(errors="surrogateescape")
        return value
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        raise ValueError(" ".join(str(error).split())) from None


_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:40]!r} twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
