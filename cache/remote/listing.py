"""Tell which files of a cache are tables, and read and write `listing.json`, which names them.

A reader on another machine copies all tables before it reads a row. A plain web server cannot list its
files, so `python -m cache.share` writes a sealed list of the tables (name, bytes, sha256) to the root of the
cache. Shards are not in it: the commits name them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CorruptError
from cache.format.checksums import check_seal_file, read_sealed_json, sealed_json
from cache.format.spec import ARRAYS
from cache.store.paths import LISTING, CacheRoot, is_dataset_name

FORMAT = 1
MAX_LISTING_BYTES = 512 << 20
"""The largest listing that is read: 512 MiB name about 5 million files."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ARRAY = "|".join(ARRAYS)
_TABLE = re.compile(
    rf"samples/(?P<dataset>[^/]+)/part-\d{{5}}\.parquet"
    rf"|media/part-\d{{20}}-{_NAME}\.parquet"
    rf"|spaces/(?P<space>{_NAME})/(space\.json|features/((?:{_ARRAY})/)?zarr\.json"
    rf"|commits/(?:{_ARRAY})-\d{{8}}\.parquet|index/{_NAME})"
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
    found = _TABLE.fullmatch(name)
    if not found or ".." in name or name.endswith(".partial"):
        return False
    return found["dataset"] is None or is_dataset_name(found["dataset"])


def is_sealed(name: str) -> bool:
    """Return whether a table ends with a seal of all its bytes; an index file has checksums of its own."""
    return "/index/" not in name


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
        found = [paths.space_json, paths.group_json, *map(paths.array_json, ARRAYS)]
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
            check_seal_file(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            tables[name] = FileInfo(nbytes=file.tell(), tag=f"sha256:{digest}")
    # Without the prefix `sha256:`, because a seal is found by that text.
    files = {name: [info.nbytes, info.tag.removeprefix("sha256:")] for name, info in tables.items()}
    return sealed_json({"format": FORMAT, "files": files}), tables


def read_listing(path: Path, url: str) -> dict[str, FileInfo]:
    """Read a copy of another machine's `listing.json`, and validate every name and number in it.

    Args:
        path: the copy.
        url: the URL of the cache, for error messages.

    Raises:
        CacheError: the listing is damaged, of another version, or names a file that is no table.
    """
    try:
        values = read_sealed_json(path)
    except (CorruptError, ValueError):
        raise CacheError(
            f"{url}/{LISTING}: its bytes do not match its seal; write it again where the cache is: "
            "python -m cache.share --features DIR"
        ) from None
    if values.get("format") != FORMAT or not isinstance(values.get("files"), Mapping):
        raise CacheError(
            f"{url}/{LISTING}: another version of this package wrote it; install that one or a newer one"
        )
    return {name: _file_info(name, value, url) for name, value in values["files"].items()}


def _file_info(name: str, value: Any, url: str) -> FileInfo:
    if not is_table(name):
        raise CacheError(
            f"{url}/{LISTING}: names {name[:80]!r}, which is no table of a cache; refused"
        )
    match value:
        case [int(nbytes), str(digest)] if nbytes > 0 and re.fullmatch("[0-9a-f]{64}", digest):
            return FileInfo(nbytes=nbytes, tag=f"sha256:{digest}")
    raise CacheError(f"{url}/{LISTING}: no valid size and sha256 of {name}")
