"""An RGB image -> the encoder's square input; and how far a JPEG may be reduced while it is decoded for it.

    fit = InputFit.of(spec)
    square = fit.prepare(fit.decode(data))                       # (S, S, 3) uint8
    square = fit_image(image, 336, "squash", mean=CLIP_MEAN)     # of any RGB image

Bicubic with antialiasing, by Pillow, or by the loops of compiled_resize.py, whose pixels are the same. A
reduced image has a part of a pixel too much along a side that is no multiple of its scale; `Reduced.box` says
where, and it is left out here, so that things are where they are in the whole image.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from cache.format.spec import SHORTER_SIDE, FeatureSpec
from configs import one_line
from model.media.images import (
    MAX_PIXELS,
    MAX_REASON,
    STRIP_PIXELS,
    DecodedImage,
    Reduced,
    decode_noted,
)

log = logging.getLogger(__name__)

RESIZE = "pillow:bicubic"
"""Library and filter of the resize, as specs name them."""
LONGEST_STRIP = 32
"""Length over width of the longest image that `crop` resizes whole; it cuts longer ones first."""
SCALES = (8, 4, 2)
"""What the sides of a JPEG may be divided by while it is decoded: those of libjpeg that Pillow offers."""
SPARE = 2
"""A reduced JPEG has at least this many pixels for one of the input, along the side that decides."""

WHOLE_PIXELS = 1 << 22
"""Pixels of the largest image that becomes an array at once. Larger ones are in several pieces in Pillow."""
MOST_COMPILED = math.isqrt(MAX_PIXELS)
"""Longest side, pixels, of an image that compiled loops resize. `pad` shrinks longer ones first."""

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class InputFit:
    """How the bytes of an image become the input of one encoder. It can be pickled; no torch."""

    size: int
    """Side of the input, pixels."""
    fit: str
    """How an image becomes square: `squash`, `pad` or `crop`."""
    mean: tuple[float, float, float]
    """Mean colour in [0, 1]."""
    shorter_side: int
    """With `crop`, pixels of the shorter side before the square is cut out; else `size`."""
    reduces: bool = False
    """Whether JPEGs far larger than the input are decoded at a reduced scale: `decode: reduced` of a spec."""
    compiled: bool = False
    """Whether compiled loops resize, where numba is there. The pixels are the same. See `compile`."""

    @staticmethod
    def of(spec: FeatureSpec, *, compiled: bool = False) -> InputFit:
        """Return how the images of a space were decoded and fitted; `compiled`: that many will be."""
        return InputFit(
            size=spec.image_size,
            fit=spec.fit,
            mean=spec.mean,
            shorter_side=spec.shorter_side,
            reduces=spec.decode == "reduced",
            compiled=compiled,
        )

    def compile(self) -> None:
        """Load what `prepare` needs. The loops take 0.3 s, and 4 s if nobody has compiled them here."""
        if self.compiled:
            _loops()

    def decode(self, data: bytes) -> DecodedImage:
        """Decode an image, at a reduced scale if that is asked for and it is large enough.

        Raises:
            BadMediaError: as `decode_noted` does.
        """
        return decode_noted(data, self.scale)

    def prepare(self, image: Image.Image | DecodedImage) -> Pixels:
        """Return the input of an image, (S, S, 3) uint8."""
        decoded = image if isinstance(image, DecodedImage) else DecodedImage(image)
        return fit_image(
            decoded.image,
            self.size,
            self.fit,
            self.mean,
            self.shorter_side,
            decoded.reduced,
            compiled=self.compiled,
        )

    def scale(self, width: int, height: int) -> int:
        """Return by how much the sides of a JPEG are divided while it is decoded: 1, 2, 4 or 8.

        What is left of the side that decides is at least `SPARE` times what the resize makes of it. That side
        is the longer one with `pad`, else the shorter one.
        """
        if not self.reduces:
            return 1
        short, long = sorted((width, height))
        if self.fit == "crop" and long > LONGEST_STRIP * short:
            return 1  # only its middle is resized
        side = long if self.fit == "pad" else short
        return next((by for by in SCALES if side >= SPARE * self.shorter_side * by), 1)


def fit_image(
    image: Image.Image,
    size: int,
    fit: str,
    mean: Sequence[float],
    shorter_side: int | None = None,
    reduced: Reduced | None = None,
    *,
    compiled: bool = False,
) -> Pixels:
    """Resize an RGB image to the encoder's square input, (size, size, 3) uint8.

    Args:
        image: RGB.
        size: side of the square, pixels.
        fit: `squash` ignores the aspect ratio; `pad` keeps it and fills up with the mean colour; `crop` takes
            the central square.
        mean: the encoder's mean colour in [0, 1].
        shorter_side: with `crop`, pixels of the shorter side before the square is cut out; None: `size`.
        reduced: how the image was reduced when it was decoded; None: it is whole.
        compiled: whether compiled loops resize.
    """
    if fit == "crop":
        return _crop(image, size, shorter_side or size, reduced, compiled)
    box = None if reduced is None else reduced.box
    if fit == "pad":
        # int(), as Hugging Face's LlavaImageProcessor does, with which the result agrees within one level.
        red, green, blue = (int(value * 255) for value in mean)
        if reduced is None and compiled and (loops := _loops_for(image)) is not None:
            pixels = _pixels(image)
            canvas = loops.Canvas.square(pixels, (red, green, blue))
            return loops.resize(pixels, (size, size), canvas=canvas)
        image, box = _pad(image, size, (red, green, blue), reduced)
    elif fit != "squash":
        raise ValueError(f"fit {fit!r} is none of squash, pad, crop")
    return _resize(image, (size, size), box, compiled)


def resize_text(fit: str, shorter_side: int) -> str:
    """Return what `fit_image` resizes with, for a spec: library, filter, shorter side before a cut."""
    return RESIZE + (f"{SHORTER_SIDE}{shorter_side}" if fit == "crop" else "")


def _resize(image: Image.Image, size: tuple[int, int], box: Box | None, compiled: bool) -> Pixels:
    if compiled and _rows_first(image.size, size) and (loops := _loops_for(image)) is not None:
        return loops.resize(_pixels(image), size, box)
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box), dtype=np.uint8)


def _rows_first(before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether every version of Pillow resizes rows first, as compiled loops do.

    Pillow 13 begins with columns where they lose more than twice as many pixels as the rows (Resample.c), and
    so rounds other values.
    """
    width, height = (old - new for old, new in zip(before, after, strict=True))
    return height <= max(0, 2 * width)


