"""What a store is for `tests.benchmarks.store`: it writes N rows of bytes, and reads rows by number.

Each reads as its own documentation would have it; then the rows stand in the buffer of a batch, as a trainer
needs them, copied there if the library has buffers of its own or hands out a mapped file. A method that
returns seconds took that long, whatever the clock here says: it ran in another process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cache.format.spec import FeatureSpec
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space
from cache.store.writer import NewRow, ShardWriter

Rows = npt.NDArray[np.int64]
BATCH = 32
VIDEO_FRAMES, FRAME_BYTES = 64, 1 << 18
"""Rows up to this size are written as the frames of videos of this length."""


class Store:
    """One way of keeping rows: `write` makes it, `open` makes it ready to read."""

    name = ""
    checks: ClassVar[bool] = False
    """Whether reading compares a checksum."""
    random = True
    """Whether it can read a row by its number."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        self.folder, self.shape = folder, shape
        self.row_bytes = 2 * shape[0] * shape[1]
        self.out = np.zeros((BATCH, self.row_bytes), np.uint8)

    def prepare(self) -> None:
        """What is done once, not for every shard."""

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        """Write rows 0 to count - 1; durable only once its files are fsynced."""
        raise NotImplementedError

    def open(self) -> None:
        """Ready to read."""

    def one(self, row: int) -> Any:
        """A row: an array, or bytes."""
        raise NotImplementedError

    def keep(self, i: int, row: Any) -> None:
        """Copy the i-th row read to its place in the batch."""
        self.out[i % BATCH] = np.frombuffer(row, np.uint8)

    def singles(self, rows: Rows) -> None:
        """One after the other."""
        for i, row in enumerate(rows.tolist()):
            self.keep(i, self.one(row))

    def batches(self, rows: Rows) -> None:
        """In batches of 32; a store that has no such thing reads one after the other."""
        self.singles(rows)

    def sequential(self, start: int, count: int) -> Any:
        """Rows in order, a batch at a time, from row 0 on; the next call asks for what comes next."""
        return self.batches(np.arange(start, start + count))

    def files(self) -> list[Path]:
        """All of it, to fsync, or to drop from the page cache."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def close(self) -> None:
        """Let go of files and mappings, so that the page cache can."""

    def end(self) -> None:
        """Nothing more will be asked."""


def spec_of(shape: tuple[int, int]) -> FeatureSpec:
    """Of rows of that many tokens and float16 values: only their bytes matter here."""
    side = round(shape[0] ** 0.5)
    assert side * side == shape[0]
    return FeatureSpec(
        encoder="bench",
        architecture="none",
        weights="0" * 64,
        activation="gelu",
        blocks=(0,),
        image_size=2 * side,
        patch_size=2,
        width=shape[1],
        fit="squash",
        resize="none",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        pool_frame=1,
        compute_dtype="float32",
        batch_size=1,
        codec="fp16",
    )


class Ours(Store):
    """Our reader and writer."""

    def __init__(
        self, folder: Path, shape: tuple[int, int], checked: bool = True, threads: int = 1
    ):
        super().__init__(folder, shape)
        self.checked, self.threads = checked, threads
        self.name = f"ours, {'checked' if checked else 'unchecked'}"
        if threads > 1:
            self.name += f", {threads} threads"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        space = self.space
        shard: ShardWriter | None = None
        # As a job does: an image at a time, the frames of a video together.
        together = VIDEO_FRAMES if self.row_bytes <= FRAME_BYTES else 1
        number = 0
        while number < count:
            shard = shard or ShardWriter(space, "image", space.next_shard("image"))
            numbers = range(number, min(number + together, count, number + shard.left))
            shard.extend([NewRow(key=f"{n:064x}", view="full", payload=row(n)) for n in numbers])
            number = numbers.stop
            if shard.full:
                shard = shard.commit() and None
        if shard is not None:
            shard.commit()

    def prepare(self) -> None:
        self.space = Space.create(CacheRoot(self.folder), spec_of(self.shape), {})

    def open(self) -> None:
        paths = find_space(CacheRoot(self.folder), None)
        self.reader = FeatureReader(paths, checked=self.checked, threads=self.threads)
        self.index = self.reader.index["image"]
        self.slots = [self.out[i : i + 1] for i in range(BATCH)]
        self.read = self.reader.read_into

    def singles(self, rows: Rows) -> None:
        for i in range(len(rows)):
            self.read("image", rows[i : i + 1], self.slots[i % BATCH])

    def batches(self, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            some = rows[start : start + BATCH]
            self.read("image", some, self.out[: len(some)])

    def close(self) -> None:
        del self.reader, self.read


class Raw(Ours):
    """`preadv` of the same bytes of the same files into the same kind of buffer, and nothing else."""

    def __init__(self, folder: Path, shape: tuple[int, int], threads: int = 1):
        super().__init__(folder, shape, checked=False)
        self.name = "raw preadv" + (f", {threads} threads" if threads > 1 else "")
        self.several = threads

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        with (self.folder / "raw.bin").open("wb", buffering=0) as file:
            for number in range(count):
                file.write(row(number).data)

    def prepare(self) -> None:
        self.folder.mkdir(parents=True)

    def open(self) -> None:
        super().open()
        paths, slots = self.reader.paths, self.reader.geometry["image"].slots
        self.per_shard, self.slot_bytes = slots, self.reader.geometry["image"].slot_bytes
        self.fds = [os.open(paths.shard("image", n), os.O_RDONLY) for n in paths.committed("image")]
        self.targets = [[slot.data.cast("B")] for slot in self.slots]
        self.pool = ThreadPoolExecutor(self.several)

    def singles(self, rows: Rows) -> None:
        self.read_at(rows, 0)

    def read_at(self, rows: Rows, first: int) -> None:
        """Rows to the places of the batch from `first` on."""
        preadv, fds, targets = os.preadv, self.fds, self.targets
        for i, row in enumerate(rows.tolist(), first):
            shard, slot = divmod(row, self.per_shard)
            preadv(fds[shard], targets[i % BATCH], slot * self.slot_bytes)

    def batches(self, rows: Rows) -> None:
        if self.several == 1:
            self.read_at(rows, 0)
            return
        for start in range(0, len(rows), BATCH):
            parts = np.array_split(rows[start : start + BATCH], self.several)
            firsts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
            list(self.pool.map(self.read_at, parts, firsts))

    def close(self) -> None:
        self.pool.shutdown()
        for fd in self.fds:
            os.close(fd)
        super().close()
