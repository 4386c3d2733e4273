"""Tell what a file is by its first bytes: an image, a video, or something that is neither. Standard library.

    with path.open("rb") as file:
        found = recognise(file.read(HEAD_BYTES), path.name)
    found.kind      # "image" or "video": model.media decodes this format; "" for anything else
    found.format    # "JPEG", "MP4", "HEIC", "PDF", ...; "" if nothing is known about the bytes
    found.advice    # "convert it to PNG or JPEG"; "" if there is none

Names are not trusted: a link named `.jpg` may return a web page. A name decides only between formats whose
first bytes are equal (a stream of JPEGs, a camera's raw TIFF), and for formats without a signature.
Recognition says nothing about the rest of the file, which may still be damaged.
"""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from model.media.signatures import (
    ADVICE,
    FILMS,
    IMAGES,
    NAMED_VIDEOS,
    OTHERS,
    PICTURES,
    RAW_SUFFIXES,
    VIDEOS,
    Signature,
)

HEAD_BYTES = 4096
"""Bytes from the beginning of a file that suffice. More help to tell a camera's raw TIFF from an image."""

Kind = Literal["image", "video", ""]


@dataclass(frozen=True)
class Recognised:
    """What the first bytes of a file are."""

    kind: Kind
    """image or video if `model.media` decodes the format here, else empty."""
    format: str
    """Name of the format; empty if it is unknown."""
    advice: str = ""
    """How to make the file usable, an imperative; empty if there is no way."""

    @property
    def what(self) -> str:
        """What it is, with its article: `a JPEG image`, `an HTML page`, `an unknown format`."""
        name = {"": "unknown format", "empty": "empty file"}.get(self.format, self.format)
        text = f"{name} {self.kind or _noun(self.format)}".strip()
        return f"{'an' if _AN.match(text) else 'a'} {text}"

    def instead_of(self, wanted: str) -> str:
        """Return why it cannot be decoded as `wanted`, and what to do about it, in one line.

        Args:
            wanted: image or video, as the data set says.
        """
        if self.format == "empty":
            return "empty file"
        advice = f"; {self.advice}" if self.advice else ""
        if self.kind and self.kind != wanted:
            advice = f"; list it as {_A[self.kind]} in the data set"
        if not self.kind and _noun(self.format) == wanted:
            return f"{self.what}, which is not supported{advice}"
        return f"{self.what}, not {_A[wanted]}{advice}"


def _noun(name: str) -> str:
    """Return what to say behind the name of a format that is not decoded, if it is an adjective."""
    return "image" if name in PICTURES else "video" if name in FILMS else ""


_A = {"image": "an image", "video": "a video"}

_AN = re.compile(r"[AEIOaeiou]|HE[IV]|HT|H\.|MP|MX|M[34]|SV|XM|FLV")
"""Beginnings of names that are spoken with a vowel first."""

UNKNOWN = Recognised("", "")


def can_decode_heic() -> bool:
    """Return whether the reader of HEIC and HEIF is installed."""
    return importlib.util.find_spec("pillow_heif") is not None


def recognise(head: bytes, name: str = "") -> Recognised:
    """Return what a file is. Never raises.

    Args:
        head: its first `HEAD_BYTES` bytes, or all of a shorter file.
        name: its name, for formats that the bytes alone do not tell apart; empty if there is none.
    """
    suffix = re.search(r"\.[^./\\]*\Z", name.lower())
    return _recognise(head[:HEAD_BYTES], suffix[0] if suffix else "", head)


def _recognise(head: bytes, suffix: str, data: bytes) -> Recognised:
    if not head:
        return Recognised("", "empty")
    if head[4:8] == b"ftyp":
        return _by_brands(head)
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return _by_riff_type(head)
    if found := _by_signature(head, IMAGES):
        if found == "JPEG" and suffix in NAMED_VIDEOS:
            return Recognised("video", NAMED_VIDEOS[suffix])
        if found == "TIFF" and (suffix in RAW_SUFFIXES or _is_raw_tiff(data)):
            return _other("camera raw")
        if found != "BMP" or _is_bmp(head):
            return Recognised("image", found)
    if re.match(rb"P[1-6][\s#]|P[fy0]", head):
        return _by_netpbm(head)
    if found := _by_structure(head) or _by_signature(head, VIDEOS):
        return Recognised("video", found)
    if head[:4] == b"OggS":
        return _by_ogg_streams(head)
    if suffix == ".tga":
        return _other("TGA")  # begins with sizes, which may look like another format
    if found := _by_signature(head, OTHERS) or _by_text(head):
        return _other(found)
    if suffix in NAMED_VIDEOS:
        return Recognised("video", NAMED_VIDEOS[suffix])
    return UNKNOWN


