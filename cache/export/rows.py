"""Rows of a space as files for other people's tools: WebDataset tars, or safetensors.

n rows of one array; a row is `row_bytes` long as stored, and as long as float16 (tokens, width) unpacked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from cache.format import codec
from cache.format.checksums import crc32c
from cache.format.shard import RowFacts
from cache.format.tar_shard import END, TarGeometry
from cache.store.reader import FeatureReader
from configs import UserError

FILE_BYTES = 1 << 30
"""About the size of an exported file."""

FILE_ROWS = 1 << 16
"""Rows in one at most: the header of a safetensors file may take 100 MB, a row takes 200 bytes of it."""

BATCH_BYTES = 16 << 20
"""Stored bytes read at a time."""

Positions = npt.NDArray[np.int64]
Progress = Callable[[int], None]
"""Called with the number of bytes just written."""


class Part(NamedTuple):
    """One file of an export."""

    name: str
    nbytes: int
    """Its size, about."""
    write: Callable[[BinaryIO, Progress], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """The rows of a space, as they are handed on."""

    reader: FeatureReader
    """Of the space; checked."""
    unpack: bool
    """Whether rows leave as float16."""

    @property
    def layout(self) -> str:
        """How a row is handed on."""
        return "fp16" if self.unpack else self.reader.spec.layout

    def shape(self, array: str) -> tuple[int, ...]:
        """Of one row's array: (tokens, width) float16, or (row_bytes,) uint8."""
        if self.layout == "fp16":
            return self.reader.spec.tokens(array), self.reader.spec.width
        return (self.reader.spec.row_bytes(array),)

    def row_bytes(self, array: str) -> int:
        """Bytes of one row, as it is handed on."""
        return codec.row_bytes(self.layout, self.reader.spec.tokens(array), self.reader.spec.width)

    def geometry(self, array: str) -> TarGeometry:
        """What stands around such rows in a tar."""
        spec = self.reader.spec
        tokens, width = spec.tokens(array), spec.width
        size = self.row_bytes(array)
        return TarGeometry(
            row_bytes=size, slots=FILE_ROWS, layout=self.layout, tokens=tokens, width=width
        )

    def rows(self, array: str, positions: Positions) -> npt.NDArray[np.uint8]:
        """(n, row_bytes) of some positions, in their order.

        Raises:
            CorruptError: a row is not what was written.
        """
        spec, index = self.reader.spec, self.reader.index[array]
        stored = np.empty((len(positions), spec.row_bytes(array)), np.uint8)
        self.reader.read_into(array, index.rows(positions), stored)
        if self.layout == spec.layout:
            return stored
        values = codec.unpack(stored, spec.layout, spec.tokens(array), spec.width)
        return np.ascontiguousarray(values, "<f2").view(np.uint8).reshape(len(positions), -1)

    def facts(self, array: str, position: int, row: npt.NDArray[np.uint8]) -> RowFacts:
        """What is known of a row; the crc is that of `row`, which `rows` gave."""
        index = self.reader.index[array]
        key, view = index.identity(position)
        time_s = float(index.times[position])
        crc = crc32c(row.data) if self.unpack else int(index.crcs[position])
        error = float(index.columns.errors[position])
        known = None if np.isnan(time_s) else time_s
        return RowFacts(key=key, view=view, time_s=known, crc=crc, error=error)

    def batches(
        self, array: str, positions: Positions
    ) -> Iterator[tuple[Positions, npt.NDArray[np.uint8]]]:
        """Positions, and their rows, some at a time."""
        step = max(1, BATCH_BYTES // self.reader.spec.row_bytes(array))
        for start in range(0, len(positions), step):
            some = positions[start : start + step]
            yield some, self.rows(array, some)


def different_rows(reader: FeatureReader, array: str) -> Positions:
    """Return the positions of all rows, ascending. Of a row stored twice, the older counts."""
    index = reader.index[array]
    keep = np.ones(len(index), bool)
    keep[[again for _, again in index.duplicates()]] = False
    return np.flatnonzero(keep)


def cut(source: Source, array: str, positions: Positions, nbytes: int) -> Iterator[Positions]:
    """Stretches of rows, `nbytes` each, for a file each; between two media where that is possible."""
    most = max(1, min(FILE_ROWS, FILE_BYTES // nbytes))
    keys = source.reader.index[array].keys
    start = 0
    while start < len(positions):
        stop = end = start + most
        while start < stop < len(positions) and (
            keys[positions[stop]].tobytes() == keys[positions[stop - 1]].tobytes()
        ):
            stop -= 1
        stop = stop if stop > start else end  # a video of more rows than a file may hold
        yield positions[start:stop]
        start = stop


def tar_parts(source: Source, rows: Mapping[str, Positions]) -> Iterator[Part]:
    """Tars of `<key>.<view>.npy` and `.json`, as the shards of a webdataset space are."""
    for array, positions in rows.items():
        geometry = source.geometry(array)

        def write(
            file: BinaryIO,
            progress: Progress,
            array: str,
            some: Positions,
            geometry: TarGeometry = geometry,
        ) -> None:
            for batch, stored in source.batches(array, some):
                for position, row in zip(batch.tolist(), stored, strict=True):
                    facts = source.facts(array, position, row)
                    try:
                        geometry.check_view(facts.view)
                    except ValueError as error:
                        raise UserError(f"{source.reader.path}: {facts.key}: {error}") from None
                    before, behind = geometry.around(facts)
                    file.writelines((before, row.data, behind))
                progress(len(batch) * geometry.slot_bytes)
            file.write(END)

        for number, some in enumerate(cut(source, array, positions, geometry.slot_bytes)):
            name = f"{array}-{number:06d}.tar"
            nbytes = geometry.file_bytes(len(some))
            yield Part(name, nbytes, _bound(write, array, some))


def safetensors_parts(source: Source, rows: Mapping[str, Positions]) -> Iterator[Part]:
    """Files of one tensor a row, `<key>/<view>`: an 8-byte length, JSON, the rows one after the other."""

    def write(file: BinaryIO, progress: Progress, array: str, some: Positions) -> None:
        file.write(_safetensors_header(source, array, some))
        for _, stored in source.batches(array, some):
            file.write(stored.data)
            progress(stored.nbytes)

    for array, positions in rows.items():
        size = source.row_bytes(array)
        for number, some in enumerate(cut(source, array, positions, size)):
            nbytes = len(some) * size
            yield Part(safetensors_name(array, number), nbytes, _bound(write, array, some))


def _bound(
    write: Callable[[BinaryIO, Progress, str, Positions], None], array: str, some: Positions
) -> Callable[[BinaryIO, Progress], None]:
    return lambda file, progress: write(file, progress, array, some)


def safetensors_name(array: str, number: int) -> str:
    """Of one file."""
    return f"{array}-{number:05d}.safetensors"


def _safetensors_header(source: Source, array: str, some: Positions) -> bytes:
    size, shape = source.row_bytes(array), list(source.shape(array))
    spec, index = source.reader.spec, source.reader.index[array]
    header: dict[str, object] = {
        "__metadata__": {
            "space": source.reader.paths.name,
            "fingerprint": spec.fingerprint,
            "array": array,
            "codec": source.layout,
            "tokens": str(spec.tokens(array)),
            "width": str(spec.width),
        }
    }
    dtype = "F16" if source.layout == "fp16" else "U8"
    for number, position in enumerate(some.tolist()):
        offsets = [number * size, (number + 1) * size]
        name = "/".join(index.identity(position))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_index(file: BinaryIO, source: Source, rows: Mapping[str, Positions]) -> None:
    """index.json of a safetensors export: which file a tensor is in, and when a frame is."""
    spec = source.reader.spec
    metadata = {"space": source.reader.paths.name, "codec": source.layout, "spec": spec.to_json()}
    file.write(b'{"metadata": ' + json.dumps(metadata).encode() + b',\n"weight_map": {')
    separator = b"\n"
    for array, positions in rows.items():
        for number, some in enumerate(cut(source, array, positions, source.row_bytes(array))):
            name = json.dumps(safetensors_name(array, number)).encode()
            for position in some.tolist():
                tensor = json.dumps("/".join(source.reader.index[array].identity(position)))
                file.write(separator + tensor.encode() + b": " + name)
                separator = b",\n"
    file.write(b'},\n"time_s": {')
    separator = b"\n"
    for array, positions in rows.items():
        index = source.reader.index[array]
        for position in positions[~np.isnan(index.times[positions])].tolist():
            tensor = json.dumps("/".join(index.identity(position)))
            file.write(separator + f"{tensor}: {float(index.times[position])!r}".encode())
            separator = b",\n"
    file.write(b"}}\n")
