"""Turn arrays and image files into data URIs: images that are part of the page."""

from __future__ import annotations

import base64
import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from cache.maintenance.local_media import MediaFileError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Formats that are decoded: those of the encoder. PIL's rarer decoders are attack surface."""

HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
"""Brands of HEIC files, at their beginning."""

MAX_PIXELS = 89_478_485
"""Pixels of the largest image that is decoded: the encoder refuses larger ones."""

MAX_FILE_BYTES = 64 << 20
"""Bytes of the largest image file that is read: a bound on memory."""

JPEG_QUALITY = 82

STAMP = 96
"""Side of the images in the list of neighbours, pixels."""

HEAT = ((13, 14, 38), (58, 28, 99), (129, 37, 110), (201, 62, 86), (243, 120, 62), (252, 222, 140))
"""Colours (red, green, blue) from low to high, in even steps of lightness: also readable in grey and with
colour blindness."""


def heat(values: npt.NDArray[np.floating], low: float, high: float) -> npt.NDArray[np.uint8]:
    """Return numbers (...) as colours (..., 3) of `HEAT`: the first at `low`, the last at `high`."""
    anchors = np.array(HEAT, np.float64)
    share = np.clip((values.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1)
    positions = np.linspace(0, 1, len(anchors))
    channels = [np.interp(share, positions, anchors[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


# ---- data URIs


def png(pixels: npt.NDArray[np.uint8]) -> str:
    """Return pixels (height, width, 3) as a data URI, without loss."""
    return _encoded(Image.fromarray(np.ascontiguousarray(pixels)), "png", optimize=True)


def jpeg(image: Image.Image) -> str:
    """Return a photograph as a data URI."""
    return _encoded(image, "jpeg", quality=JPEG_QUALITY)


def stamp(image: Image.Image) -> str:
    """Return the central square of an image, `STAMP` pixels a side, as a data URI."""
    return jpeg(ImageOps.fit(image, (STAMP, STAMP), Image.Resampling.BICUBIC))


def _encoded(image: Image.Image, file_format: str, **options: int) -> str:
    out = io.BytesIO()
    image.save(out, file_format, **options)
    return data_uri(out.getvalue(), file_format)


def data_uri(data: bytes, file_format: str) -> str:
    """Return the bytes of an image file as a data URI; `file_format` is `png`, `jpeg` or `gif`."""
    return f"data:image/{file_format};base64,{base64.b64encode(data).decode()}"


# ---- files


def decode(data: bytes, side: int) -> Image.Image:
    """Return an image as the encoder reads it: RGB, upright, transparency on white.

    It may be smaller than the file's, but no side is below `side` pixels for that reason.

    Raises:
        MediaFileError: the bytes are no image of `FORMATS`, or it is too large.
    """
    try:
        return _decode(data, side)
    except Exception:  # PIL's decoders raise whatever the bytes lead them to
        raise MediaFileError("cannot be read") from None


def _open(data: bytes) -> Image.Image:
    if data[4:8] == b"ftyp" and any(brand in data[8:40] for brand in HEIC_BRANDS):
        from pillow_heif import (
            HeifImageFile,  # of the extra `heic`; without it, the image is not shown
        )

        return HeifImageFile(io.BytesIO(data))
    if data.startswith(b"\xff\xd8"):
        data += b"\xff\xd9"  # the end of a JPEG, which the file may lack
    Image.init()
    known = tuple(name for name in FORMATS if name in Image.OPEN)
    return Image.open(io.BytesIO(data), formats=known)


def _decode(data: bytes, side: int) -> Image.Image:
    with warnings.catch_warnings(action="ignore"), _open(data) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError("too many pixels")
        image.draft(
            "RGB", (side, side)
        )  # JPEG decodes at 1/2, 1/4 or 1/8 of its size for less work
        image.load()
        # In place, in whole numbers and on one sheet of paper: a copy of 89 million pixels is 358 MB.
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey: 65535 is white
            grey = np.asarray(image) // 257
            return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.has_transparency_data:
            seen = image if image.mode == "RGBA" else image.convert("RGBA")
            paper = Image.new("RGB", seen.size, "white")
            paper.paste(seen, mask=seen)
            return paper
        return image.convert("RGB")