def _other(name: str) -> Recognised:
    """Return a format that cannot be used as it is."""
    return Recognised("", name, ADVICE.get(name, ""))


def _by_signature(head: bytes, table: Sequence[Signature]) -> str:
    for offset, magic, name in table:
        if head.startswith(magic, offset):
            return name
    return ""


# ---- containers that hold images, videos or sound


def _by_brands(head: bytes) -> Recognised:
    """Tell the ISO-BMFF files apart by their brands: HEIC and AVIF are images, MP4 and MOV videos."""
    end = min(max(int.from_bytes(head[:4], "big"), 16), 1024, len(head))
    major = head[8:12]
    brands = {major, *(head[at : at + 4] for at in range(16, end - 3, 4))}
    if major in (b"avif", b"avis"):
        return Recognised("image", "AVIF")
    if major in _HEIC or major in _HEIF:
        # The major brand of a picture may be the general one.
        if brands & _HEIC:
            name = "HEIC"
        elif brands & {b"avif", b"avis"}:
            return Recognised("image", "AVIF")
        else:
            name = "HEIF"
        return Recognised("image", name) if can_decode_heic() else _other(name)
    if major == b"crx ":
        return _other("camera raw")
    if major in (b"jp2 ", b"jpx ", b"jpm ", b"mjp2"):
        return _other("JPEG 2000")
    if major == b"jxl ":
        return _other("JPEG XL")
    if major in (b"M4A ", b"M4B ", b"M4P ", b"aax ", b"F4A ", b"F4B "):
        return _other("M4A sound")
    for start, name in ((b"qt", "MOV"), (b"3g", "3GP"), (b"M4V", "M4V")):
        if major.startswith(start):
            return Recognised("video", name)
    return Recognised("video", "MP4")


_HEIC = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))
"""Brands of still images, bursts and sequences in HEVC."""

_HEIF = frozenset(
    (b"mif1", b"mif2", b"mif3", b"msf1", b"miaf", b"MiHB", b"MiHA", b"avci", b"jpeg", b"j2ki")
)
"""Brands of such files in any codec."""


def _by_riff_type(head: bytes) -> Recognised:
    kind = head[8:12]
    if kind == b"WEBP":
        return Recognised("image", "WEBP")
    if kind in (b"AVI ", b"AVIX", b"AMV "):
        return Recognised("video", "AVI")
    if kind == b"CDXA":
        return Recognised("video", "MPEG-PS")
    if kind == b"WAVE":
        return _other("WAV sound")
    return UNKNOWN


def _by_ogg_streams(head: bytes) -> Recognised:
    if any(
        mark in head for mark in (b"\x80theora", b"\x01video", b"BBCD\0", b"OVP80", b"\x81kate")
    ):
        return Recognised("video", "OGG")
    if any(mark in head for mark in (b"\x01vorbis", b"OpusHead", b"\x7fFLAC", b"Speex   ")):
        return _other("Ogg sound")
    return Recognised("video", "OGG")


def _by_structure(head: bytes) -> str:
    """Return the video format whose structure the bytes have, or an empty text."""
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "WebM" if b"webm" in head[:64] else "Matroska"
    if head[4:8] in (b"moov", b"mdat", b"wide", b"pnot", b"skip", b"free") and _has_boxes(head):
        return "MOV"  # older than brands
    if _is_transport_stream(head):
        return "MPEG-TS"
    # MXF may begin with up to 64 KiB of anything; all known files begin with the key itself.
    if head.startswith(b"\x06\x0e\x2b\x34\x02\x05\x01\x01\x0d\x01\x02"):
        return "MXF"
    start = re.match(rb"\0?\0\0\x01([\x00-\xff])([\x00-\xff])", head, re.DOTALL)
    if start:
        first, second = start[1][0], start[2][0]
        # The header of a unit in H.264: a parameter set (7) or a delimiter (9); in HEVC: 32 to 35.
        if first in (0x27, 0x47, 0x67) or (first == 0x09 and second & 0x1F == 0x10):
            return "H.264 stream"
        if first in (0x40, 0x42, 0x44, 0x46) and second == 0x01:
            return "HEVC stream"
    return ""


