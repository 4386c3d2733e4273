"""The other stores that `tests.benchmarks.store` measures; libraries of the `[bench]` extra."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cache.store.paths import CacheRoot
from cache.store.space import find_space
from tests.benchmarks.stores import BATCH, Ours, Rows, Store

PEER_SHARD_BYTES = 256 << 20


class ZarrPython(Ours):
    """The same files."""

    checks = True

    def __init__(self, folder: Path, shape: tuple[int, int]):
        super().__init__(folder, shape)
        self.name = "zarr-python"

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
        for start in range(0, count, per_shard):  # a shard at a time: its fastest way by far
            rows = [row(n) for n in range(start, min(start + per_shard, count))]
            array[start : start + len(rows)] = np.stack(rows).view("<f2").reshape(-1, *self.shape)

    def open(self) -> None:
        import zarr

        path = find_space(CacheRoot(self.folder), None).array("image")
        self.array = zarr.open_array(str(path), mode="r")

    def prepare(self) -> None:
        pass

    def one(self, row: int) -> Any:
        return self.array[row]

    def keep(self, i: int, row: Any) -> None:
        self.out[i % BATCH].view("<f2").reshape(self.shape)[:] = row

    def singles(self, rows: Rows) -> None:
        Store.singles(self, rows)

    def batches(self, rows: Rows) -> None:  # one by one: fancy indexing is ten times slower
        Store.singles(self, rows)

    def close(self) -> None:
        del self.array


class Zarrs(ZarrPython):
    """zarr-python with the codec pipeline written in Rust, the same files."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        super().__init__(folder, shape)
        self.name = "zarrs"

    @contextlib.contextmanager
    def _pipeline(self) -> Iterator[None]:
        import zarr
        import zarrs  # noqa: F401 - registers it

        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
            yield

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        with self._pipeline():
            super().write(row, count)

    def open(self) -> None:
        with self._pipeline():
            super().open()


class TensorStore(ZarrPython):
    """The same files."""

    def __init__(self, folder: Path, shape: tuple[int, int]):
        super().__init__(folder, shape)
        self.name = "tensorstore"

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
        self.array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result()

    def one(self, row: int) -> Any:
        return self.array[row].read().result()

    def batches(self, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            asked = [self.array[row].read() for row in rows[start : start + BATCH].tolist()]
            for i, answer in enumerate(asked):
                self.keep(i, answer.result())


class WebDataset(Store):
    """Tars, read from their beginning."""

    name = "webdataset"
    random = False

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        import webdataset

        self.folder.mkdir(parents=True)
        with webdataset.TarWriter(str(self.folder / "rows.tar")) as tar:
            for number in range(count):
                tar.write({"__key__": f"{number:08d}", "bin": row(number).tobytes()})

    def sequential(self, start: int, count: int) -> None:
        import webdataset

        if start == 0:
            path = str(self.folder / "rows.tar")
            self.rows = iter(webdataset.WebDataset(path, shardshuffle=False))
        for i in range(count):
            self.keep(i, next(self.rows)["bin"])


class LitData(Store):
    """Lightning's chunks."""

    name = "LitData"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        from litdata.streaming.writer import BinaryWriter

        self.folder.mkdir(parents=True)
        writer = BinaryWriter(str(self.folder), chunk_bytes=PEER_SHARD_BYTES)
        for number in range(count):
            writer[number] = row(number).tobytes()
        writer.done()
        writer.merge()

    def open(self) -> None:
        from litdata import StreamingDataset

        self.rows = StreamingDataset(str(self.folder))

    def one(self, row: int) -> Any:
        return self.rows[row]

    def close(self) -> None:
        del self.rows


class Lance(Store):
    """A Lance data set of one binary column."""

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

        self.table = lance.dataset(str(self.folder))

    def one(self, row: int) -> Any:
        return self.table.take([row])["row"][0].as_buffer()

    def batches(self, rows: Rows) -> None:
        for start in range(0, len(rows), BATCH):
            taken = self.table.take(rows[start : start + BATCH].tolist())["row"]
            for i, row in enumerate(taken):
                self.keep(i, row.as_buffer())

    def close(self) -> None:
        del self.table


class SafeTensors(Store):
    """A tensor a row, in one file, mapped into memory; each tensor is a copy."""

    name = "safetensors"

    def write(self, row: Callable[[int], npt.NDArray[np.uint8]], count: int) -> None:
        from safetensors.numpy import save_file

        self.folder.mkdir(parents=True)
        rows = {str(n): row(n).copy() for n in range(count)}
        save_file(rows, self.folder / "rows.safetensors")

    def open(self) -> None:
        from safetensors import safe_open

        self.file: Any = safe_open(str(self.folder / "rows.safetensors"), framework="np")

    def one(self, row: int) -> Any:
        return self.file.get_tensor(str(row))

    def close(self) -> None:
        del self.file


class Mds(Store):
    """MosaicML's shards, in a process of their own: the library wants an older transformers and numpy."""

    name = "MosaicML MDS"
    python: ClassVar[Path]

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
        """Seconds that a command took over there."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return float(json.loads(line)["seconds"])
        raise RuntimeError("its process ended")

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
    """The interpreter of MDS's environment below `folder`; made if it is not there.

    It sees what is installed here, and has of its own only what must be of another version.

    Raises:
        RuntimeError: it cannot be installed.
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
