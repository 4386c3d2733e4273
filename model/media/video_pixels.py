"""One decoded frame -> an upright RGB image with square pixels. PyAV's swscale and PIL.

These decisions change pixels and are made here only:

- YUV becomes RGB by the frame's own matrix and range. Without them: limited range, and BT.709 for frames
  wider than 1024 or taller than 576 pixels, else BT.601, as players do. (FFmpeg itself takes BT.601.)
- Rounding is accurate, chroma interpolated, and CPU-specific code off: equal pixels on every machine.
- Non-square pixels are made square by enlarging the shorter side, so no detail is lost.
- The display matrix (a phone held upright) is applied in quarter turns and flips.
- Transparent pixels are drawn on white, as in images.
- HDR (PQ, HLG) is converted without tone mapping, and wide gamuts are not narrowed.
- Interlaced frames stay interlaced, both fields in one image.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import TYPE_CHECKING, cast

from PIL import Image

from model.media.images import BadMediaError, check_size, on_white
from model.media.video_open import MAX_FRAME_PIXELS, error_reason

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

HDR = {16: "PQ", 18: "HLG"}
"""FFmpeg's number -> name of the transfer functions for HDR screens."""

_MATRIX = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""AVColorSpace -> number of swscale's matrix. RGB, YCgCo and ICtCp have none; 2 means unspecified."""

_BT709, _BT601 = 1, 5
_SD_SIZE = (1024, 576)

_UNTURNED = (1, 0, 0, 1)
_TURNS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}
"""Signs of the display matrix (a, b, c, d), x' = a x + c y, y' = b x + d y -> the equal transpose."""


def frame_to_image(frame: VideoFrame, pixel_aspect: Fraction) -> Image.Image:
    """Convert `frame` to an upright RGB image.

    Args:
        frame: as decoded.
        pixel_aspect: width of a pixel divided by its height.

    Raises:
        BadMediaError: its size is refused, or swscale cannot convert its pixel format to RGB.
    """
    import av

    check_size(frame.width, frame.height, MAX_FRAME_PIXELS)
    width, height = _square_pixel_size(frame.width, frame.height, pixel_aspect)
    mode, name = ("RGBA", "rgba") if _has_alpha(frame) else ("RGB", "rgb24")
    try:
        shown = frame.reformat(
            width,
            height,
            name,
            src_colorspace=_matrix(frame),
            interpolation=_scaling_flags(),
            threads=1,
        )
    except (av.FFmpegError, ValueError) as error:
        reason = f"pixel format {frame.format.name} cannot be converted: {error_reason(error)}"
        raise BadMediaError(reason) from None
    plane = shown.planes[0]
    image = Image.frombytes(mode, (width, height), bytes(plane), "raw", mode, plane.line_size, 1)
    if mode == "RGBA":
        image = on_white(image)
    turn = _TURNS.get(_orientation(frame))
    return image if turn is None else image.transpose(turn)


def _scaling_flags() -> int:
    from av.video.reformatter import Interpolation

    return int(
        Interpolation.BICUBIC
        | Interpolation.ACCURATE_RND
        | Interpolation.BITEXACT
        | Interpolation.FULL_CHR_H_INT
    )


def _square_pixel_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Return the size in square pixels, or the frame's own size if that would exceed the limit."""
    wider, higher = max(aspect, Fraction(1)), max(1 / aspect, Fraction(1))
    square = (round(width * wider), round(height * higher))
    return square if square[0] * square[1] <= MAX_FRAME_PIXELS else (width, height)


def _matrix(frame: VideoFrame) -> int:
    known = _MATRIX.get(frame.colorspace)
    if known is not None:
        return known
    large = frame.width > _SD_SIZE[0] or frame.height > _SD_SIZE[1]
    return _BT709 if large else _BT601


def _has_alpha(frame: VideoFrame) -> bool:
    pixel = frame.format
    return bool(pixel.has_palette) or any(component.is_alpha for component in pixel.components)


def _orientation(frame: VideoFrame) -> tuple[int, int, int, int]:
    """Return the signs of the display matrix, as the nearest quarter turn; `_UNTURNED` without one."""
    # A buffer, although it is not typed as one.
    raw = bytes(cast("bytes", frame.side_data.get("DISPLAYMATRIX") or b""))
    if len(raw) < 36:
        return _UNTURNED
    a, b, _, c, d = struct.unpack_from("<5i", raw)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (_sign(a), 0, 0, _sign(d))
    return (0, _sign(b), _sign(c), 0)


def _sign(value: int) -> int:
    return -1 if value < 0 else 1
