"""An RGB image -> the encoder's square input; and how far a JPEG may be reduced while it is decoded for it.

    fit = InputFit.of(spec)
    square = fit.prepare(fit.decode(data))                       # (S, S, 3) uint8
    square = fit_image(image, 336, "squash", mean=CLIP_MEAN)     # of any RGB image

Bicubic with antialiasing. A reduced image has a part of a pixel too much along a side that is no multiple of
its scale; `Reduced.box` says where, and it is left out here, so that things are where they are in the whole
image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from cache.format.spec import SHORTER_SIDE, FeatureSpec
from model.media.images import MAX_PIXELS, DecodedImage, Reduced, decode_noted

RESIZE = "pillow:bicubic"
"""Library and filter of the resize, as specs name them."""
LONGEST_STRIP = 32
"""Length over width of the longest image that `crop` resizes whole; it cuts longer ones first."""
SCALES = (8, 4, 2)
"""What the sides of a JPEG may be divided by while it is decoded: those of libjpeg that Pillow offers."""
SPARE = 2
"""A reduced JPEG has at least this many pixels for one of the input, along the side that decides."""

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

    @staticmethod
    def of(spec: FeatureSpec) -> InputFit:
        """Return how the images of a space were decoded and fitted."""
        return InputFit(
            size=spec.image_size,
            fit=spec.fit,
            mean=spec.mean,
            shorter_side=spec.shorter_side,
            reduces=spec.decode == "reduced",
        )

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
            decoded.image, self.size, self.fit, self.mean, self.shorter_side, decoded.reduced
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
    """
    if fit == "crop":
        return _crop(image, size, shorter_side or size, reduced)
    box = None if reduced is None else reduced.box
    if fit == "pad":
        image, box = _pad(image, size, mean, reduced)
    elif fit != "squash":
        raise ValueError(f"fit {fit!r} is none of squash, pad, crop")
    return np.array(image.resize((size, size), Image.Resampling.BICUBIC, box), dtype=np.uint8)


def resize_text(fit: str, shorter_side: int) -> str:
    """Return what `fit_image` resizes with, for a spec: library, filter, shorter side before a cut."""
    return RESIZE + (f"{SHORTER_SIDE}{shorter_side}" if fit == "crop" else "")


def _crop(image: Image.Image, size: int, shorter_side: int, reduced: Reduced | None) -> Pixels:
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
    resized = image.resize((width, height), Image.Resampling.BICUBIC, whole)
    return np.array(resized.crop((left, top, left + size, top + size)), dtype=np.uint8)


def _pad(
    image: Image.Image, size: int, mean: Sequence[float], reduced: Reduced | None
) -> tuple[Image.Image, Box | None]:
    """Return `image` centred on a square of the mean colour, and the part of it to resize; None: all."""
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
    # int(), as Hugging Face's LlavaImageProcessor does, with which the result agrees within one 8-bit level.
    red, green, blue = (int(value * 255) for value in mean)
    if reduced is None:
        square = Image.new("RGB", (side, side), (red, green, blue))
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
    square = Image.new("RGB", (math.ceil(right), math.ceil(bottom)), (red, green, blue))
    square.paste(_faded(image, reduced.box, before, behind, (red, green, blue)), (at[0], at[1]))
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
