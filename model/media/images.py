"""Bytes of an image -> upright RGB pixels. PIL and numpy, no torch; thread-safe.

Every input that is not an intact image raises `BadMediaError` and nothing else. That includes inputs for
which PIL raises another exception, only warns, or returns pixels of a damaged file. These decisions change
pixels and are made here only:

- Transparent pixels are drawn on white, the background most transparent images were drawn for.
- 16-bit grey is scaled, so that 65535 becomes 255. PIL's own conversion clips at 255 instead.
- 32-bit integer pixels are read as 16-bit if they fit, else refused: the file does not define white. Floating
  point pixels are refused for the same reason.
- CMYK is read as browsers read it: Adobe's inverted polarity in JPEG, the plain one in TIFF.
- Colour profiles are ignored, as the encoders' own preprocessing ignores them.
- EXIF's orientation is applied. Unreadable EXIF does not make an image fail.
- Of an animation or a multi-page file, the first image is used; of HEIC, the primary one.
- Texts and profiles of PNG are not read, so damage in them does no harm.
- A JPEG may be decoded at a reduced scale, if the caller asks for it. Other formats never are.
- A JPEG that lacks at most `MAX_MISSING` of its pixels is shown as browsers show it: the rest is grey. A note
  says so.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, UnidentifiedImageError

from configs import one_line
from model.media.cut_jpeg import CutJpeg, find_cut, missing_share
from model.media.kinds import recognise
from model.media.png_chunks import SIGNATURE, pixel_chunks

MAX_PIXELS = 89_478_485
"""Larger images are refused from their header.

PIL's own limit. Peak memory of decoding and padding one image of this size, in GB: PNG of every mode, TIFF,
GIF, BMP and JPEG 0.73; progressive JPEG 0.9, in CMYK 1.1; WebP 1.5 (Pillow 13.0, 2026-11-26). The result is
0.36 GB.
"""

STRIP_PIXELS = 1 << 18
"""Pixels of a strip, where an image is converted strip by strip."""

_BYTES_A_PIXEL = {"JPEG": 12, "WEBP": 20, "AVIF": 20, "HEIF": 20}
"""Memory of decoding and fitting an image of a format, at its peak; `OTHER_BYTES_A_PIXEL` of the others."""

OTHER_BYTES_A_PIXEL = 9
CUT_BYTES_A_PIXEL = 24
"""Of a JPEG that lacks its end, which is decoded several times."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""PIL's names of the formats that are read. HEIC is read too if the package pillow-heif is installed.

PIL's other decoders are rarely used and add attack surface; EPS would start Ghostscript.
"""

MAX_MISSING = 0.25
"""Share of a JPEG's pixels that may be missing at its end.

A quarter, because what is asked about an image is rarely below three quarters of its height; of a small image
the last few bytes may hold as much. A larger hole would be learnt as a grey area.
"""

MAX_REASON = 160
"""Longest reason in the ledger, characters. Some messages of PIL quote file contents."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the transpose that turns the image upright. 1 and undefined values need none."""

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""
_FROM_RIGHT, _FROM_BOTTOM = (2, 3, 6, 7), (3, 4, 7, 8)
"""EXIF orientations whose last stored column or row becomes the first, upright."""

_ORIENTATION_TAG = 0x0112  # EXIF's number of the tag

_HARMLESS = "Image appears to be a malformed MPO|Invalid APNG"
"""Warnings of PIL about files whose first image, the one used, is intact."""

_LAST_FILTER = ("ignore", re.compile(_HARMLESS, re.IGNORECASE), UserWarning, None, 0)
"""The last filter that `_make_pil_strict` adds, as `warnings.filters` stores it."""


@dataclass(frozen=True)
class Failure:
    """Why a media item has no features. The ledger stores both fields."""

    stage: str
    """Where it failed: one of `cache.store.ledger.STAGES`."""
    reason: str
    """Why it failed, in one line."""


class BadMediaError(Exception):
    """A media item cannot be decoded. The job records the reason in the ledger and continues."""

    def __init__(self, reason: str, stage: str = "decode") -> None:
        super().__init__(reason)
        self.reason = reason
        """One line."""
        self.stage = stage
        """Stage of the failure, as the ledger names it: `fetch`, `decode`, ..."""

    @property
    def failure(self) -> Failure:
        """The failure as the ledger stores it."""
        return Failure(self.stage, self.reason)


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """How a JPEG was reduced when it was decoded."""

    size: tuple[int, int]
    """Width and height of the whole image, upright, pixels."""
    by: int
    """What they were divided by: 2, 4 or 8."""
    box: tuple[float, float, float, float]
    """The part of the reduced image that shows the whole one: left, top, right, bottom, in its pixels."""
    # A side that is no multiple of `by` is rounded up to a whole pixel, which a decoder fills in.


