"""Tell which files of a cache are tables, and read and write `listing.json`, which names them.

A reader on another machine copies all tables before it reads a row. A plain web server cannot list its
files, so `python -m cache.share` writes a sealed list of the tables (name, bytes, sha256) to the root of the
cache. Shards are not in it: the commits name them.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cache.errors import CacheError, CorruptError, RequestError
from cache.format.checksums import check_seal, check_seal_file, sealed_json
from cache.format.gate import decode, fit, open_file
from cache.format.spec import ARRAYS
from cache.format.tail import MAX_TAIL_BYTES, TAIL
from cache.store.paths import LISTING, CacheRoot, is_dataset_name

FORMAT = 1
MAX_LISTING_BYTES = 64 << 20
"""The largest listing that is read: 64 MiB name about half a million tables, of 100 million rows."""
MAX_NAME_BYTES = 200
"""Bytes of each part of a table's name, at most: file systems take 255, of which the suffix of an unfinished
copy needs some."""
MAX_BYTES = (
    (".json", 1 << 20),
    (".parquet", 1 << 38),
    (f"/{TAIL}", MAX_TAIL_BYTES + (1 << 20)),
    ("", 1 << 40),  # index files
)
"""End of a table's name -> the most bytes it may have. The disk's room is another limit."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ARRAY = "|".join(ARRAYS)
_TABLE = re.compile(
    rf"samples/(?P<dataset>[^/]+)/part-\d{{5}}\.parquet"
    rf"|media/part-\d{{20}}-{_NAME}\.parquet"
    rf"|spaces/(?P<space>{_NAME})/(space\.json|features/((?:{_ARRAY})/)?zarr\.json"
    rf"|commits/(?:{_ARRAY})-\d{{8}}\.parquet|index/{_NAME}|{re.escape(TAIL)})",
    re.ASCII,  # of digits, too
)


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and version of a file in a store."""

    nbytes: int
    """Size in bytes."""
    tag: str
    """Changes with the content: `sha256:<64 hex>` if the store has one, else the store's own tag."""


def is_table(name: str) -> bool:
    """Return whether a name, relative to the root, is that of a table. No other name is ever written."""
    found = _TABLE.fullmatch(name) if len(name) <= 4 * MAX_NAME_BYTES else None
    if not found or ".." in name or name.endswith(".partial"):
        return False
    if found["dataset"] is not None and not is_dataset_name(found["dataset"]):
        return False
    return all(len(part.encode()) <= MAX_NAME_BYTES for part in name.split("/"))


def is_sealed(name: str) -> bool:
    """Return whether a table ends with a seal of all its bytes.

    An index file has checksums of its own, and the sha256 of a tail is in space.json.
    """
    return "/index/" not in name and not is_tail(name)


def is_tail(name: str) -> bool:
    """Return whether a table is the weights of a space's tail, which only training reads."""
    return name.endswith(f"/{TAIL}")


def owner_of(name: str) -> tuple[str | None, str | None]:
    """Return the data set and the space that a table belongs to: one of them, or for media none."""
    found = _TABLE.fullmatch(name)
    return (found["dataset"], found["space"]) if found else (None, None)


def local_tables(root: CacheRoot) -> list[str]:
    """Return the names of the complete tables below a folder, sorted."""
    names = []
    for top in (root.samples_dir, root.media_dir):
        names += [path.relative_to(root.path).as_posix() for path in top.rglob("*.parquet")]
    for name in root.space_names():
        paths = root.space(name)
        found = [paths.space_json, paths.tail, paths.group_json, *map(paths.array_json, ARRAYS)]
        found += [*paths.commits_dir.glob("*.parquet"), *paths.index_dir.glob("*")]
        names += [path.relative_to(root.path).as_posix() for path in found if path.is_file()]
    return sorted(filter(is_table, names))


def listing_bytes(root: CacheRoot) -> tuple[bytes, dict[str, FileInfo]]:
    """Return the content of a folder's `listing.json`, and the tables that it names.

    Raises:
        CorruptError: a table does not have the bytes that were written.
    """
    tables = {}
    for name in local_tables(root):
        path = root.path / name
        if is_sealed(name):
            check_seal_file(path, root.path)
        with open_file(path, root.path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            tables[name] = FileInfo(nbytes=file.tell(), tag=f"sha256:{digest}")
    # Without the prefix `sha256:`, because a seal is found by that text.
    files = {name: [info.nbytes, info.tag.removeprefix("sha256:")] for name, info in tables.items()}
    return sealed_json({"format": FORMAT, "files": files}), tables


def read_listing(data: bytes, url: str) -> dict[str, FileInfo]:
    """Validate the bytes of another machine's `listing.json`, with every name and number in it.

    Args:
        data: the bytes.
        url: the URL of the cache, for error messages.

    Raises:
        CacheError: the listing is damaged, of another version, or names a file that is no table.
    """
    path = Path(LISTING)
    try:
        check_seal(data, path)
    except CorruptError:
        raise CacheError(
            f"{url}/{LISTING}: its bytes do not match its seal; write it again where the cache is: "
            "python -m cache.share --features DIR"
        ) from None
    try:
        values = decode(data, dict[str, Any], path)
        if values.get("format") != FORMAT:
            raise CacheError(
                f"{url}/{LISTING}: another version of this package wrote it; install that one or a newer one"
            )
        files = fit(values, _Listing).files
    except (CorruptError, ValueError) as error:
        what = error.what if isinstance(error, CorruptError) else str(error)
        raise CacheError(f"{url}/{LISTING}: {what}; refused") from None
    return {name: _listed(name, value, url) for name, value in files.items()}


class _Listing(msgspec.Struct, forbid_unknown_fields=True):
    format: int
    files: dict[str, Any]
    """Name -> [bytes, sha256]."""
    seal: str


class _Entry(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    nbytes: Annotated[int, msgspec.Meta(ge=1)]
    digest: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


def _listed(name: str, value: Any, url: str) -> FileInfo:
    if not is_table(name):
        raise CacheError(
            f"{url}/{LISTING}: names {name[:80]!a}, which is no table of a cache; refused"
        )
    try:
        entry = fit(value, _Entry)
    except ValueError:
        raise CacheError(f"{url}/{LISTING}: no valid size and sha256 of {name}") from None
    try:
        return file_info(name, entry.nbytes, f"sha256:{entry.digest}")
    except RequestError as error:
        raise CacheError(f"{url}/{LISTING}: {error.reason}; refused") from None


def file_info(name: str, nbytes: int, tag: str) -> FileInfo:
    """Return the size and version of a table as a store states them.

    Raises:
        RequestError: no table of its kind is that large.
    """
    most = next(most for end, most in MAX_BYTES if name.endswith(end))
    if not 0 <= nbytes <= most:
        raise RequestError(f"{name}: {nbytes:,} bytes, at most {most:,} are copied", again=False)
    if len(tag) > MAX_NAME_BYTES:
        tag = f"of:{hashlib.sha256(tag.encode(errors='replace')).hexdigest()}"
    return FileInfo(nbytes=nbytes, tag=tag)
