"""Every path below a cache root, how a file appears there whole, and how damage to it is noticed.

Nothing has its final name before all its bytes are on disk, and metadata is *sealed*: it contains
`sha256:<64 hex>`, the hash of the file with those 64 digits as zeros. Any changed byte, or a missing
tail, breaks the seal. The seal is the last such text in the file, so that quoted ones do no harm.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cache.errors import CacheError, CorruptError, NotFoundError
from cache.format.checksums import read_sealed_json
from cache.format.spec import ARRAYS

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT_NAME = re.compile(rf"({'|'.join(ARRAYS)})-(\d{{8}})\.parquet")


DATA_FOLDERS = ("samples", "media", "spaces", "locks", "damaged", "garbage")
"""The folders of a cache. The default root is also the folder `cache/` of the code, where `.gitignore` names
these and no module has such a name."""

LISTING = "listing.json"
"""The one file at the root of a cache, written by `cache.share`."""

# ---- paths

SCHEMES = ("https", "http", "s3", "hf", "gs", "gcs", "az", "abfs", "ftp", "sftp", "file")
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/{{1,2}}(.*)", re.IGNORECASE | re.DOTALL)


def is_url(features: str | Path) -> str | None:
    """The URL that `--features` names, also one taken for a path (`https:/x`); None for a folder."""
    found = _URL.fullmatch(str(features))
    return f"{found[1].lower()}://{found[2]}" if found else None


@dataclass(frozen=True)
class CacheRoot:
    """A folder of samples, media and spaces: what `--features` names.

    Raises:
        CacheError: it is a URL. Commands that take those ask `cache.remote`, and get here with a local copy.
    """

    path: Path

    def __post_init__(self) -> None:
        parts = Path(self.path).parts
        for at, part in enumerate(parts):
            if part.lower().removesuffix(":") in SCHEMES and part.endswith(":"):
                raise CacheError(
                    f"{is_url('/'.join(parts[at:]))}: this command needs a cache in a local folder "
                    "(--features DIR): it writes there, or reads all of it. URLs are read by "
                    "train.run, train.evaluate and cache.ls"
                )

    @staticmethod
    def existing(folder: Path) -> CacheRoot:
        """The cache in a folder that is there.

        Raises:
            CacheError: it is not; or `folder` is a URL.
        """
        root = CacheRoot(folder)
        if not folder.is_dir():
            raise NotFoundError(f"no cache at {folder}/ (say where: --features DIR)")
        return root

    def samples(self, dataset: str) -> Path:
        """The text side of one data set."""
        if not _FOLDER_NAME.fullmatch(dataset):
            raise ValueError(f"data set name {dataset!r}: use letters, digits, '.', '_' and '-'")
        return self.path / "samples" / dataset / "part-00000.parquet"

    @property
    def samples_dir(self) -> Path:
        """One folder a data set."""
        return self.path / "samples"

    @property
    def media_dir(self) -> Path:
        """The parts of the media table."""
        return self.path / "media"

    @property
    def spaces_dir(self) -> Path:
        """One folder a space."""
        return self.path / "spaces"

    @property
    def damaged_dir(self) -> Path:
        """Where `cache.verify --repair` puts what it takes out of the cache, in the same tree."""
        return self.path / "damaged"

    @property
    def garbage_dir(self) -> Path:
        """Folders on their way out: `cache.gc` begun to remove them."""
        return self.path / "garbage"

    def space(self, name: str) -> SpacePaths:
        """The files of the space `name`, which need not exist."""
        return SpacePaths(self.spaces_dir / name)

    def space_folders(self) -> list[SpacePaths]:
        """All folders of spaces, also of those whose space.json is gone, sorted."""
        return [SpacePaths(folder) for folder in sorted(self.spaces_dir.glob("*/"))]

    def space_names(self) -> list[str]:
        """Names of the spaces here, sorted."""
        return sorted(p.parent.name for p in self.spaces_dir.glob("*/space.json"))


@dataclass(frozen=True)
class SpacePaths:
    """The files of one space. Its locks lie outside: a space holds only bytes that are checked."""

    root: Path

    @property
    def name(self) -> str:
        """The space's name."""
        return self.root.name

    @property
    def space_json(self) -> Path:
        """What the space is: written first."""
        return self.root / "space.json"

    @property
    def group_json(self) -> Path:
        """Zarr's description of the group of arrays."""
        return self.root / "features" / "zarr.json"

    def array(self, array: str) -> Path:
        """The array of one array; of a Zarr space, a Zarr array."""
        return self.root / "features" / array

    def array_json(self, array: str) -> Path:
        """Zarr's description of that array."""
        return self.array(array) / "zarr.json"

    def shards_dir(self, array: str) -> Path:
        """One folder a shard, as Zarr wants it."""
        return self.array(array) / "c"

    def shard_dir(self, array: str, number: int) -> Path:
        """All that one shard is, whatever its container: it is taken once this is there."""
        return self.shards_dir(array) / str(number)

    def shard(self, array: str, number: int) -> Path:
        """The file of one shard."""
        if self._container == "webdataset":
            return self.shard_dir(array, number) / f"{array}-{number:08d}.tar"
        return self.shard_dir(array, number) / "0" / "0"

    @property
    def _container(self) -> str:
        """`spec.container` of space.json; `zarr` while that can't be read, and is not to be relied on."""
        known: str | None = self.__dict__.get("_known_container")
        if known is None:
            try:
                known = read_sealed_json(self.space_json).get("spec", {}).get("container", "zarr")
            except (CorruptError, OSError):
                return "zarr"
            self.__dict__["_known_container"] = known
        return known

    @property
    def commits_dir(self) -> Path:
        """One file a committed shard."""
        return self.root / "commits"

    def commit(self, array: str, number: int) -> Path:
        """The file that makes a shard exist: written last."""
        return self.commits_dir / f"{array}-{number:08d}.parquet"

    def committed(self, array: str) -> list[int]:
        """Numbers of the shards that exist, in order."""
        names = (
            _COMMIT_NAME.fullmatch(p.name) for p in self.commits_dir.glob(f"{array}-*.parquet")
        )
        return sorted(int(name[2]) for name in names if name)

    def commit_stats(self, array: str) -> dict[int, tuple[int, int]]:
        """Number -> (bytes, time of the last change in ns) of the same files; none if the folder is gone."""
        stats = {}
        entries = os.scandir(self.commits_dir) if self.commits_dir.is_dir() else ()
        for entry in entries:
            name = _COMMIT_NAME.fullmatch(entry.name)
            if name and name[1] == array:
                with contextlib.suppress(FileNotFoundError):  # removed just now
                    stat = entry.stat()
                    stats[int(name[2])] = stat.st_size, stat.st_mtime_ns
        return stats

    @property
    def index_dir(self) -> Path:
        """What can be had from the commits again, laid out to be opened fast."""
        return self.root / "index"

    def index(self, array: str) -> Path:
        """The commits of one array as flat arrays."""
        return self.index_dir / f"{array}.bin"

    @property
    def has_commits(self) -> bool:
        """Whether any shard exists here."""
        return any(map(self.committed, ARRAYS))

    def started(self, array: str) -> list[int]:
        """Numbers that have a folder: committed, finished without commit, or only begun."""
        return sorted(int(p.name) for p in self.shards_dir(array).glob("*") if p.name.isdecimal())

    @property
    def locks_dir(self) -> Path:
        """The locks of those who write here."""
        return self.root.parent.parent / "locks" / self.name

    @property
    def driver_lock(self) -> Path:
        """Held exclusively by the one writing job."""
        return self.locks_dir / "driver.lock"

    @property
    def workers_lock(self) -> Path:
        """Held shared by each of its workers."""
        return self.locks_dir / "workers.lock"

    def worker_lock(self, worker_id: str) -> Path:
        """Held exclusively by one worker while it lives."""
        return self.locks_dir / f"worker-{worker_id}.lock"


# ---- whole files


# ---- seals
