"""The int8 and int4 row codecs as a Zarr v3 array-to-bytes codec.

    zarr.open_array("cache/spaces/.../image")[i]        # (tokens, width) float16

zarr-python finds the codec by the entry point `zarr.codecs` of pyproject.toml, which names
`nanomolmo2.codec`. A reader's own folder may contain another package `cache`. So `nanomolmo2.codec` loads
this file by its path, and passes the numpy codec to it; this file must not import it by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from zarr.abc.codec import ArrayBytesCodec

if TYPE_CHECKING:
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.core.common import JSON

NAME = "nanomolmo2.row"


def make_codec(codec: ModuleType) -> type[ArrayBytesCodec]:
    """Return the codec class. `codec` is the module `cache.format.codec`."""

    @dataclass(frozen=True)
    class RowCodec(ArrayBytesCodec):
        """Rows (rows, tokens, width) float16, stored as `cache.format.codec.pack` packs them."""

        codec: str = "int8"
        """Name of the row codec, as zarr.json states it: `int8` or `int4`."""
        is_fixed_size = True

        @classmethod
        def from_dict(cls, data: dict[str, JSON]) -> Self:
            configuration: Any = data.get("configuration") or {}
            return cls(**configuration)

        def to_dict(self) -> dict[str, JSON]:
            return {"name": NAME, "configuration": {"codec": self.codec}}

        def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:  # noqa: ARG002
            rows, tokens, width = chunk_spec.shape
            return rows * int(codec.row_bytes(self.codec, tokens, width))

        async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
            rows, tokens, width = chunk_spec.shape
            data = np.frombuffer(chunk_bytes.to_bytes(), np.uint8).reshape(rows, -1)
            features = codec.unpack(data, self.codec, tokens, width)
            return chunk_spec.prototype.nd_buffer.from_numpy_array(features)

        async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
            rows = codec.pack(chunk_array.as_numpy_array(), self.codec)
            return chunk_spec.prototype.buffer.from_bytes(rows.tobytes())

    return RowCodec
