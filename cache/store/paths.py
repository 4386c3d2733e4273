"""Every path below a cache root, how a file appears there whole, and how damage to it is noticed.

Nothing has its final name before all its bytes are on disk, and metadata is *sealed*: it contains
`sha256:<64 hex>`, the hash of the file with those 64 digits as zeros. Any changed byte, or a missing
tail, breaks the seal. The seal is the last such text in the file, so that quoted ones do no harm.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cache.format.spec import ARRAYS
from configs import UserError

PARTIAL = ".partial"
"""Suffix of a file still being written. Readers never look at one; `cache.gc` removes those left."""

SEAL = b"sha256:"
UNSEALED = "sha256:" + "0" * 64
"""What a writer puts where the seal will stand."""

Fence = Callable[[], None]
"""Called just before a rename; raises when this process has lost the right to write."""

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_COMMIT_NAME = re.compile(rf"({'|'.join(ARRAYS)})-(\d{{8}})\.parquet")


MAKE_ANEW = "python -m cache.verify --deep --repair drops it, then encode.run makes it anew"
"""The way out for any file that is damaged: what it held can be had again from the sources."""


class Corrupt(UserError):  # noqa: N818 - a state of a file, met as often as raised
    """A file is not what was written: where, what is wrong, and the way out."""

    def __init__(self, path: Path, what: str, way_out: str = MAKE_ANEW):
        super().__init__(f"{path}: {what}; {way_out}")
        self.path, self.what, self.way_out = path, what, way_out

    def __reduce__(self) -> tuple[type[Corrupt], tuple[Path, str, str]]:
        return Corrupt, (self.path, self.what, self.way_out)


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
        UserError: it is a URL. Commands that take those ask `cache.remote`, and get here with a local copy.
    """

    path: Path

    def __post_init__(self) -> None:
        parts = Path(self.path).parts
        for at, part in enumerate(parts):
            if part.lower().removesuffix(":") in SCHEMES and part.endswith(":"):
                raise UserError(
                    f"{is_url('/'.join(parts[at:]))}: this command needs a cache in a local folder "
                    "(--features DIR): it writes there, or reads all of it. URLs are read by "
                    "train.run, train.evaluate and cache.ls"
                )

    @staticmethod
    def existing(folder: Path) -> CacheRoot:
        """The cache in a folder that is there.

        Raises:
            UserError: it is not; or `folder` is a URL.
        """
        root = CacheRoot(folder)
        if not folder.is_dir():
            raise UserError(f"no cache at {folder}/ (say where: --features DIR)")
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
            except (Corrupt, OSError):
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


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a rename is on disk only after this."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """`folder` and its parents, durably."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_folder(folder.parent)


@contextlib.contextmanager
def new_file(path: Path, fence: Fence | None = None) -> Iterator[BinaryIO]:
    """A file to write and read back; it becomes `path` when the block ends well, else it is gone."""
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{PARTIAL}")
    try:
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if fence is not None:
            fence()
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, data: bytes, fence: Fence | None = None) -> None:
    """`path` holds `data` whole, or is as it was."""
    with new_file(path, fence) as file:
        file.write(data)


# ---- seals


def seal(data: bytes) -> bytes:
    """`data`, whose last `UNSEALED` becomes its seal."""
    at = _seal_position(data)
    assert data[at : at + 64] == b"0" * 64, "nothing to seal"
    return data[:at] + _digest(data, at) + data[at + 64 :]


def seal_file(file: BinaryIO) -> None:
    """The same for an open file of any size."""
    file.flush()
    with mmap.mmap(file.fileno(), 0) as data:
        at = _seal_position(data)
        assert data[at : at + 64] == b"0" * 64, "nothing to seal"
        data[at : at + 64] = _digest(data, at)


def check_seal(data: bytes | mmap.mmap, path: Path) -> bytes:
    """The seal (32 bytes); raise Corrupt unless `data`, read from `path`, is exactly what was sealed."""
    at = _seal_position(data)
    if at < 0:
        raise Corrupt(path, "its seal (sha256:...) is missing")
    if data[at : at + 64] != _digest(data, at):
        raise Corrupt(path, "its bytes do not match its seal (sha256)")
    return bytes.fromhex(data[at : at + 64].decode())


def check_seal_file(path: Path) -> None:
    """The same for a file of any size."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise Corrupt(path, "empty file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            check_seal(data, path)


def _seal_position(data: bytes | mmap.mmap) -> int:
    at = data.rfind(SEAL)
    return at + len(SEAL) if at >= 0 else -1


def _digest(data: bytes | mmap.mmap, at: int) -> bytes:
    digest = hashlib.sha256()
    with memoryview(data) as whole, whole[:at] as before, whole[at + 64 :] as after:
        digest.update(before)
        digest.update(b"0" * 64)
        digest.update(after)
    return digest.hexdigest().encode()


def sealed_json(values: Mapping[str, Any]) -> bytes:
    """`values` as JSON text, the seal in its last key."""
    return seal(
        json.dumps({**values, "seal": UNSEALED}, indent=2, allow_nan=False).encode() + b"\n"
    )


def read_sealed_json(path: Path) -> dict[str, Any]:
    """The values of a sealed JSON file.

    Raises:
        Corrupt: the file is missing, or its bytes have changed.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise Corrupt(path, "missing") from None
    check_seal(data, path)
    values: dict[str, Any] = json.loads(data)
    return values
