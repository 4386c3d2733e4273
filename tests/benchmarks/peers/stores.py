"""The stores that `tests.benchmarks.store` measures: ours, raw `preadv`, and those of other libraries.

A store writes N rows of bytes and reads rows by number. Each one reads as its own documentation recommends.
The rows end up in the buffer of a batch, as a trainer needs them; if a library has buffers of its own or
returns a mapped file, its rows are copied there. A method that returns seconds ran in another process, and
that time counts instead of the time measured here. The libraries are in the `[bench]` extra.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cache.format.spec import FeatureSpec
from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from cache.store.space import Space, find_space
from cache.store.writer import NewRow, ShardWriter
from tests.support.spaces import SPEC

Rows = npt.NDArray[np.int64]
BATCH = 32
"""Rows of a batch."""
PEER_SHARD_BYTES = 256 << 20
"""Shard size of the other libraries: that of ours."""
VIDEO_FRAMES, FRAME_BYTES = 64, 1 << 18
"""Rows of up to FRAME_BYTES are written as frames of videos of VIDEO_FRAMES frames."""


class Store:
    """One way to store rows. `write` makes the store, `open` prepares it for reading."""

    name = ""
    checks: ClassVar[bool] = False
    """Whether reading checks a checksum."""
    random = True
    """Whether it can read a row by its number."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        self.folder, self.shape = folder, shape
        self.row_bytes = 2 * shape[0] * shape[1]
        self.out = np.zeros((BATCH, self.row_bytes), np.uint8)
        self.opened: Any = None
        """What `open` returns in the library."""

    def prepare(self) -> None:
        """Prepare for writing, once and outside the measured time."""
        self.folder.mkdir(parents=True)

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        """Write rows 0 to count - 1, without fsync."""
        raise NotImplementedError

    def open(self) -> None:
        """Prepare for reading."""

    def one(self, row: int) -> Any:
        """Read a row as an array or bytes."""
        raise NotImplementedError

    def keep(self, i: int, row: Any) -> None:
        """Copy the i-th row read into the batch."""
        self.out[i % BATCH] = np.frombuffer(row, np.uint8)

    def singles(self, rows: Rows) -> None:
        """Read rows one by one."""
        for i, row in enumerate(rows.tolist()):
            self.keep(i, self.one(row))

    def batches(self, rows: Rows) -> None:
        """Read rows in batches of 32; a store without batches reads one by one."""
        self.singles(rows)

    def sequential(self, start: int, count: int) -> Any:
        """Read `count` rows in order; calls start at row 0, and each continues after the previous one."""
        return self.batches(np.arange(start, start + count))

    def files(self) -> list[Path]:
        """Return all files, to fsync or to remove from the page cache."""
        return [path for path in self.folder.rglob("*") if path.is_file()]

    def close(self) -> None:
        """Close files and mappings, so that the page cache can drop them."""
        self.opened = None

    def end(self) -> None:
        """End processes; the store is not used any more."""


def spec_of(shape: tuple[int, int]) -> FeatureSpec:
    """Return a spec of rows of `shape`, tokens and float16 values."""
    side = round(shape[0] ** 0.5)
    assert side * side == shape[0]
    return replace(
        SPEC, image_size=2 * side, patch_size=2, width=shape[1], pool_frame=1, codec="fp16"
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
        # As an encode job writes: images one by one, the frames of a video together.
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
    """Only `preadv`, of equal bytes from equal files into equal buffers: the upper limit."""

    def __init__(self, folder: Path, shape: tuple[int, int], threads: int = 1):
        super().__init__(folder, shape, checked=False)
        self.name = "raw preadv" + (f", {threads} threads" if threads > 1 else "")
        self.several = threads

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        with (self.folder / "raw.bin").open("wb", buffering=0) as file:
            for number in range(count):
                file.write(row(number).data)

    def prepare(self) -> None:
        Store.prepare(self)

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
        """Read rows into the batch, from position `first` on."""
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


# ---- other libraries


class ZarrPython(Store):
    """zarr-python, reading our files."""

    name = "zarr-python"
    checks = True

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        per_shard = max(1, PEER_SHARD_BYTES // self.row_bytes)
        array = zarr.create_array(
            str(self.folder),
            shape=(count, *self.shape),
            shards=(per_shard, *self.shape),
            chunks=(1, *self.shape),
            dtype="float16",
            compressors=Crc32cCodec(),
        )
        for start in range(0, count, per_shard):  # a shard at a time is by far its fastest way
            rows = [row(n) for n in range(start, min(start + per_shard, count))]
            array[start : start + len(rows)] = np.stack(rows).view("<f2").reshape(-1, *self.shape)

    def open(self) -> None:
        import zarr

        path = find_space(CacheRoot(self.folder), None).array("image")
        self.opened = zarr.open_array(str(path), mode="r")

    def one(self, row: int) -> Any:
        return self.opened[row]  # fancy indexing, for a batch, is ten times slower

    def keep(self, i: int, row: Any) -> None:
        self.out[i % BATCH].view("<f2").reshape(self.shape)[:] = row


class Zarrs(ZarrPython):
    """zarr-python with the codec pipeline in Rust, reading our files."""

    name = "zarrs"

    @contextlib.contextmanager
    def _pipeline(self) -> Iterator[None]:
        import zarr
        import zarrs  # noqa: F401  registers the pipeline

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            yield

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        with self._pipeline():
            super().write(row, count)

    def open(self) -> None:
        with self._pipeline():
            super().open()


class TensorStore(ZarrPython):
    """TensorStore, reading our files."""

    name = "tensorstore"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        import tensorstore

        per_shard = max(1, PEER_SHARD_BYTES // self.row_bytes)
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        inner = {
            "chunk_shape": [1, *self.shape],
            "codecs": [little, {"name": "crc32c"}],
            "index_codecs": [little, {"name": "crc32c"}],
        }
        store = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(self.folder)},
                "metadata": {
                    "shape": [count, *self.shape],
                    "data_type": "float16",
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": [per_shard, *self.shape]},
                    },
                    "codecs": [{"name": "sharding_indexed", "configuration": inner}],
                },
            },
            create=True,
        ).result()
        for start in range(0, count, per_shard):
            rows = [row(n) for n in range(start, min(start + per_shard, count))]
            values = np.stack(rows).view("<f2").reshape(-1, *self.shape)
            store[start : start + len(rows)].write(values).result()

    def open(self) -> None:
        import tensorstore

        path = find_space(CacheRoot(self.folder), None).array("image")
        kvstore = {"driver": "file", "path": str(path)}
        self.opened = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()

    def one(self, row: int) -> Any:
        return self.opened[row].read().result()

    def batches(self, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            asked = [self.opened[row].read() for row in rows[start : start + BATCH].tolist()]
            for i, answer in enumerate(asked):
                self.keep(i, answer.result())


class WebDataset(Store):
    """WebDataset: a tar, read from its beginning."""

    name = "webdataset"
    random = False

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        import webdataset

        with webdataset.TarWriter(str(self.folder / "rows.tar")) as tar:
            for number in range(count):
                tar.write({"__key__": f"{number:08d}", "bin": row(number).tobytes()})

    def sequential(self, start: int, count: int) -> None:
        import webdataset

        if start == 0:
            path = str(self.folder / "rows.tar")
            self.opened = iter(webdataset.WebDataset(path, shardshuffle=False))
        for i in range(count):
            self.keep(i, next(self.opened)["bin"])


class LitData(Store):
    """LitData: chunks of Lightning."""

    name = "LitData"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.folder), chunk_bytes=PEER_SHARD_BYTES)
        for number in range(count):
            writer[number] = row(number).tobytes()
        writer.done()
        writer.merge()

    def open(self) -> None:
        from litdata import StreamingDataset

        self.opened = StreamingDataset(str(self.folder))

    def one(self, row: int) -> Any:
        return self.opened[row]


