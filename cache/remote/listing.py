"""Which files of a cache another machine needs before it reads a row, and `listing.json`, which names them.

A plain web server cannot be asked what it has. `python -m cache.share` writes a sealed list of the tables
(name, size, sha256) at the cache's root; shards are not in it: the commits say what they are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cache.errors import CacheError, CorruptError
from cache.format.checksums import check_seal_file, read_sealed_json, sealed_json
from cache.format.spec import ARRAYS
from cache.remote.retry import Entry
from cache.store.paths import LISTING, CacheRoot

FORMAT = 1
MOST_BYTES = 512 << 20
"""No list is larger: 5 million files."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_KIND = "|".join(ARRAYS)
_SAMPLES = re.compile(rf"samples/(?P<dataset>{_NAME})/part-\d{{5}}\.parquet")
_MEDIA = re.compile(rf"media/part-\d{{20}}-{_NAME}\.parquet")
_SPACE = re.compile(
    rf"spaces/(?P<space>{_NAME})/(space\.json|features/((?:{_KIND})/)?zarr\.json"
    rf"|commits/(?:{_KIND})-\d{{8}}\.parquet|index/{_NAME})"
)


def is_table(name: str) -> bool:
    """Whether a name is one of those that tables have below a cache's root: no other is ever written."""
    if ".." in name or name.endswith(".partial"):
        return False
    return any(pattern.fullmatch(name) for pattern in (_SAMPLES, _MEDIA, _SPACE))


def is_sealed(name: str) -> bool:
    """Whether a table is under a seal as a whole; the derived index has checksums of its own."""
    return "/index/" not in name


def dataset_of(name: str) -> str | None:
    """The data set whose samples a file holds."""
    found = _SAMPLES.fullmatch(name)
    return found["dataset"] if found else None


def space_of(name: str) -> str | None:
    """The space a file belongs to."""
    found = _SPACE.fullmatch(name)
    return found["space"] if found else None


def space_names(names: Iterable[str]) -> list[str]:
    """The spaces that have a space.json, sorted."""
    return sorted(n.split("/")[1] for n in names if n.startswith("spaces/") and "space.json" in n)


def local_tables(root: CacheRoot) -> list[str]:
    """The tables below a folder, sorted, whole files alone."""
    names = []
    for top in (root.samples_dir, root.media_dir):
        names += [path.relative_to(root.path).as_posix() for path in top.rglob("*.parquet")]
    for name in root.space_names():
        paths = root.space(name)
        found = [paths.space_json, paths.group_json, *map(paths.array_json, ARRAYS)]
        found += [*paths.commits_dir.glob("*.parquet"), *(paths.root / "index").glob("*")]
        names += [path.relative_to(root.path).as_posix() for path in found if path.is_file()]
    return sorted(filter(is_table, names))


def listing_bytes(root: CacheRoot) -> tuple[bytes, dict[str, Entry]]:
    """The file `listing.json` of a folder, and what is in it.

    Raises:
        CorruptError: a table is not what was written.
    """
    entries = {}
    for name in local_tables(root):
        path = root.path / name
        if is_sealed(name):
            check_seal_file(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = Entry(nbytes=file.tell(), tag=f"sha256:{digest}")
    # The digests stand without `sha256:`, which is a seal's own mark.
    files = {name: [entry.nbytes, entry.tag[7:]] for name, entry in entries.items()}
    return sealed_json({"format": FORMAT, "files": files}), entries


def read_listing(path: Path, place: str) -> dict[str, Entry]:
    """What a `listing.json` from elsewhere says, every name and figure checked.

    Args:
        path: a copy of it.
        place: the cache's, for messages.

    Raises:
        CacheError: it is damaged, of another version, or names what no cache has.
    """
    try:
        values = read_sealed_json(path)
    except (CorruptError, ValueError):
        raise CacheError(
            f"{place}/{LISTING}: its bytes do not match its seal; make it again where the cache is: "
            "python -m cache.share"
        ) from None
    if values.get("format") != FORMAT or not isinstance(values.get("files"), Mapping):
        raise CacheError(f"{place}/{LISTING}: of another version; use one that wrote it, or newer")
    return {name: _entry(name, value, place) for name, value in values["files"].items()}


def _entry(name: str, value: Any, place: str) -> Entry:
    if not is_table(name):
        raise CacheError(f"{place}/{LISTING}: names {name[:80]!r}, which no cache has; not touched")
    match value:
        case [int(nbytes), str(digest)] if nbytes > 0 and re.fullmatch("[0-9a-f]{64}", digest):
            return Entry(nbytes=nbytes, tag=f"sha256:{digest}")
    raise CacheError(f"{place}/{LISTING}: says nonsense of {name}")


def as_tables(names: Mapping[str, Entry]) -> dict[str, Entry]:
    """Of all files a store has, the tables; others are left alone."""
    return {name: entry for name, entry in names.items() if is_table(name) and entry.nbytes > 0}
