"""Reading a space: which rows exist, and their bytes at the speed of the disk.

    reader = FeatureReader(find_space(root, None))
    rows = reader.lookup("picture", keys)                  # (n,) int64, -1 = missing
    reader.read_into("picture", rows, buffer)              # (n, row_bytes) uint8, packed
    features = reader.read("picture", key)                 # (tokens, width) float16, unpacked

Opening reads the commits, not the shards. A row is checked against the crc32c its commit recorded, which
also catches a row that is intact but stands in the wrong place. Any number of threads and forked processes
may share one reader.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

from cache import codec
from cache.commits import RowIndex, key_bytes, read_commits
from cache.layout import CacheRoot, SpacePaths
from cache.shard_files import LocalFiles, ShardFiles, corrupt_shard
from cache.space import read_info
from cache.spec import KINDS
from configs import UserError, nearest

RUN_ROWS = 512
"""Adjacent rows read by one call: with the crcs between them, as many buffers as Linux takes."""

RUN_BYTES = 2 << 20
"""Bytes read by one call, so that they are still in the processor's cache when they are checked."""


class FeatureReader:
    """The committed rows of one space, as they were when it was opened."""

    def __init__(
        self,
        space_path: Path | SpacePaths,
        checked: bool = True,
        files: ShardFiles | None = None,
    ):
        """Open a space.

        Args:
            space_path: its folder.
            checked: whether every row read is compared with its crc32c.
            files: where the shards are, when not in that folder.
        """
        paths = space_path if isinstance(space_path, SpacePaths) else SpacePaths(Path(space_path))
        info = read_info(paths)
        self.paths = paths
        self.path = paths.root
        self.spec = info.spec
        self.load = info.load
        self.checked = checked
        self.geometry = {kind: info.geometry(kind) for kind in KINDS}
        self.index = {
            kind: RowIndex(read_commits(paths, info, kind), info.slots[kind]) for kind in KINDS
        }
        sizes = {kind: index.nbytes for kind, index in self.index.items()}
        self._files = files or LocalFiles(paths, sizes)

    def rows(self, kind: str) -> int:
        """How many rows of `kind` there are."""
        return len(self.index[kind])

    def contains(self, kind: str, key: str, view: str = "full") -> bool:
        """Whether this view of this media is here."""
        return bool(self.lookup(kind, [key], view)[0] >= 0)

    def lookup(self, kind: str, keys: Sequence[str], view: str = "full") -> npt.NDArray[np.int64]:
        """Row numbers (n,) of the keys (64 hex digits each); -1 where there is no row."""
        return self.index[kind].lookup(key_bytes(keys), view)

    def lookup_pairs(
        self, kind: str, keys: Sequence[str], views: Sequence[str]
    ) -> npt.NDArray[np.int64]:
        """Row numbers (n,) of n keys, each with a view of its own; -1 where there is no row."""
        return self.index[kind].lookup_pairs(key_bytes(keys), views)

    def times(self, kind: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Where in their videos rows (n,) are, seconds after the first frame; NaN for pictures.

        Raises:
            IndexError: a row number that is not committed (as -1).
        """
        index = self.index[kind]
        return index.times[index.positions(np.asarray(rows, np.int64))]

    def read_into(self, kind: str, rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8]) -> None:
        """Stored bytes of rows (n,) into `out` (n, row_bytes), in that order.

        Adjacent rows are one system call. When it raises, what `out` holds is meaningless.

        Raises:
            Corrupt: a row is not what was written, or its file is missing or of another size.
            IndexError: a row number that is not committed (as -1).
            ValueError: `out` is not contiguous uint8 of that shape.
        """
        geometry, index = self.geometry[kind], self.index[kind]
        size, rows = geometry.row_bytes, np.asarray(rows, np.int64)
        if out.shape != (len(rows), size) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}, not uint8 {(len(rows), size)}")
        if not len(rows):
            return
        crcs = index.crcs[index.positions(rows)].tolist()
        shards, slots = (part.tolist() for part in np.divmod(rows, geometry.slots))
        flat = out.data.cast("B")
        limit = max(1, min(RUN_ROWS, RUN_BYTES // size))
        for start, stop in _runs(rows, geometry.slots, limit):
            targets = [flat[i * size : (i + 1) * size] for i in range(start, stop)]
            places = targets
            if len(targets) > 1:  # what stands between the rows goes nowhere
                gap = memoryview(bytearray(geometry.gap_bytes))
                places = [buffer for target in targets for buffer in (gap, target)][1:]
            self._files.read(kind, shards[start], geometry.row_offset(slots[start]), places)
            if self.checked:
                for i, target in enumerate(targets, start):
                    if crc32c(target) != crcs[i]:
                        what = f"row {rows[i]} fails its checksum"
                        raise corrupt_shard(self.paths, kind, shards[i], what)

    def read(self, kind: str, key: str, view: str = "full") -> npt.NDArray[np.float16]:
        """The features (tokens, width) of one view.

        Raises:
            KeyError: it is not in this space.
            Corrupt: as `read_into`.
        """
        rows = self.lookup(kind, [key], view)
        if rows[0] < 0:
            raise KeyError(f"no {kind} {key} {view} in {self.path}")
        out = np.empty((1, self.geometry[kind].row_bytes), np.uint8)
        self.read_into(kind, rows, out)
        return codec.unpack(out[0], self.spec.codec, self.spec.tokens(kind), self.spec.width)

    def logical_hash(self) -> str:
        """What two stores of equal content share, however they are cut into shards: sha256 (hex)."""
        digests = {}
        for kind, index in self.index.items():
            step = max(1, RUN_BYTES // self.geometry[kind].row_bytes)
            buffer = np.empty((step, self.geometry[kind].row_bytes), np.uint8)
            digests[kind] = np.empty((len(index), 32), np.uint8)
            for start in range(0, len(index), step):
                positions = np.arange(start, min(start + step, len(index)))
                rows = buffer[: len(positions)]
                self.read_into(kind, index.rows(positions), rows)
                digests[kind][positions] = row_digests(rows)
        return logical_hash(self.index, digests)


def _runs(rows: npt.NDArray[np.int64], slots: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of stretches of adjacent rows of one shard, at most `limit` long."""
    apart = (np.diff(rows) != 1) | (rows[1:] % slots == 0)
    edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
    for start, stop in itertools.pairwise(edges):
        for at in range(start, stop, limit):
            yield at, min(at + limit, stop)


def row_digests(rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """sha256 of each row: (n, row_bytes) -> (n, 32)."""
    digests = b"".join(hashlib.sha256(row).digest() for row in rows)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


def logical_hash(
    index: Mapping[str, RowIndex], digests: Mapping[str, npt.NDArray[np.uint8]]
) -> str:
    """sha256 (hex) over the sorted (array, key, view, sha256 of the stored row).

    Args:
        index: kind -> its rows.
        digests: kind -> `row_digests` of all of them, by position.
    """
    whole = hashlib.sha256()
    for kind in sorted(index):
        for position in index[kind].by_identity().tolist():
            key, view = index[kind].identity(position)
            digest = digests[kind][position].tobytes().hex()
            whole.update(f"{kind}\t{key}\t{view}\t{digest}\n".encode())
    return whole.hexdigest()


def find_space(root: CacheRoot, name: str | None) -> SpacePaths:
    """The only space under `root`, or the one whose name is, or alone begins with, `name`.

    Raises:
        UserError: there is none, or there are several.
    """
    names = root.space_names()
    if not names:
        raise UserError(
            f"no feature space under {root.path}/ (looked for spaces/*/space.json). "
            f"Make one: python -m encode.run --dataset pixmo --features {root.path}"
        )
    matches = [n for n in names if n == name] or [n for n in names if n.startswith(name or "")]
    if not matches:
        assert name is not None  # everything begins with nothing
        raise UserError(
            f"no space {name!r} under {root.path}/; there: {', '.join(names)}{nearest(name, names)}"
        )
    if len(matches) > 1:
        raise UserError(
            f"{len(matches)} spaces under {root.path}/, say which: --space {' | '.join(matches)}"
        )
    return root.space(matches[0])
