"""The bytes of a Zarr v3 shard, and of the zarr.json files that describe it to zarr-python.

A shard consists of its rows, each followed by its crc32c, then of an index with (offset, nbytes) of every
slot, then of the crc32c of the index. Rows fill the slots from 0 without gaps. In a shard that is not full,
the index marks the other slots as missing. So the position of a row follows from its number, and a checksum
covers every byte.
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
"""Offset and nbytes of an empty slot, as Zarr defines them."""

ROW_CODEC = "nanomolmo2.row"
"""The name of the int8 and int4 row codecs in zarr.json. `cache.format.zarr.codec` has their class."""


def crc_bytes(crc: int) -> bytes:
    """Return a crc32c as it is stored: 4 bytes, little-endian."""
    return crc.to_bytes(CRC_BYTES, "little")


@dataclass(frozen=True, kw_only=True)
class ZarrGeometry(Geometry):
    """A slot is a row and its crc32c; the tail is the index."""

    lead_bytes = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes from one row's start to the next one's."""
        return self.row_bytes + CRC_BYTES

    @property
    def tail_bytes(self) -> int:
        """Bytes of the index and its crc32c."""
        return 16 * self.slots + CRC_BYTES

    def around(self, facts: RowFacts) -> tuple[bytes, bytes]:
        """Return nothing before a row; and after it, its crc32c."""
        return b"", crc_bytes(facts.crc)

    def tail_with_crc(self, rows: int) -> tuple[bytes, int]:
        """Return the index of a shard with `rows` rows, and the crc32c at its end."""
        entries = np.full((self.slots, 2), MISSING, "<u8")
        entries[:rows, 0] = np.arange(rows, dtype=np.uint64) * np.uint64(self.slot_bytes)
        entries[:rows, 1] = self.slot_bytes
        crc = crc32c(entries.data)
        return entries.tobytes() + crc_bytes(crc), crc

    def commit_columns(self, rows: int) -> Mapping[str, npt.NDArray[np.int64]]:  # noqa: ARG002
        """Return no column: the position of a row follows from its number, and the index has it too."""
        return {}


def zarr_json(values: Mapping[str, Any]) -> bytes:
    """Return the bytes of zarr.json. The seal is among the attributes: Zarr allows other keys only there."""
    text = json.dumps({**values, "attributes": {"seal": UNSEALED}}, indent=2, allow_nan=False)
    return seal(text.encode() + b"\n")


GROUP_JSON = zarr_json({"zarr_format": 3, "node_type": "group"})
"""The bytes of zarr.json of the group of arrays."""


def array_json(spec: FeatureSpec, array: str, slots: int, rows: int) -> bytes:
    """Return the bytes of zarr.json of an array with `rows` row numbers; absent rows are NaN."""
    tokens, width = spec.tokens(array), spec.width
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    packed = {"name": ROW_CODEC, "configuration": {"codec": spec.codec}}
    sharding = {
        "chunk_shape": [1, tokens, width],
        "codecs": [little if spec.codec == "fp16" else packed, {"name": "crc32c"}],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    values = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, tokens, width],
        "data_type": "float16",
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [slots, tokens, width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["row", "token", "channel"],
    }
    return zarr_json(values)
