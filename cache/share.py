"""Prepare a cache for being read over the network: write listing.json at its root.

python -m cache.share --features cache       # then serve or upload the folder: a web server, S3, the hub

Run it again whenever the cache has changed. Its readers can see the texts and the sources as recorded: URLs,
and absolute paths of local files. A cache contains no images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, CorruptError
from cache.format.spec import ARRAYS
from cache.maintenance.encode_command import encode_command
from cache.remote.listing import listing_bytes
from cache.store.commits import read_commits
from cache.store.files import refuse_strangers, write_atomic
from cache.store.paths import LISTING, CacheRoot
from cache.store.space import read_info
from configs import UserError, command, parse
from configs.console import bytes_text


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to share."""

    features: Path = Path("cache")
    """Folder of the cache."""


def main() -> None:
    """Run the command."""
    options = parse(Options, prog="python -m cache.share", description=__doc__)
    root = CacheRoot.existing(options.features)
    print(share(root))


def share(root: CacheRoot) -> str:
    """Write listing.json, and return a line that describes it.

    Raises:
        UserError: the cache has no space.
        CorruptError: a table is damaged, or a shard is missing or has another size than committed.
    """
    refuse_strangers(root.path)  # their targets would be listed, and no client could have them
    if not root.space_names():
        raise UserError(
            f"no feature space under {root.path}/ to share; create one: {encode_command(root)}"
        )
    shards = nbytes = 0
    for name in root.space_names():
        for size in _shard_sizes(root, name):
            shards, nbytes = shards + 1, nbytes + size
    data, entries = listing_bytes(root)
    write_atomic(root.path / LISTING, data, root=root.path)
    tables = sum(entry.nbytes for entry in entries.values())
    return (
        f"{root.path / LISTING}: {len(entries):,} tables ({bytes_text(tables)}), which readers copy, and "
        f"{shards:,} shards ({bytes_text(nbytes)}), of which they read what they use"
    )


def _shard_sizes(root: CacheRoot, name: str) -> list[int]:
    """Return the bytes of each shard of a space, after comparing them with its commits."""
    paths = root.space(name)
    info, sizes = read_info(paths), []
    for array in ARRAYS:
        for commit in read_commits(paths, info, array):
            path = paths.shard(array, commit.shard)
            found = path.stat().st_size if path.exists() else 0
            if found != commit.nbytes:
                what = f"{found} bytes, not {commit.nbytes}" if found else "missing"
                raise CorruptError(paths.shard(array, commit.shard), what)
            sizes.append(commit.nbytes)
    return sizes


if __name__ == "__main__":
    command(main, errors=(CacheError,))
