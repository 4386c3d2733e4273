"""Name every file below a cache root.

cache/samples/<data set>/part-00000.parquet
cache/media/part-<ns>-<job>.parquet
cache/spaces/<space>/space.json  commits/<array>-<shard>.parquet  features/<array>/c/<shard>/...
cache/spaces/<space>/index/<array>.bin  tail.safetensors
cache/locks/<space>/driver.lock  alive-<token>  workers.lock  worker-<id>.lock;  locks/id
cache/damaged/...  cache/garbage/...
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, CorruptError, NotFoundError
from cache.format.checksums import read_sealed_json
from cache.format.gate import refuse_links
from cache.format.space_info import MAX_INFO_BYTES
from cache.format.spec import ARRAYS, CONTAINERS, NAME
from cache.format.tail import TAIL

MAX_NAME_BYTES = 200
"""Longest name of a data set, in UTF-8: file systems allow 255 bytes."""
DATASET_NAME = (
    "a name has letters and digits of any script, '.', '_' and '-', begins with a letter or digit, and "
    f"takes at most {MAX_NAME_BYTES} bytes"
)
"""Rule for the name of a data set, which becomes the name of a folder."""
SHARD_NUMBER = "(?:0|[1-9][0-9]{0,7})"
"""Pattern of the number of a shard in decimal digits; the name of its commit has eight of them."""
MAX_SHARD = 10**8 - 1
"""The greatest number of a shard: the name of a commit has eight digits."""
_COMMIT_NAME = re.compile(rf"({'|'.join(ARRAYS)})-([0-9]{{8}})\.parquet")
_SHARD_NAME = re.compile(SHARD_NUMBER)


_FILES_OF_A_CACHE = (
    *("spaces/*", "samples/*/part-*.parquet", "media/part-*.parquet"),
    *("locks/*", "damaged/*", "garbage/*"),
)
"""Patterns of files that only a cache has: a folder of photos may be named `media` too."""

LISTING = "listing.json"
"""The one file at the root of a cache, written by `cache.share`."""

SCHEMES = ("https", "http", "s3", "hf", "gs", "gcs", "az", "abfs", "ftp", "sftp", "file")
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}(.*)", re.IGNORECASE | re.DOTALL)
_MISSPELT = re.compile(rf"[a-z][a-z0-9+.-]+:/|({'|'.join(SCHEMES)})(:|//)", re.IGNORECASE)
"""The beginning of what nobody calls a folder: `s3:/x`, `http:///x`, `htps://x`, `hf:x`, `https//x`."""
_BAD_HOST = re.compile(r"[\s\\<>\"^`{|}]|^\.|\.\.|^:|^$")


def is_dataset_name(name: str) -> bool:
    """Return whether `name` can be that of a data set."""
    return bool(name) and as_dataset_name(name) == name


def as_dataset_name(text: str) -> str:
    """Return the name of a data set that is closest to `text`; '' if it has no letter or digit.

    The name is in Unicode's form NFC, because one name in two forms would be two folders on Linux and one on
    macOS.
    """
    text = unicodedata.normalize("NFC", text)
    kept = "".join(c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in text)
    name = re.sub(r"\.{2,}", ".", "-".join(kept.split()))
    letters = (i for i, c in enumerate(name) if unicodedata.category(c)[0] in "LN")
    return name[next(letters, len(name)) :].encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def is_url(features: str | Path) -> str | None:
    """Return the URL that `--features` names, or None. A Path may have shortened it to `https:/x`.

    Raises:
        CacheError: it is neither a valid URL nor a folder that exists.
    """
    text = str(features)
    found = _URL.fullmatch(text)
    if found and (isinstance(features, Path) or text[len(found[1]) :].startswith("://")):
        host, _, rest = found[2].partition("/")
        # A repository of the hub is ORG/NAME, or datasets/ORG/NAME.
        if not _BAD_HOST.search(host) and (found[1].lower() != "hf" or rest.strip("/")):
            return f"{found[1].lower()}://{found[2]}"
    elif not _MISSPELT.match(text) or Path(text).exists():
        return None
    raise CacheError(
        f"{text}: no valid URL, and no folder of that name; features are in a folder, or at "
        "https://HOST/PATH, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME"
    )


@dataclass(frozen=True)
class CacheRoot:
    """A folder of samples, media and spaces: the one that `--features` names.

    Raises:
        CacheError: it is a URL. Commands that accept URLs call `cache.remote`, which makes a local copy.
    """

    path: Path

    def __post_init__(self) -> None:
        parts = Path(self.path).parts
        for at, part in enumerate(parts):
            if part.endswith(":") and part.lower().removesuffix(":") in SCHEMES:
                raise CacheError(
                    f"{part}//{'/'.join(parts[at + 1 :])}: this command needs a cache in a local folder "
                    "(--features DIR): it writes there, or reads all of it. URLs are read by "
                    "train.run, train.evaluate and cache.ls"
                )

    @staticmethod
    def existing(folder: Path) -> CacheRoot:
        """Return the cache in a folder that has one.

        Raises:
            CacheError: there is no such folder, it holds no file of a cache, or `folder` is a URL.
        """
        root = CacheRoot(folder)
        if not folder.is_dir():
            raise NotFoundError(f"no cache at {folder}/ (say where: --features DIR)")
        if not root.has_files():
            raise NotFoundError(
                f"no cache in {folder}/: it has no spaces, samples or media table (say where: --features DIR)"
            )
        return root

    def has_files(self) -> bool:
        """Return whether the folder has any file that only a cache has."""
        return any(next(self.path.glob(pattern), None) for pattern in _FILES_OF_A_CACHE)

    def samples(self, dataset: str) -> Path:
        """Return the file of samples of one data set.

        Raises:
            CacheError: the name cannot be that of a data set.
        """
        if not is_dataset_name(dataset):
            raise CacheError(f"data set name {dataset!r}: {DATASET_NAME}")
        return self.path / "samples" / dataset / "part-00000.parquet"

    @property
    def samples_dir(self) -> Path:
        """One folder for each data set."""
        return self.path / "samples"

    @property
    def media_dir(self) -> Path:
        """The parts of the media table."""
        return self.path / "media"

    @property
    def spaces_dir(self) -> Path:
        """One folder for each space."""
        return self.path / "spaces"

    @property
    def damaged_dir(self) -> Path:
        """Files that `cache.verify --repair` took out of the cache, in the same tree as there."""
        return self.path / "damaged"

    @property
    def garbage_dir(self) -> Path:
        """Folders that `cache.gc` has begun to remove."""
        return self.path / "garbage"

    def space(self, name: str) -> SpacePaths:
        """Return the files of the space `name`, which need not exist.

        Raises:
            CacheError: the name cannot be that of a space.
        """
        if not NAME.fullmatch(name):
            raise CacheError(
                f"space name {name[:200]!r}: a name has letters, digits, '.', '_' and '-', begins with a "
                "letter or digit, has no '..', and takes at most 200 characters"
            )
        return SpacePaths(self.spaces_dir / name)

    def space_folders(self) -> list[SpacePaths]:
        """Return all folders of spaces, sorted, including those without a space.json.

        What has another name than a space can have is not ours, such as `lost+found`: nothing uses it.

        Raises:
            CorruptError: one of them is a link, or `spaces` itself is.
        """
        refuse_links(self.spaces_dir, self.path)
        found = sorted(p for p in self.spaces_dir.glob("*") if NAME.fullmatch(p.name))
        for folder in found:
            refuse_links(folder, self.path)
        return [SpacePaths(folder) for folder in found if folder.is_dir()]

    def space_names(self) -> list[str]:
        """Return the names of the spaces that have a space.json, sorted.

        Raises:
            CorruptError: as for `space_folders`.
        """
        return [space.name for space in self.space_folders() if os.path.lexists(space.space_json)]


@dataclass(frozen=True)
class SpacePaths:
    """The files of one space. Its locks are outside of its folder, which holds checked bytes only."""

    root: Path

    @property
    def name(self) -> str:
        """Name of the space."""
        return self.root.name

    @property
    def cache_root(self) -> Path:
        """Folder of the cache that the space is in."""
        return self.root.parent.parent

    @property
    def space_json(self) -> Path:
        """Description of the space, written first."""
        return self.root / "space.json"

    @property
    def group_json(self) -> Path:
        """Zarr's description of the group of arrays."""
        return self.root / "features" / "zarr.json"

    @property
    def tail(self) -> Path:
        """Weights of the blocks behind the stored one, if space.json names them."""
        return self.root / TAIL

    def array(self, array: str) -> Path:
        """Return the folder of one array; in a Zarr space, it is a Zarr array."""
        return self.root / "features" / array

    def array_json(self, array: str) -> Path:
        """Return the zarr.json of one array."""
        return self.array(array) / "zarr.json"

    def shards_dir(self, array: str) -> Path:
        """Return the folder with a folder for each shard, where Zarr expects it."""
        return self.array(array) / "c"

    def shard_dir(self, array: str, number: int) -> Path:
        """Return the folder of one shard, in any container. The number is taken once it exists."""
        return self.shards_dir(array) / str(number)

    def shard(self, array: str, number: int) -> Path:
        """Return the file of one shard."""
        if self._container == "webdataset":
            return self.shard_dir(array, number) / f"{array}-{number:08d}.tar"
        return self.shard_dir(array, number) / "0" / "0"

    @property
    def _container(self) -> str:
        """`spec.container` of space.json; `zarr` as long as that cannot be read."""
        known: str | None = self.__dict__.get("_known_container")
        if known is None:
            try:
                values = read_sealed_json(self.space_json, self.cache_root, most=MAX_INFO_BYTES)
                known = values["spec"].get("container", "zarr")
            except (CorruptError, OSError, KeyError, AttributeError):
                return "zarr"
            if known not in CONTAINERS:
                return "zarr"
            self.__dict__["_known_container"] = known
        return known

    @property
    def commits_dir(self) -> Path:
        """One file for each committed shard."""
        return self.root / "commits"

    def commit(self, array: str, number: int) -> Path:
        """Return the commit file of a shard, which is written last and makes it exist."""
        return self.commits_dir / f"{array}-{number:08d}.parquet"

    def committed(self, array: str) -> list[int]:
        """Return the numbers of the committed shards, in order."""
        refuse_links(self.commits_dir, self.cache_root)
        names = (
            _COMMIT_NAME.fullmatch(p.name) for p in self.commits_dir.glob(f"{array}-*.parquet")
        )
        return sorted(int(name[2]) for name in names if name)

    def commit_stats(self, array: str) -> dict[int, tuple[int, int]]:
        """Return shard -> (bytes, time of the last change in ns) of the commit files of one array."""
        refuse_links(self.commits_dir, self.cache_root)
        stats = {}
        entries = os.scandir(self.commits_dir) if self.commits_dir.is_dir() else ()
        for entry in entries:
            name = _COMMIT_NAME.fullmatch(entry.name)
            if name and name[1] == array:
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    stat = entry.stat(follow_symlinks=False)
                    stats[int(name[2])] = stat.st_size, stat.st_mtime_ns
        return stats

    @property
    def index_dir(self) -> Path:
        """Files derived from the commits, which open faster."""
        return self.root / "index"

    def index(self, array: str) -> Path:
        """Return the index file of one array: the content of its commits as flat arrays."""
        return self.index_dir / f"{array}.bin"

    @property
    def has_commits(self) -> bool:
        """Whether any shard is committed."""
        return any(map(self.committed, ARRAYS))

    def started(self, array: str) -> list[int]:
        """Return the numbers that have a folder: committed, complete without a commit, or only begun."""
        refuse_links(self.shards_dir(array), self.cache_root)
        names = (p.name for p in self.shards_dir(array).glob("*"))
        return sorted(int(name) for name in names if _SHARD_NAME.fullmatch(name))

    @property
    def locks_dir(self) -> Path:
        """Folder of the locks of the writing job."""
        return self.cache_root / "locks" / self.name

    @property
    def driver_lock(self) -> Path:
        """Name and token of the newest driver."""
        return self.locks_dir / "driver.lock"

    @property
    def workers_lock(self) -> Path:
        """Lock that each worker of that job shares."""
        return self.locks_dir / "workers.lock"

    def alive_lock(self, token: str) -> Path:
        """Return the file by which the driver with this token shows that it is alive."""
        return self.locks_dir / f"alive-{token}"

    def worker_lock(self, worker_id: str) -> Path:
        """Return the lock that one worker holds exclusively while it runs."""
        return self.locks_dir / f"worker-{worker_id}.lock"
