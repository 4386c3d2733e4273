"""The samples that `tests.benchmarks.loaders` measures, as data sets of other libraries for a DataLoader.

A data set has N rows of bytes and the conversation of each. An item is (bytes, conversation), a batch is a
(S, row_bytes) uint8 tensor and S conversations, as `nanomolmo2` gives them. None of these libraries checks a
row when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch.utils.data import Dataset

WRITTEN_AT_ONCE = 64
Row = Callable[[int], npt.NDArray[np.uint8]]
Batch = tuple[torch.Tensor, list[Any]]


class Peer(Dataset[Any]):
    """A data set of rows and conversations. It opens its files again in each process."""

    name: ClassVar[str]
    module: ClassVar[str]
    """What is imported."""
    start: ClassVar[str] = "fork"
    """How a DataLoader may start workers."""

    def __init__(self, folder: Path, row_bytes: int):
        self.folder, self.row_bytes = folder, row_bytes
        self.opened: Any = None

    def write(self, row: Row, texts: Sequence[str]) -> None:
        """Write rows 0 to N - 1, and the conversation of each as JSON."""
        raise NotImplementedError

    def open(self) -> Any:
        """Open the files."""
        raise NotImplementedError

    def take(self, indices: Sequence[int]) -> pa.Table:
        """Return the columns `row` and `text` of some samples."""
        raise NotImplementedError

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        self.opened = self.opened or self.open()
        table = self.take(indices)
        codes = torch.empty((len(indices), self.row_bytes), dtype=torch.uint8)
        rows = [value for chunk in table["row"].chunks for value in chunk]
        for to, value in zip(codes.numpy(), rows, strict=True):
            to[:] = np.frombuffer(value.as_buffer(), np.uint8)
        return codes, [json.loads(text) for text in table["text"].to_pylist()]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "opened": None}

    @staticmethod
    def collate(batch: Batch) -> Batch:
        """Return the batch as it is: `__getitems__` has read it together."""
        return batch

    @staticmethod
    def codes(batch: Batch) -> torch.Tensor:
        """Return the rows of a batch."""
        return batch[0]

    def parts(self, row: Row, texts: Sequence[str]) -> Any:
        """Yield the samples as record batches."""
        for start in range(0, len(texts), WRITTEN_AT_ONCE):
            some = texts[start : start + WRITTEN_AT_ONCE]
            rows = [row(start + i).tobytes() for i in range(len(some))]
            yield pa.record_batch([pa.array(rows, pa.binary()), pa.array(some)], self.schema)

    schema: ClassVar[pa.Schema] = pa.schema({"row": pa.binary(), "text": pa.string()})


class Lance(Peer):
    """Lance: `take` of the rows of a batch. Its threads do not survive a fork, so workers are spawned."""

    name = "Lance"
    module = "lance"
    start = "spawn"

    def write(self, row: Row, texts: Sequence[str]) -> None:
        import lance

        reader = pa.RecordBatchReader.from_batches(self.schema, self.parts(row, texts))
        lance.write_dataset(reader, str(self.folder))

    def open(self) -> Any:
        import lance

        return lance.dataset(str(self.folder))

    def take(self, indices: Sequence[int]) -> pa.Table:
        return self.opened.take(list(indices))


class HuggingFace(Peer):
    """`datasets`: mapped Arrow files, rows by number in its format `arrow`, the fastest that it has."""

    name = module = "datasets"

    def write(self, row: Row, texts: Sequence[str]) -> None:
        import datasets

        parts = self.parts(row, texts)
        datasets.Dataset(
            datasets.table.InMemoryTable(pa.Table.from_batches(parts, self.schema))
        ).save_to_disk(str(self.folder))

    def open(self) -> Any:
        import datasets

        return datasets.load_from_disk(str(self.folder)).with_format("arrow")

    def take(self, indices: Sequence[int]) -> pa.Table:
        return self.opened[list(indices)]
