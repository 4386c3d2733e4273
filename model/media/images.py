"""Bytes of an image -> RGB pixels -> the encoder's square input. PIL and numpy, no torch; thread-safe.

Every input that is no sound image raises `BadMediaError` and nothing else: what PIL raises, what it only
warns of, and what it would let through. Decisions that change pixels, made once, here:

- Transparency lies on white, the page that most transparent images were drawn for.
- 16-bit grey is scaled (65535 is white; PIL's own conversion videos at 255). 32-bit integer and float
  pixels say nowhere what white is: refused, unless the integers fit 16 bits.
- CMYK is read as browsers do (Adobe's inverted polarity in JPEG, the plain one in TIFF), without its
  colour profile; embedded profiles are ignored, as the encoders' own preprocessing does.
- EXIF's orientation is applied. EXIF that cannot be read is no reason to lose an image whose pixels can.
- Of an animation or a multi-page file, the first image counts.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Larger images are refused from their header.

PIL's own limit. Peak memory of decoding one image of this size, in GB: 8-bit grey 0.45; RGB, 16-bit RGB and
CMYK 0.72; 16-bit grey 1.1; 8- or 16-bit RGBA 1.8 (Pillow 13.0, PNG and JPEG, 2026-11-25). The result is
0.36 GB.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
"""Nothing else is tried: PIL's rarer decoders are attack surface, and EPS would start Ghostscript."""

MAX_REASON = 160
"""Characters of a reason in the ledger; PIL quotes file contents in some of its messages."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what puts the image upright. 1, and nonsense, need nothing."""

_ORIENTATION_TAG = 0x0112

_HARMLESS = "Image appears to be a malformed MPO|Invalid APNG"
"""What PIL says of files whose first image is sound, and the first is the one we take."""

_LAST_FILTER = ("ignore", re.compile(_HARMLESS, re.IGNORECASE), UserWarning, None, 0)
"""As `warnings.filters` has it once `_make_pil_strict` has run."""


@dataclass(frozen=True)
class Failure:
    """Why a media item has no features. The ledger stores both fields."""

    stage: str
    """Where it failed: one of `cache.store.ledger.STAGES`."""
    reason: str
    """Why it failed, in one line."""


class BadMediaError(Exception):
    """A media item cannot become features. The job records the failure and goes on."""

    def __init__(self, reason: str, stage: str = "decode") -> None:
        super().__init__(reason)
        self.reason = reason
        """One line."""
        self.stage = stage
        """Where it failed, in the ledger's words."""

    @property
    def failure(self) -> Failure:
        """The failure as the ledger stores it."""
        return Failure(self.stage, self.reason)


def decode_image(data: bytes) -> Image.Image:
    """The image in `data`, whole, upright, as RGB.

    Raises:
        BadMediaError: anything else than a sound image of at most `MAX_PIXELS`.
    """
    _make_pil_strict()
    if not data:
        raise BadMediaError("empty file")
    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_size(image.size)
            image.load()
            _check_size(image.size)
            # After load: PNG may carry EXIF behind the pixels, and TIFF is turned by PIL while loading.
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _to_rgb(image)
            return rgb if turn is None else rgb.transpose(turn)
    except BadMediaError:
        raise
    except UnidentifiedImageError:
        raise BadMediaError(_describe_unknown(data)) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadMediaError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # PIL's decoders raise whatever the bytes lead them to
        raise BadMediaError(_one_line(error)) from error


def fit_image(
    image: Image.Image, size: int, fit: str, mean: Sequence[float]
) -> npt.NDArray[np.uint8]:
    """An RGB image as the encoder's square input: (size, size, 3) uint8, bicubic with antialiasing.

    Args:
        image: RGB.
        size: side of the square, pixels.
        fit: `squash` ignores the aspect ratio; `pad` keeps it, centred on the mean colour; `crop` takes
            the central square.
        mean: the encoder's mean colour in [0, 1], what `pad` fills with.
    """
    width, height = image.size
    box = None
    if fit == "crop":
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        box = (left, top, left + side, top + side)
    elif fit == "pad":
        image = _pad(image, size, mean)
    elif fit != "squash":
        raise ValueError(f"fit {fit!r} is none of squash, pad, crop")
    square = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.array(square, dtype=np.uint8)


def _formats() -> tuple[str, ...]:
    """Those of FORMATS that this build of PIL reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _make_pil_strict() -> None:
    """PIL's warnings become errors, but for harmless ones, and truncated files stay errors.

    Process-wide, since `warnings.catch_warnings` is not safe in threads; looked at before each decode,
    since other libraries change both.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    if _LAST_FILTER not in warnings.filters:
        warnings.filterwarnings("error", category=UserWarning, module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
        warnings.filterwarnings("ignore", message=_HARMLESS, category=UserWarning)


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadMediaError(f"{width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise BadMediaError(f"{width} x {height} pixels, more than {MAX_PIXELS}")


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 (upright) when there is none to be read."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # the pixels are sound, whatever EXIF makes PIL raise
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_from_wide(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_from_wide(image: Image.Image) -> Image.Image:
    """Pixels of more than 8 bits, as 8: 65535 is white."""
    if image.mode == "F":
        raise BadMediaError("floating-point pixels: what is white is not said")
    grey = np.asarray(image)
    if grey.min() < 0 or grey.max() > 65535:
        raise BadMediaError("32-bit pixels beyond 0..65535: what is white is not said")
    grey = (grey.astype(np.int32) * 255 + 32767) // 65535  # at most 16,744,192: int32 is enough
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _pad(image: Image.Image, size: int, mean: Sequence[float]) -> Image.Image:
    """`image` in the middle of a square of the mean colour."""
    side = max(image.size)
    if side * side > MAX_PIXELS:
        # A 1 x 80,000,000 strip would need a square of 10^15 pixels: shrink such images beforehand.
        shrink = 4 * size / side
        width, height = (max(1, round(length * shrink)) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        side = max(width, height)
    red, green, blue = (int(value * 255) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _describe_unknown(data: bytes) -> str:
    """Dead links often answer with a page instead of an image: say so."""
    start = data[:512].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image"
    if b"<svg" in start:
        return "SVG, which is not supported"
    return f"no readable image in a known format ({', '.join(FORMATS)})"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
