"""The bytes of a WebDataset shard: a tar with slots of one size, which the `webdataset` library can stream.

A row is two members of a POSIX ustar archive, the second directly after the first:

    <key>.<view>.npy     fp16: float16 (tokens, width); other codecs: uint8 (row_bytes,), the packed row
    <key>.<view>.json    key, view, time_s, codec, tokens, width, crc32c, relative_error

`webdataset` splits a name at its first dot, so adjacent views of one media item are one sample: `full.npy`,
`full.json`; or `t:0.npy`, `t:0.json`, `t:500000.npy`, ... The first member has the same length in all slots,
and the second always fits in one block of a tar. So slots have one size, and the position of a row follows
from its number, as in a Zarr shard. Every byte that is not a row follows from the commit; no member has an
owner or a time.
"""

from __future__ import annotations

import functools
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cache.format.checksums import crc32c
from cache.format.shard import Geometry, RowFacts

BLOCK = 512
"""Bytes of a tar's block: each header and each content starts at a multiple."""

END = bytes(2 * BLOCK)
"""The end of every tar."""

_VIEW = re.compile(r"[a-z0-9][a-z0-9:,._+-]{0,29}")
"""Views that a member's name can hold. With the key's 64 digits and `.json`, the name has at most the 100
bytes that ustar allows. `webdataset` lowers the case of names, and a slash would start a folder."""


def padded(nbytes: int) -> int:
    """Return the bytes that a member's content takes, padded with zeros to whole blocks."""
    return -(-nbytes // BLOCK) * BLOCK


_OWNER = b"0000644\0" + 2 * b"0000000\0"
_TIME = b"00000000000\0"
_KIND = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_FIXED_SUM = sum(_OWNER + _TIME + 8 * b" " + _KIND)


def member_header(name: str, nbytes: int) -> bytes:
    """Return the header block of a member: without an owner or a time, and readable by all."""
    # Equal to what `tarfile` makes in its ustar format, in a tenth of the time: `cache.verify --deep` makes
    # two headers a row.
    encoded, size = name.encode("ascii"), b"%011o\0" % nbytes
    assert len(encoded) <= 100, f"{name} is too long for a ustar header"
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(encoded) + sum(size))
    return encoded.ljust(100, b"\0") + _OWNER + size + _TIME + checksum + _KIND


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return what `numpy.save` writes before the values of an array in C order."""
    buffer = io.BytesIO()
    values = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, values)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True)
class TarGeometry(Geometry):
    """A slot: tar header, npy header, row, zeros, tar header, JSON, zeros. The tail is the end of the tar."""

    @functools.cached_property
    def _npy(self) -> bytes:
        if self.spec.codec == "fp16":
            return npy_header("<f2", (self.spec.tokens(self.array), self.spec.width))
        return npy_header("|u1", (self.row_bytes,))

    @functools.cached_property
    def _zeros(self) -> bytes:
        nbytes = len(self._npy) + self.row_bytes
        return bytes(padded(nbytes) - nbytes)

    @functools.cached_property
    def lead_bytes(self) -> int:
        """Bytes of a slot before its row: the tar header and the npy header."""
        return BLOCK + len(self._npy)

    @functools.cached_property
    def slot_bytes(self) -> int:
        """Bytes from one row's start to the next one's."""
        return self.lead_bytes + self.row_bytes + len(self._zeros) + 2 * BLOCK

    @property
    def tail_bytes(self) -> int:
        """Bytes after the last member."""
        return len(END)

    def check_view(self, view: str) -> None:
        """Raise ValueError if the name of a member cannot hold this view."""
        if not _VIEW.fullmatch(view):
            raise ValueError(
                f"view {view!r}: in a webdataset space, at most 30 of a-z, 0-9 and :,._+- "
                "(a letter or digit first)"
            )

    def around(self, facts: RowFacts) -> tuple[bytes, bytes]:
        """Return the headers before a row; and after it, the padding of its block and its JSON."""
        name = f"{facts.key}.{facts.view}"
        text = self._json(facts)
        before = member_header(f"{name}.npy", len(self._npy) + self.row_bytes) + self._npy
        header = member_header(f"{name}.json", len(text))
        return before, self._zeros + header + text.ljust(BLOCK, b"\0")

    def _json(self, facts: RowFacts) -> bytes:
        # Through text, so that JSON has the shortest text of a float32.
        error, time_s = float(str(np.float32(facts.error))), facts.time_s
        values = {
            "key": facts.key,
            "view": facts.view,
            "time_s": time_s if time_s is not None and math.isfinite(time_s) else None,
            "codec": self.spec.codec,
            "tokens": self.spec.tokens(self.array),
            "width": self.spec.width,
            "crc32c": facts.crc,
            "relative_error": error if math.isfinite(error) else None,
        }
        text = json.dumps(values, allow_nan=False).encode() + b"\n"
        assert len(text) <= BLOCK, "the JSON of a row is larger than one block"
        return text

    def tail_with_crc(self, rows: int) -> tuple[bytes, int]:  # noqa: ARG002
        """Return the end of the archive, and its crc32c."""
        return END, crc32c(END)

    def commit_columns(self, rows: int) -> Mapping[str, npt.NDArray[np.int64]]:
        """Return `offset`, the byte at which each row starts, so that any program can read it."""
        return {"offset": np.arange(rows, dtype=np.int64) * self.slot_bytes + self.lead_bytes}