class Lance(Store):
    """Lance: a data set of one binary column."""

    name = "Lance"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        import lance
        import pyarrow as pa

        schema = pa.schema({"row": pa.binary()})

        def parts() -> Iterator[pa.RecordBatch]:
            for start in range(0, count, BATCH):
                rows = [row(n).tobytes() for n in range(start, min(start + BATCH, count))]
                yield pa.record_batch([pa.array(rows, pa.binary())], schema)

        reader = pa.RecordBatchReader.from_batches(schema, parts())
        lance.write_dataset(reader, str(self.folder))

    def open(self) -> None:
        import lance

        self.opened = lance.dataset(str(self.folder))

    def one(self, row: int) -> Any:
        return self.opened.take([row])["row"][0].as_buffer()

    def batches(self, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            taken = self.opened.take(rows[start : start + BATCH].tolist())["row"]
            for i, row in enumerate(taken):
                self.keep(i, row.as_buffer())


class SafeTensors(Store):
    """safetensors: one tensor for each row, in one mapped file; reading copies a tensor."""

    name = "safetensors"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        from safetensors.numpy import save_file

        rows = {str(n): row(n).copy() for n in range(count)}
        save_file(rows, self.folder / "rows.safetensors")

    def open(self) -> None:
        from safetensors import safe_open

        self.opened = safe_open(str(self.folder / "rows.safetensors"), framework="np")

    def one(self, row: int) -> Any:
        return self.opened.get_tensor(str(row))


class Mds(Store):
    """MosaicML MDS, in a process of its own, because it needs an older transformers and numpy."""

    name = "MosaicML MDS"
    python: ClassVar[Path]
    """The interpreter of its environment."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        super().__init__(folder, shape)
        script = Path(__file__).with_name("store_mds.py")
        self.process = subprocess.Popen(
            [str(self.python), str(script), str(folder), str(self.row_bytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **command: Any) -> float:
        """Send a command to the process; return the seconds it took there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return float(json.loads(line)["seconds"])
        raise RuntimeError("the process of MDS has ended")

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> Any:
        size = {"row_bytes": self.row_bytes, "shard_bytes": PEER_SHARD_BYTES}
        return self.ask(do="write", folder=str(self.folder), count=count, **size)

    def open(self) -> None:
        self.ask(do="open")

    def singles(self, rows: Rows) -> Any:
        return self.ask(do="read", rows=rows.tolist())

    def batches(self, rows: Rows) -> Any:
        return self.singles(rows)

    def close(self) -> None:
        self.ask(do="close")

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def mds_python(folder: Path, timeout_s: float) -> Path:
    """Return the interpreter of the environment of MDS below `folder`; make it if it does not exist.

    The environment also has the packages installed here, except those it needs in another version.

    Raises:
        RuntimeError: MDS cannot be installed.
    """
    python = folder / "bin" / "python"
    done = folder / "installed"
    if done.exists():
        return python
    print("installing MDS, once; this takes minutes ...", flush=True)
    try:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True, timeout=timeout_s)
        (site,) = folder.glob("lib/python*/site-packages")
        (site / "parent.pth").write_text(str(Path(np.__file__).parents[1]))
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "mosaicml-streaming>=0.13,<1"],
            check=True,
            capture_output=True,
            timeout=timeout_s,
        )
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        raise RuntimeError(f"mosaicml-streaming: {error}") from error
    done.touch()
    return python
