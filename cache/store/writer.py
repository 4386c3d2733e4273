"""Write a space: create it, fill one shard after another, commit each.

    space = Space.create(root, spec, load)
    shard = ShardWriter(space, "image", space.next_shard("image"))
    shard.append(key, "full", row)          # uint8, spec.row_bytes long; any number of times
    shard.commit()                          # from here on, the rows exist
    space.grow("image")                     # the driver, now and then: zarr-python sees the rows too

Rows are written to a temporary file as they are appended; `cache.format.shard` decides their layout. A
commit flushes that file to the disk, renames it and flushes the folders; then it does the same with the
commit file, which makes the rows visible. A crash before that leaves a file that no reader opens, under a
number that is never used again. `cache.gc` removes it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from cache.format.checksums import crc32c
from cache.format.shard import RowFacts
from cache.store.commits import KEY_BYTES, SCHEMA, commit_bytes
from cache.store.files import (
    PARTIAL,
    Fence,
    create_file,
    fsync_folder,
    move,
    new_folder,
    remove_tree,
    write_atomic,
)
from cache.store.space import Space

if TYPE_CHECKING:
    from typing_extensions import Buffer


WRITE_BYTES = 4 << 20
"""Bytes of adjacent rows that one system call writes. With a call for each row of 131 KB, writing to the page
cache has two thirds of the speed of a few large calls (2026-11-24, ext4, Linux 6.18)."""

WRITE_BUFFERS = 1000
"""Largest number of buffers that one system call writes. Linux accepts 1,024."""


@dataclass(frozen=True, kw_only=True)
class NewRow:
    """A row to write."""

    key: str
    """Key of the media item, 64 hex digits."""
    view: str
    """View: full, or t:<microseconds>."""
    payload: Buffer
    """Packed row, contiguous bytes."""
    time_s: float | None = None
    """Time of the frame in its video, in seconds; None for an image."""
    error: float = 0.0
    """Relative error of the row codec."""


class ShardWriter:
    """One shard that is being filled. Only one thread may use it.

    `number` must be unused (see `Space.next_shard`): creating its folder fails otherwise.
    """

    def __init__(self, space: Space, array: str, number: int, fence: Fence | None = None):
        self._space, self._array, self._number, self._fence = space, array, number, fence
        self._geometry = space.info.geometry(array)
        self._path = space.paths.shard(array, number)
        self._temporary = self._path.with_name(self._path.name + PARTIAL)
        self._columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
        self._identities: set[tuple[bytes, str]] = set()
        self._over = False
        self._folder = space.paths.shard_dir(array, number)
        self._root = space.paths.cache_root
        try:
            new_folder(self._folder, self._root)
        except FileExistsError:
            if fence is not None:  # the number may be of another job, which has taken over
                fence()
            raise
        if self._path.parent != self._folder:
            new_folder(self._path.parent, self._root)
        self._fd = create_file(self._temporary, self._root)

    @property
    def rows(self) -> int:
        """Rows appended so far."""
        return len(self._identities)

    @property
    def left(self) -> int:
        """Rows that still fit."""
        return self._geometry.slots - self.rows

    @property
    def full(self) -> bool:
        """Whether no more row fits."""
        return self.left == 0

    def append(
        self,
        key: str,
        view: str,
        payload: Buffer,
        *,
        time_s: float | None = None,
        error: float = 0.0,
    ) -> None:
        """Append one row. The arguments are the fields of NewRow.

        Raises:
            ValueError: the shard is full, has this (key, view) already, cannot name this view, or the payload
                has another length.
            OSError: the row cannot be written. The shard is unchanged.
        """
        self.extend([NewRow(key=key, view=view, payload=payload, time_s=time_s, error=error)])

    def extend(self, rows: Sequence[NewRow]) -> None:
        """Append all rows, or none. One system call writes many small rows.

        Raises:
            ValueError: as in `append`.
            OSError: the rows cannot be written. The shard is unchanged.
        """
        identities: dict[tuple[bytes, str], None] = {}
        buffers: list[Buffer] = []
        crcs: list[int] = []
        start = self.rows * self._geometry.slot_bytes
        end = start
        for row in rows:
            identities[self._check(row, identities)] = None
            with memoryview(row.payload).cast("B") as data:
                crcs.append(crc32c(data))
            facts = RowFacts(
                key=row.key.lower(), view=row.view, time_s=row.time_s, crc=crcs[-1], error=row.error
            )
            before, behind = self._geometry.around(facts)
            buffers += [before, row.payload, behind] if before else [row.payload, behind]
            end += self._geometry.slot_bytes
            if end - start >= WRITE_BYTES or len(buffers) > WRITE_BUFFERS:
                _pwrite(self._fd, buffers, start)
                start, buffers = end, []
        if buffers:
            _pwrite(self._fd, buffers, start)
        first = self._number * self._geometry.slots + self.rows
        for number, (row, crc, (key, view)) in enumerate(
            zip(rows, crcs, identities, strict=True), first
        ):
            values = (key, view, row.time_s, number, crc, row.error)
            for column, value in zip(self._columns.values(), values, strict=True):
                column.append(value)
        self._identities.update(identities)

    def _check(self, row: NewRow, others: Collection[tuple[bytes, str]]) -> tuple[bytes, str]:
        """Return the identity of a row, after checking that it may follow `others`."""
        identity = bytes.fromhex(row.key), row.view
        nbytes = memoryview(row.payload).nbytes
        if self.left <= len(others):
            raise ValueError(f"shard {self._number} is full ({self.rows} rows)")
        if len(identity[0]) != KEY_BYTES:
            raise ValueError(f"a key has 64 hex digits, not {len(row.key)}")
        if identity in self._identities or identity in others:
            raise ValueError(f"{row.key} {row.view} is in shard {self._number} already")
        if nbytes != self._geometry.row_bytes:
            raise ValueError(f"a row of {nbytes} bytes, not {self._geometry.row_bytes}")
        self._geometry.check_view(row.view)
        return identity

    def commit(self, replaces: Sequence[int] = ()) -> int:
        """Make the rows exist, durably. A shard without rows is removed.

        Args:
            replaces: shards of the same array that stop existing at the same moment. Their files remain until
                `cache.gc` removes them.

        Returns:
            The number of rows.

        Raises:
            StaleJobError: the job has lost the right to write.
            OSError: a file cannot be written. After either error, `abort` removes the shard, unless only the
                last step failed and the rows exist already.
        """
        if not self.rows:
            self.abort()
            return 0
        rows, paths = self.rows, self._space.paths
        tail, tail_crc = self._geometry.tail_with_crc(rows)
        end = rows * self._geometry.slot_bytes
        os.ftruncate(self._fd, end)  # a row may have been written in part
        _pwrite(self._fd, [tail], end)
        os.fsync(self._fd)
        self._close()
        if self._fence is not None:
            self._fence()
        move(self._temporary, self._path, self._root)
        # Each of these has a new entry. A tar is in the first of them.
        for folder in dict.fromkeys((self._folder, self._folder.parent)):
            if folder != self._path.parent:
                fsync_folder(folder)
        table = pa.table(self._columns, SCHEMA)
        for name, column in self._geometry.commit_columns(rows).items():
            table = table.append_column(name, pa.array(column))
        commit = commit_bytes(
            table,
            fingerprint=self._space.spec.fingerprint,
            array=self._array,
            shard=self._number,
            nbytes=self._geometry.file_bytes(rows),
            index_crc=tail_crc,
            replaces=replaces,
        )
        path = paths.commit(self._array, self._number)
        write_atomic(path, commit, self._fence, root=self._root)
        self._over = True
        return rows

    def abort(self) -> None:
        """Remove the shard, unless its commit exists."""
        self._close()
        if not self._over and not self._space.paths.commit(self._array, self._number).exists():
            remove_tree(self._folder, self._root)
        self._over = True

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _pwrite(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all of `buffers` at `offset`."""
    written = os.pwritev(fd, buffers, offset)
    rest = b""
    total = sum(memoryview(b).nbytes for b in buffers)
    while written < total:  # a full disk, or an interrupted call: continue, or get the error
        rest = rest or b"".join(buffers)
        written += os.pwrite(fd, rest[written:], offset + written)