def _loops_for(image: Image.Image) -> ModuleType | None:
    return _loops() if max(image.size) <= MOST_COMPILED else None


@functools.cache
def _loops() -> ModuleType | None:
    """Return compiled_resize.py, compiled; None where it cannot be used."""
    noise = np.random.default_rng(0).integers(0, 256, (47, 61, 3), np.uint8)
    box, size = (3.5, 2.0, 60.25, 47.0), (29, 31)
    wanted = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC, box))
    try:
        from model.media import compiled_resize

        found = compiled_resize.resize(noise, size, box)
        why = "" if np.array_equal(found, wanted) else "they give other pixels"
    except ImportError:  # numba is not there for every Python
        return None
    except Exception as error:  # of a compiler, or of what it has kept; Pillow needs neither
        why = one_line(error, MAX_REASON)
    if why:
        kept = Path(__file__).parent / "__pycache__"
        log.warning(
            "Pillow resizes, which takes longer, since the loops of numba do not work: %s; to compile them "
            "again: rm -f %s/compiled_resize.*.nb*",
            why,
            kept,
        )
        return None
    return compiled_resize


def _pixels(image: Image.Image) -> Pixels:
    """Return an RGB image as an array (height, width, 3), or (height, width, 4) with a last value to ignore.

    That takes one copy, or none: Pillow's own memory is an Arrow array if it is in one piece.
    """
    width, height = image.size
    if width * height <= WHOLE_PIXELS:
        try:
            return np.asarray(pa.array(image).flatten()).reshape(height, width, 4)
        except ValueError:  # it is in several pieces
            return np.asarray(image)
    pixels = np.empty((height, width, 3), np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        pixels[top:bottom] = np.asarray(image.crop((0, top, width, bottom)))
    return pixels


def _crop(
    image: Image.Image, size: int, shorter_side: int, reduced: Reduced | None, compiled: bool
) -> Pixels:
    """Resize an image until its shorter side has `shorter_side` pixels, and cut out the middle.

    Sizes and offsets are rounded as in transformers' image processors, so the pixels are theirs.
    """
    width, height = image.size if reduced is None else reduced.size
    short, long = sorted((width, height))
    if long > LONGEST_STRIP * short:  # resized whole, such a strip would take gigabytes
        keep = LONGEST_STRIP * short
        start = (long - keep) // 2
        is_wide = width == long
        box = (start, 0, start + keep, short) if is_wide else (0, start, short, start + keep)
        image, long = image.crop(box), keep
    new = shorter_side, int(shorter_side * long / short)
    width, height = new if width <= height else new[::-1]
    left, top = (width - size) // 2, (height - size) // 2
    whole = None if reduced is None else reduced.box
    resized = _resize(image, (width, height), whole, compiled)
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def _pad(
    image: Image.Image, size: int, colour: tuple[int, int, int], reduced: Reduced | None
) -> tuple[Image.Image, Box | None]:
    """Return `image` centred on a square of one colour, and the part of it to resize; None: all."""
    by = 1 if reduced is None else reduced.by
    whole = image.size if reduced is None else reduced.size
    side = -(-max(whole) // by)
    if side * side > MAX_PIXELS:
        # A 1 x 80,000,000 strip would need a square of 10^15 pixels: shrink such images first. Four times
        # the target size leaves the final resize enough detail.
        shrink = 4 * size / max(whole)
        width, height = (max(1, round(length * shrink)) for length in whole)
        box = None if reduced is None else reduced.box
        image = image.resize((width, height), Image.Resampling.BICUBIC, box)
        side, reduced = max(width, height), None
    if reduced is None:
        square = Image.new("RGB", (side, side), colour)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square, None
    # The margins of the whole image, in pixels of the reduced one, which is pasted at the next whole pixel.
    before = [(max(whole) - length) // 2 for length in whole]
    behind = [max(whole) - length - least for length, least in zip(whole, before, strict=True)]
    at = [math.ceil(margin / by) for margin in before]
    left, top = (
        start + edge - margin / by
        for start, edge, margin in zip(at, reduced.box[:2], before, strict=True)
    )
    right, bottom = left + max(whole) / by, top + max(whole) / by
    # Where there is no margin nothing may follow: the resize would mix it into the edge of the image.
    square = Image.new("RGB", (math.ceil(right), math.ceil(bottom)), colour)
    square.paste(_faded(image, reduced.box, before, behind, colour), (at[0], at[1]))
    return square, (left, top, right, bottom)


def _faded(
    image: Image.Image,
    box: Box,
    before: Sequence[int],
    behind: Sequence[int],
    colour: tuple[int, int, int],
) -> Image.Image:
    """Return a reduced image whose outermost pixels take the colour around it, as far as they are outside.

    Args:
        image: reduced.
        box: its part that shows the whole image.
        before: the margins left of it and above.
        behind: the margins right of it and below.
        colour: of the margins.
    """
    width, height = image.size
    left, top, right, bottom = box
    edges = (
        ((0, 0, 1, height), left, before[0]),
        ((0, 0, width, 1), top, before[1]),
        ((width - 1, 0, width, height), width - right, behind[0]),
        ((0, height - 1, width, height), height - bottom, behind[1]),
    )
    image = image.copy()
    for edge, outside, margin in edges:
        if outside and margin:
            pixels = image.crop(edge)
            plain = Image.new("RGB", pixels.size, colour)
            image.paste(Image.blend(pixels, plain, outside), edge)
    return image
