"""Complete a JPEG file that lacks its last bytes, and find out how much of the image that costs.

A browser shows what there is of such a file, in grey where there is nothing. PIL does so only by a setting
for the whole process, and does not say how much is missing. Here the file gets an end marker instead, with
which any decoder shows it. Decoding the file again with other bytes behind the cut changes exactly the pixels
that the missing bytes describe.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_END = b"\xff\xd9"

_MARKER = re.compile(rb"\xff+[^\x00\xd0-\xd7\xff]")
"""The next marker behind the data of a scan; FF 00 and restart markers belong to the data."""

_FILLERS = (b"\x5a\xa3\x1c\xe7\x96\x3b" * 400, b"\xa6\x4d\xd2\x31\x78\xc5" * 400)
"""Bytes behind the cut that decode to other pixels than no bytes do. None is FF."""

_SIZES = (0xC0, 0xC1, 0xC2)
"""Markers of baseline, sequential and progressive files. PIL decodes no other kinds that scanners write."""

_STANDALONE = (0x01, *range(0xD0, 0xD8))
"""Markers without a length."""


@dataclass(frozen=True, kw_only=True)
class CutJpeg:
    """A JPEG file that ends early, although the last of its scans has begun."""

    completed: bytes
    """The file with an end marker. What is missing decodes to grey."""
    probes: Sequence[bytes]
    """The file with other bytes behind its last ones. Of an equal size in pixels."""
    block: tuple[int, int]
    """Width and height of the blocks of pixels that are stored one after another."""


def find_cut(data: bytes) -> CutJpeg | None:
    """Return the completed file, or None if it does not end early, or lacks a whole scan.

    Args:
        data: any bytes.
    """
    if data.endswith(_END):
        return None
    scans = _Scans()
    at = 2
    while True:
        found = _MARKER.match(data, at)
        if found is None:
            if data[at:].strip(b"\xff"):
                return None  # damaged before its end
            break
        marker, at = data[found.end() - 1], found.end()
        if marker == _END[1]:
            return None
        if marker in _STANDALONE:
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = data[at + 2 : at + length]
        if length < 2 or at + length > len(data):
            break
        at += length
        if marker in _SIZES:
            scans.read_size(marker, body)
        elif marker == 0xDA:
            scans.read_start(body)
            following = _MARKER.search(data, at)
            at = len(data) if following is None else following.start()
            scans.end = at
    if not scans.complete():
        return None
    kept = data[: scans.end].rstrip(
        b"\xff"
    )  # FF may be the first half of a marker, or of a stuffed FF
    return CutJpeg(
        completed=kept + _END,
        probes=[kept + filler + _END for filler in _FILLERS],
        block=scans.block,
    )


class _Scans:
    """Which coefficients of which components the scans of a file hold."""

    def __init__(self) -> None:
        self.end = 0
        """Where the data of the last scan ends."""
        self.block = (8, 8)
        self._missing_bits: dict[int, npt.NDArray[np.int64]] = {}
        """Component -> for each of its 64 coefficients, the number of low bits that no scan has held yet."""

    def read_size(self, marker: int, body: bytes) -> None:
        """Read the header with the size of the image and its components."""
        components = [body[6 + 3 * n : 9 + 3 * n] for n in range(body[5] if len(body) > 5 else 0)]
        if not components or len(components[-1]) < 3:
            return
        self._missing_bits = {c[0]: np.full(64, 99) for c in components}
        if len(components) > 1:
            width, height = max(c[1] >> 4 for c in components), max(c[1] & 15 for c in components)
            self.block = (8 * max(1, width), 8 * max(1, height))
        self._progressive = marker == 0xC2

    def read_start(self, body: bytes) -> None:
        """Read the header of a scan."""
        count = body[0] if body else 0
        if len(body) < 4 + 2 * count:
            return
        first, last, bits = body[-3], body[-2], body[-1] & 15
        if not self._missing_bits or not self._progressive:
            first, last, bits = 0, 63, 0
        for number in range(count):
            if (known := self._missing_bits.get(body[1 + 2 * number])) is not None:
                known[first : last + 1] = bits

    def complete(self) -> bool:
        """Return whether the scans, the last one included, hold the whole image."""
        return bool(self._missing_bits) and not any(b.any() for b in self._missing_bits.values())


def missing_share(
    shown: npt.NDArray[np.uint8],
    others: Iterable[npt.NDArray[np.uint8]],
    block: tuple[int, int],
) -> float:
    """Return how much of an image is missing, 0 to 1.

    Args:
        shown: pixels of `CutJpeg.completed` as stored, not turned upright, (height, width, 3) uint8.
        others: pixels of its `probes`, of the same shape.
        block: its `block`.
    """
    differs = np.zeros(shown.shape[:2], bool)
    for other in others:
        differs |= (shown != other).any(axis=-1)
    rows = np.flatnonzero(differs.any(axis=1))
    if not len(rows):
        return 0.0
    height, width = shown.shape[0], shown.shape[1]
    # Decoders interpolate colours across the border of blocks, so the last row above it differs as well.
    top = (int(rows[0]) + 1) // block[1] * block[1]
    bottom = min(top + block[1], height)
    columns = np.flatnonzero(differs[top:bottom].any(axis=0))
    left = (int(columns[0]) + 1) // block[0] * block[0] if len(columns) else width
    left = min(left, width)
    return ((bottom - top) * (width - left) + (height - bottom) * width) / (height * width)
