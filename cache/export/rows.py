"""Write rows of a space to WebDataset tars or safetensors files.

n is a number of rows of one array. A row has `row_bytes` bytes as stored, or is float16 (tokens, width) when
unpacked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cache.format import codec
from cache.format.checksums import crc32c
from cache.format.shard import RowFacts
from cache.format.tar_shard import END, TarGeometry
from cache.store.reader import FeatureReader
from configs import UserError

FILE_BYTES = 1 << 30
"""Approximate size of an exported file: 1 GiB."""

FILE_ROWS = 1 << 16
"""The most rows in one file. A row takes 200 bytes of a safetensors header, which may have 100 MB."""

BATCH_BYTES = 16 << 20
"""Stored bytes read by one call."""

Positions = npt.NDArray[np.int64]


class OutputFile(NamedTuple):
    """One file of an export."""

    name: str
    nbytes: int
    """Its approximate size."""
    blocks: Iterator[bytes | memoryview]
    """Its bytes in order, made while they are written."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The rows of a space, packed or unpacked."""

    reader: FeatureReader
    """A reader of the space that verifies checksums."""
    codec: str
    """The codec of an exported row: that of the space, or `fp16`."""

    def shape(self, array: str) -> tuple[int, ...]:
        """Return the shape of one exported row: (tokens, width) float16, or (row_bytes,) uint8."""
        if self.codec == "fp16":
            return self.reader.spec.tokens(array), self.reader.spec.width
        return (self.reader.spec.row_bytes(array),)

    def row_bytes(self, array: str) -> int:
        """Return the bytes of one exported row."""
        return codec.row_bytes(self.codec, self.reader.spec.tokens(array), self.reader.spec.width)

    def geometry(self, array: str) -> TarGeometry:
        """Return the places of such rows, and the headers around them, in a tar."""
        spec = replace(self.reader.spec, codec=self.codec)
        return TarGeometry(spec=spec, array=array, slots=FILE_ROWS)

    def rows(self, array: str, positions: Positions) -> npt.NDArray[np.uint8]:
        """Return the exported bytes (n, row_bytes) of rows at positions (n,), in that order.

        Raises:
            CorruptError: a row fails its checksum.
        """
        spec, index = self.reader.spec, self.reader.index[array]
        stored = np.empty((len(positions), spec.row_bytes(array)), np.uint8)
        self.reader.read_into(array, index.rows(positions), stored)
        if self.codec == spec.codec:
            return stored
        values = codec.unpack(stored, spec.codec, spec.tokens(array), spec.width)
        return np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(len(positions), -1)

    def facts(self, array: str, position: int, row: npt.NDArray[np.uint8]) -> RowFacts:
        """Return a row's key, view, time and codec error, and the crc32c of its exported bytes `row`."""
        index = self.reader.index[array]
        key, view = index.identity(position)
        time_s = float(index.times[position])
        packed = self.codec == self.reader.spec.codec
        crc = int(index.crcs[position]) if packed else crc32c(row.data)
        error = float(index.columns.errors[position])
        known = None if np.isnan(time_s) else time_s
        return RowFacts(key=key, view=view, time_s=known, crc=crc, error=error)

    def batches(
        self, array: str, positions: Positions
    ) -> Iterator[tuple[Positions, npt.NDArray[np.uint8]]]:
        """Yield (positions, rows) for about BATCH_BYTES at a time."""
        step = max(1, BATCH_BYTES // self.reader.spec.row_bytes(array))
        for start in range(0, len(positions), step):
            some = positions[start : start + step]
            yield some, self.rows(array, some)


def unique_rows(reader: FeatureReader, array: str) -> Positions:
    """Return the positions of all rows that count, ascending."""
    index = reader.index[array]
    return index.numbered(np.arange(len(index)))


def split_into_files(
    source: Source, array: str, positions: Positions, nbytes: int
) -> Iterator[Positions]:
    """Split rows into the contents of files, between two media items where possible.

    Args:
        source: the space.
        array: image or frame.
        positions: (n,) all rows to export.
        nbytes: bytes that one row takes in a file.
    """
    most = max(1, min(FILE_ROWS, FILE_BYTES // nbytes))
    keys = source.reader.index[array].keys
    start = 0
    while start < len(positions):
        stop = end = start + most
        while start < stop < len(positions) and (
            keys[positions[stop]].tobytes() == keys[positions[stop - 1]].tobytes()
        ):
            stop -= 1
        stop = stop if stop > start else end  # one video has more rows than fit into a file
        yield positions[start:stop]
        start = stop


def tar_files(source: Source, rows: Mapping[str, Positions]) -> Iterator[OutputFile]:
    """Yield tars of `<key>.<view>.npy` and `.json`, the layout of the shards of a webdataset space."""
    for array, positions in rows.items():
        geometry = source.geometry(array)
        files = split_into_files(source, array, positions, geometry.slot_bytes)
        for number, some in enumerate(files):
            blocks = _tar_blocks(source, array, some, geometry)
            yield OutputFile(f"{array}-{number:06d}.tar", geometry.file_bytes(len(some)), blocks)


def _tar_blocks(
    source: Source, array: str, some: Positions, geometry: TarGeometry
) -> Iterator[bytes | memoryview]:
    for batch, stored in source.batches(array, some):
        for position, row in zip(batch.tolist(), stored, strict=True):
            facts = source.facts(array, position, row)
            try:
                geometry.check_view(facts.view)
            except ValueError as error:
                raise UserError(f"{source.reader.path}: {facts.key}: {error}") from None
            before, behind = geometry.around(facts)
            yield from (before, row.data, behind)
    yield END


def safetensors_files(source: Source, rows: Mapping[str, Positions]) -> Iterator[OutputFile]:
    """Yield safetensors files with one tensor for each row, named `<key>/<view>`, and their index.json.

    A file is the length of the header (8 bytes, little-endian), the header (JSON), and the rows.
    """
    for array, positions in rows.items():
        size = source.row_bytes(array)
        for number, some in enumerate(split_into_files(source, array, positions, size)):
            name = safetensors_name(array, number)
            yield OutputFile(name, len(some) * size, _safetensors_blocks(source, array, some))
    yield OutputFile("index.json", 1, _index_blocks(source, rows))


def safetensors_name(array: str, number: int) -> str:
    """Return the name of one safetensors file."""
    return f"{array}-{number:05d}.safetensors"


def _safetensors_blocks(
    source: Source, array: str, some: Positions
) -> Iterator[bytes | memoryview]:
    size, shape = source.row_bytes(array), list(source.shape(array))
    spec, index = source.reader.spec, source.reader.index[array]
    header: dict[str, object] = {
        "__metadata__": {
            "space": source.reader.paths.name,
            "fingerprint": spec.fingerprint,
            "array": array,
            "codec": source.codec,
            "tokens": str(spec.tokens(array)),
            "width": str(spec.width),
        }
    }
    dtype = "F16" if source.codec == "fp16" else "U8"
    for number, position in enumerate(some.tolist()):
        offsets = [number * size, (number + 1) * size]
        name = "/".join(index.identity(position))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, stored in source.batches(array, some):
        yield stored.data.cast("B")


def _index_blocks(source: Source, rows: Mapping[str, Positions]) -> Iterator[bytes]:
    """Yield index.json of a safetensors export: the file of each tensor, and the time of each frame."""
    spec = source.reader.spec
    metadata = {"space": source.reader.paths.name, "codec": source.codec, "spec": spec.to_json()}

    def files() -> Iterator[tuple[str, int, object]]:
        for array, positions in rows.items():
            split = split_into_files(source, array, positions, source.row_bytes(array))
            for number, some in enumerate(split):
                name = safetensors_name(array, number)
                yield from ((array, position, name) for position in some.tolist())

    def times() -> Iterator[tuple[str, int, object]]:
        for array, positions in rows.items():
            known = source.reader.index[array].times[positions]
            for position, time_s in zip(positions.tolist(), known.tolist(), strict=True):
                if not math.isnan(time_s):
                    yield array, position, time_s

    yield f'{{"metadata": {json.dumps(metadata)}'.encode()
    for title, entries in (("weight_map", files()), ("time_s", times())):
        yield f',\n"{title}": {{'.encode()
        separator = "\n"
        for array, position, value in entries:
            tensor = "/".join(source.reader.index[array].identity(position))
            yield f"{separator}{json.dumps(tensor)}: {json.dumps(value)}".encode()
            separator = ",\n"
        yield b"}"
    yield b"}\n"