@dataclass(frozen=True)
class DecodedImage:
    """An image, and what a report should mention about it."""

    image: Image.Image
    """RGB, upright."""
    note: str | None = None
    """A defect that the image has nevertheless, in one line; None for nothing."""
    reduced: Reduced | None = None
    """How it was reduced; None: it has all its pixels."""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole image, upright, pixels."""
        return self.image.size if self.reduced is None else self.reduced.size


ScaleOf = Callable[[int, int], int]
"""Width and height of a JPEG -> what they are divided by while it is decoded: 1, 2, 4 or 8."""


def decode_image(data: bytes) -> Image.Image:
    """Decode a whole image to upright RGB.

    Raises:
        BadMediaError: `data` is not an image of at most `MAX_PIXELS` pixels in one of `FORMATS` or HEIC, or
            it is damaged. It may lack its end as `MAX_MISSING` says.
    """
    return decode_noted(data).image


def decode_noted(data: bytes, scale_of: ScaleOf | None = None) -> DecodedImage:
    """Decode an image as `decode_image` does, and return the note for the ledger with it.

    Args:
        data: bytes of the file.
        scale_of: how far a JPEG is reduced; None: not at all. Other formats are decoded whole.

    Raises:
        BadMediaError: as `decode_image` does.
    """
    with _as_bad_media(data):
        found = recognise(data)
        if found.format and found.kind != "image":
            raise BadMediaError(found.instead_of("image"))
        if found.format == "JPEG" and (cut := find_cut(data)) is not None:
            return _decode_cut(cut, scale_of)
        try:
            return _decode(data, scale_of)
        except OSError as error:
            if found.format == "JPEG" and "truncated" in str(error):
                raise BadMediaError("the JPEG ends early: too much of it is missing") from None
            raise


def _decode_cut(cut: CutJpeg, scale_of: ScaleOf | None) -> DecodedImage:
    """Decode a JPEG that lacks its end, if that is not too much.

    PIL sometimes accepts such a file as it is, which depends on how it is read; the note never does.
    """
    shown = np.asarray(_stored_pixels(cut.completed))
    others = (np.asarray(_stored_pixels(probe)) for probe in cut.probes)
    missing = missing_share(shown, others, cut.block)
    if missing > MAX_MISSING:
        raise BadMediaError(f"the JPEG ends early: {missing:.0%} of it is missing")
    lost = f"its last {max(missing, 0.001):.1%} is missing and grey"
    lost = lost if missing else "no pixel is missing"
    return replace(_decode(cut.completed, scale_of), note=f"the JPEG ends early: {lost}")


def image_size(data: bytes) -> tuple[int, int]:
    """Return width and height of the upright image by its header.

    Raises:
        BadMediaError: the header cannot be read.
    """
    with _as_bad_media(data), _open(data) as image:
        width, height = image.size
        turned = _orientation(image) in _TURNED
    return (height, width) if turned else (width, height)


def decoding_bytes(data: bytes) -> int:
    """Return the memory that decoding and fitting an image takes, bytes, estimated from its header.

    Raises:
        BadMediaError: the header cannot be read, or the image is larger than `MAX_PIXELS`.
    """
    with _as_bad_media(data), _open(data) as image:
        each = _BYTES_A_PIXEL.get(image.format or "", OTHER_BYTES_A_PIXEL)
        if image.format == "JPEG" and find_cut(data) is not None:
            each = CUT_BYTES_A_PIXEL
        return image.width * image.height * each + len(data)


@contextmanager
def _as_bad_media(data: bytes) -> Iterator[None]:
    """Turn every error of a decoder into a BadMediaError."""
    _make_pil_strict()
    try:
        yield
    except BadMediaError:
        raise
    except UnidentifiedImageError:
        raise BadMediaError(_describe_unknown(data)) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadMediaError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # decoders raise exceptions of many types for bad bytes
        raise BadMediaError(one_line(error, MAX_REASON)) from error


def _decode(data: bytes, scale_of: ScaleOf | None) -> DecodedImage:
    with _open(data) as image:
        whole = image.size
        by = 1 if scale_of is None else _reduce(image, scale_of(*whole))
        image.load()
        check_size(*image.size, MAX_PIXELS)
        # After load: PNG may store EXIF behind the pixels, and PIL turns a TIFF while it loads.
        orientation = _orientation(image)
        turn = _UPRIGHT.get(orientation)
        rgb = _to_rgb(image)
        if rgb is not image:
            image.close()  # leaving the block closes its file alone; its pixels would stay until the end
    reduced = _reduced(whole, by, orientation) if by > 1 else None
    return DecodedImage(rgb if turn is None else rgb.transpose(turn), reduced=reduced)


def _reduce(image: Image.Image, by: int) -> int:
    """Have the sides of a JPEG divided by `by` when it is decoded; return what they are divided by.

    That is 1 for other formats. libjpeg computes fewer values from the same coefficients: less work, and no
    aliasing.
    """
    if by == 1 or not isinstance(image, JpegImagePlugin.JpegImageFile):  # MPO is a subclass
        return 1
    width, height = image.size
    # PIL takes the largest scale that leaves both sides this long.
    drafted = image.draft(None, (max(1, width // by), max(1, height // by)))
    return 1 if drafted is None else round(width / drafted[1][2])


def _reduced(whole: tuple[int, int], by: int, orientation: int) -> Reduced:
    """Return how an image was reduced.

    Args:
        whole: width and height as stored, pixels.
        by: what they were divided by.
        orientation: EXIF's.
    """
    width, height = whole[::-1] if orientation in _TURNED else whole
    # Of the last stored column and row, the part that is too much.
    left = -width % by / by if orientation in _FROM_RIGHT else 0.0
    top = -height % by / by if orientation in _FROM_BOTTOM else 0.0
    box = (left, top, left + width / by, top + height / by)
    return Reduced(size=(width, height), by=by, box=box)


def _stored_pixels(data: bytes) -> Image.Image:
    """Return an image as RGB as it is stored, not turned upright."""
    with _open(data) as image:
        return image.convert("RGB")


def _open(data: bytes) -> Image.Image:
    """Open an image of an allowed size; its pixels are not decoded yet."""
    if data.startswith(SIGNATURE):
        data = pixel_chunks(data)
    file = io.BytesIO(data)
    if recognise(data).format in ("HEIC", "HEIF"):
        # Opened directly: registering it with PIL would change PIL for the whole process.
        from pillow_heif import HeifImageFile, options

        options.DECODE_THREADS = 1  # several images are decoded at once already
        image: Image.Image
        try:
            image = HeifImageFile(file)
        except SyntaxError as error:  # its class for all damage
            raise BadMediaError(f"damaged HEIC: {one_line(error, MAX_REASON)}") from None
    else:
        image = Image.open(file, formats=_formats())
    try:
        check_size(*image.size, MAX_PIXELS)
    except BadMediaError:
        image.close()
        raise
    return image


def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of PIL reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _make_pil_strict() -> None:
    """Turn PIL's warnings into errors, except harmless ones, and refuse truncated files.

    Both settings are process-wide, because `warnings.catch_warnings` is not thread-safe. Each decode checks
    them again, because other libraries change them.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if _LAST_FILTER not in warnings.filters:
        warnings.filterwarnings("error", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
        warnings.filterwarnings("ignore", message=_HARMLESS, category=UserWarning)


def check_size(width: int, height: int, most: int) -> None:
    """Raise BadMediaError for an image or a frame without pixels or with more than `most`."""
    if width < 1 or height < 1:
        raise BadMediaError(f"{width} x {height} pixels")
    if width * height > most:
        raise BadMediaError(f"{width} x {height} pixels, more than {most}")


def _orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, or 1 (upright) if there is none or EXIF is unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # damaged EXIF raises exceptions of many types; the pixels are intact
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BadMediaError("floating-point pixels, which do not define white")
    if image.mode.startswith("I"):
        return _by_strips(image, _grey_from_wide)
    if image.has_transparency_data:
        return _by_strips(image, lambda strip: on_white(strip.convert("RGBA")))
    if image.mode == "RGB" and image.format == "JPEG":
        return image  # without a copy; those of other formats hold a decoder, or more of the file
    return image.convert("RGB")


def _by_strips(image: Image.Image, to_rgb: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Convert an image pixel by pixel, some rows at a time: `to_rgb` needs memory for several copies."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(to_rgb(strip), (0, top))
    return rgb


def on_white(rgba: Image.Image) -> Image.Image:
    """Draw an RGBA image on white and return it as RGB."""
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def _grey_from_wide(image: Image.Image) -> Image.Image:
    """Scale grey pixels of more than 8 bits to 8 bits: 65535 is white."""
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadMediaError("32-bit pixels beyond 0..65535, which do not define white")
    grey = (grey.astype(np.int32) * 255 + 32767) // 65535  # at most 16,744,192: int32 is enough
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _describe_unknown(data: bytes) -> str:
    """Say why nothing recognises the bytes as an image."""
    found = recognise(data)
    if found.kind == "image":
        return f"{found.what} with a damaged header"
    if found.format:
        return found.instead_of("image")
    return f"no readable image in a known format ({', '.join(FORMATS)})"
