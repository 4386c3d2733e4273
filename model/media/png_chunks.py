"""Leave out the parts of a PNG file that say nothing about its pixels.

Texts, colour profiles and time stamps are often damaged or huge while the pixels are intact, and PIL refuses
the image then, or takes a text for a setting of its own. Browsers ignore such chunks; so does this package.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"

_KEPT = (b"tRNS", b"eXIf")
"""Chunks that may be left out by the standard, and that change what is shown: transparency, orientation."""

_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
"""Beginnings of texts in which PIL finds the orientation."""

_MAX_TEXT = 1 << 20
"""Bytes of a text, expanded, that PIL reads at most (`PngImagePlugin.MAX_TEXT_CHUNK`)."""

_END = b"\0\0\0\0IEND\xae\x42\x60\x82"


def pixel_chunks(data: bytes) -> bytes:
    """Return a PNG file without the chunks that do not change its first image.

    A file that ends, or is damaged, behind all of its pixels is completed. Damage in a chunk that is needed
    remains, for the decoder to find. Of an animation the default image is left.

    Args:
        data: begins with `SIGNATURE`.
    """
    kept: list[bytes] = []
    start = 0  # of the chunks that are kept and not in `kept` yet
    at = len(SIGNATURE)
    pixels_seen = False
    while True:
        header = data[at : at + 8]
        length = int.from_bytes(header[:4], "big")
        kind, end = header[4:], at + 12 + length
        if len(header) < 8 or not kind.isalpha() or end > len(data):
            critical = kind.isalpha() and kind[:1].isupper()
            # Whether all pixels are there is for the decoder to find, unless a piece of them is cut.
            if pixels_seen and not critical:
                return b"".join((*kept, data[start:at], _END))
            return b"".join((*kept, data[start:]))
        if kind == b"IEND":
            return b"".join((*kept, data[start:end]))
        if not _is_needed(data, kind, at, end):
            kept.append(data[start:at])
            start = end
        pixels_seen = pixels_seen or kind == b"IDAT"
        at = end


def _is_needed(data: bytes, kind: bytes, at: int, end: int) -> bool:
    if kind[:1].isupper() or kind == b"tRNS":
        return True
    if kind in _TEXTS:
        is_orientation = data.startswith(_ORIENTATION_TEXTS, at + 8)
        return (
            is_orientation and _is_intact(data, at, end) and _is_small(kind, data[at + 8 : end - 4])
        )
    return kind in _KEPT and _is_intact(data, at, end)


def _is_intact(data: bytes, at: int, end: int) -> bool:
    (stated,) = struct.unpack_from(">I", data, end - 4)
    return zlib.crc32(memoryview(data)[at + 4 : end - 4]) == stated


def _is_small(kind: bytes, body: bytes) -> bool:
    """Return whether PIL reads a text: it is short, also when it is expanded."""
    packed = kind == b"zTXt"
    text = body.partition(b"\0")[2]
    if kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].partition(b"\0")[2].partition(b"\0")[2]
    elif packed:
        if text[:1] != b"\0":
            return False  # an unknown method
        text = text[1:]
    if not packed:
        return len(text) <= _MAX_TEXT
    try:
        opened = zlib.decompressobj()
        return len(opened.decompress(text, _MAX_TEXT)) < _MAX_TEXT and not opened.unconsumed_tail
    except zlib.error:
        return False
