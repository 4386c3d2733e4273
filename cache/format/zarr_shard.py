"""The bytes of a Zarr v3 shard, and the zarr.json around it, as zarr-python reads them.

A shard is its rows, each followed by its crc32c, then an index of (offset, nbytes) for every slot, then
the index's crc32c. Rows fill the slots from 0 up, without gaps; a shard may end early, its remaining
slots marked missing. So a row's place follows from its number, and every byte is covered by a checksum.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cache.format.checksums import UNSEALED, crc32c, seal
from cache.format.shard import Geometry, RowFacts
from cache.format.spec import FeatureSpec

CRC_BYTES = 4
MISSING = 2**64 - 1
"""Offset and nbytes of a slot that holds no row."""

ROW_CODEC = "nanomolmo2.row"
"""Zarr's name for our lossy row layouts; `cache.format.zarr_codec` has the class."""


def crc_bytes(crc: int) -> bytes:
    """A crc32c as it stands in a file: 4 bytes, little-endian."""
    return crc.to_bytes(CRC_BYTES, "little")


@dataclass(frozen=True, kw_only=True)
class ZarrGeometry(Geometry):
    """A row starts its slot; its crc32c ends it. The tail is the index."""

    lead_bytes = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes from one row's start to the next one's."""
        return self.row_bytes + CRC_BYTES

    @property
    def tail_bytes(self) -> int:
        """Bytes of the index, with its crc."""
        return 16 * self.slots + CRC_BYTES

    def check_view(self, view: str) -> None:
        """Any will do: the shard does not name its rows."""

    def around(self, facts: RowFacts) -> tuple[bytes, bytes]:
        """Nothing, and the row's crc."""
        return b"", crc_bytes(facts.crc)

    def tail_with_crc(self, rows: int) -> tuple[bytes, int]:
        """The index of a shard that holds `rows` rows, and the crc it ends in."""
        entries = np.full((self.slots, 2), MISSING, "<u8")
        entries[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(self.slot_bytes)
        entries[:rows, 1] = self.slot_bytes
        crc = crc32c(entries.data)
        return entries.tobytes() + crc_bytes(crc), crc

    def commit_columns(self, rows: int) -> Mapping[str, npt.NDArray[np.int64]]:  # noqa: ARG002
        """None: a row's place follows from its number, and the index in the shard says it, too."""
        return {}


def array_values(spec: FeatureSpec, array: str, slots: int, rows: int) -> dict[str, Any]:
    """What zarr.json of one array says: `rows` row numbers, of which some may hold nothing (NaN)."""
    tokens, width = spec.tokens(array), spec.width
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    row = little
    if spec.codec != "fp16":
        row = {"name": ROW_CODEC, "configuration": {"codec": spec.codec}}
    sharding = {
        "chunk_shape": [1, tokens, width],
        "codecs": [row, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, tokens, width],
        "data_type": "float16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [slots, tokens, width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["row", "token", "channel"],
    }


GROUP_VALUES = {"zarr_format": 3, "node_type": "group"}


def zarr_json(values: Mapping[str, Any]) -> bytes:
    """The file zarr.json, sealed in its attributes: elsewhere Zarr allows no keys of our own."""
    text = json.dumps({**values, "attributes": {"seal": UNSEALED}}, indent=2, allow_nan=False)
    return seal(text.encode() + b"\n")


class ZarrContainer:
    """Zarr v3 arrays: see `cache.format.shard.Container`."""

    def geometry(self, spec: FeatureSpec, array: str, slots: int) -> Geometry:
        """Of the shards of one array."""
        return ZarrGeometry(row_bytes=spec.row_bytes(array), slots=slots)

    def group_values(self) -> Mapping[str, Any]:
        """The arrays are a group."""
        return GROUP_VALUES

    def array_values(
        self, spec: FeatureSpec, array: str, slots: int, rows: int
    ) -> Mapping[str, Any]:
        """What zarr.json says."""
        return array_values(spec, array, slots, rows)