def _has_boxes(head: bytes) -> bool:
    """Return whether the file begins with a box of QuickTime that is at least as long as its header."""
    size = int.from_bytes(head[:4], "big")
    return size >= 8 or size in (0, 1)


def _is_transport_stream(head: bytes) -> bool:
    """Return whether every packet in `head` begins with the byte of synchronisation, 0x47.

    Packets have 188 bytes, with a time stamp before them 192 (Blu-ray), with a checksum behind them 204.
    """
    for size, first in ((188, 0), (192, 4), (204, 0)):
        marks = head[first::size]
        if len(marks) >= 3 and set(marks) == {0x47}:
            return True
    return False


# ---- images with variants


def _is_bmp(head: bytes) -> bool:
    """Return whether the header behind the letters BM has a size that BMP headers have."""
    size = int.from_bytes(head[14:18], "little")
    return size in (12, 16, 40, 52, 56, 64, 108, 124)


def _by_netpbm(head: bytes) -> Recognised:
    """Tell a portable pixmap from a text that begins with the same letters."""
    numbers = rb"(?:\s+(?:#[^\n]*\n\s*)*)"
    if re.match(rb"P(?:[1-6]|[fy]|0CMYK)" + numbers + rb"-?[0-9]", head):
        return Recognised("image", "PPM")
    text = _by_text(head)
    return _other(text) if text else UNKNOWN


def _is_raw_tiff(head: bytes) -> bool:
    """Return whether a TIFF is a camera raw: its first image is only a preview, or it has DNG's tag."""
    if head[8:10] == b"CR":
        return True
    order = "<" if head[:2] == b"II" else ">"
    if head[2:4] not in (b"*\0", b"\0*"):
        return False  # BigTIFF
    try:
        (at,) = struct.unpack_from(order + "I", head, 4)
        (count,) = struct.unpack_from(order + "H", head, at)
        tags = {}
        for number in range(min(count, 512)):
            tag, _, _, value = struct.unpack_from(order + "HHII", head, at + 2 + 12 * number)
            tags[tag] = value
    except struct.error:
        return False
    dng_version, subfile_type, sub_images = 50706, 254, 330
    return dng_version in tags or (tags.get(subfile_type) == 1 and sub_images in tags)


# ---- text


def _by_text(head: bytes) -> str:
    """Return what kind of text the bytes are; empty for other bytes."""
    start = head[:HEAD_BYTES]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        text = start.decode("utf-16", errors="replace")
    else:
        try:
            text = start.removeprefix(b"\xef\xbb\xbf").decode()
        except UnicodeDecodeError as error:
            # A character may be cut by the end of the head. Pages in older encodings are still pages.
            whole = error.start >= len(start) - 3
            text = start[: error.start].decode() if whole else start.decode("latin-1")
            if not whole and text.lstrip()[:1] != "<":
                return ""
    if re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text):
        return ""
    text = re.sub(r"\A(?:\s|<!--.*?(?:-->|\Z))+", "", text, flags=re.DOTALL)
    lower = text.lower()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return "Git LFS pointer"
    if re.match(r"/annex/objects/|(\.\./)*\.git/annex/objects/", text):
        return "git-annex pointer"
    if re.match(r"<!doctype html|<(html|head|body|script|meta|title)\b", lower):
        return "HTML page"
    if "<svg" in lower and lower.startswith(("<?xml", "<!doctype svg", "<svg", "<!entity")):
        return "SVG"
    if lower.startswith("<?xml"):
        return "HTML page" if "<html" in lower else "XML text"
    if text.startswith("#EXTM3U"):
        return "M3U playlist"
    if text[:1] in "{[" and text:
        return "JSON text"
    return "text"
