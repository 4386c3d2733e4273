"""Pillow's bicubic resize of RGB images in compiled loops: the same pixels, in a third of the time.

    pixels = resize(rgb, (336, 252))                                   # rgb (H, W, 3) -> (252, 336, 3) uint8
    pixels = resize(rgb, (336, 336), canvas=Canvas.square(rgb, grey))  # as if it lay on a grey square

numba compiles the loops at the first call, which takes seconds, and keeps the result for later processes
beside Python's own compiled files, and trusted like them. So this is for many images.

Pillow (libImaging/Resample.c) rounds the weights to multiples of 2^-22 and adds up integers, so sums do not
depend on their order. It resizes rows to 8 bits and then columns, one pixel after the other. These loops take
`ROWS` rows at a time, turned so that equal columns of them are neighbours, and compute 4 to 16 values in one
instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]
Function = Callable[..., Any]

ROWS = 16
"""Rows that are resized together."""
LANES = 3 * ROWS
"""Values of a column of them."""
AT_ONCE = 4
"""Weights that are applied together, before a sum is stored."""
BITS = 22
"""Bits of a weight behind the binary point, as in Pillow: sums of products with 8 bits fit into 32."""
HALF = np.int32(1 << (BITS - 1))
SUPPORT = 2.0
"""Pixels to each side that bicubic weighs, where nothing is reduced."""

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}
"""Of numba: a division by zero is no error, and threads may run beside."""


class Canvas(NamedTuple):
    """What an image lies on."""

    width: int
    height: int
    left: int
    """Where the image begins, pixels."""
    top: int
    colour: tuple[int, int, int]
    """Around the image."""

    @staticmethod
    def square(image: Pixels, colour: tuple[int, int, int]) -> Canvas:
        """Return a square of the longer side, with the image in its middle."""
        height, width = image.shape[:2]
        side = max(width, height)
        return Canvas(side, side, (side - width) // 2, (side - height) // 2, colour)


class _Taps(NamedTuple):
    """Which pixels of a row or column an output is made of."""

    first: npt.NDArray[np.int64]
    """(outputs,) the first pixel."""
    weights: npt.NDArray[np.int32]
    """(outputs, a multiple of AT_ONCE) in units of 2^-BITS; 0 behind the last pixel."""


def resize(
    image: Pixels, size: tuple[int, int], box: Box | None = None, canvas: Canvas | None = None
) -> Pixels:
    """Resize an image as Pillow's `Image.resize` does, bicubic, where that begins with the rows.

    Args:
        image: (height, width, 3 or more), contiguous: red, green, blue, and what is ignored.
        size: width and height of the result.
        box: the part to resize, left, top, right, bottom; None: all.
        canvas: what the image lies on, and what is resized; None: the image alone.

    Returns:
        (size[1], size[0], 3) uint8.
    """
    image = image.view()
    image.flags.writeable = False  # one type for numba, which compiles for each
    height, width = image.shape[:2]
    on = canvas or Canvas(width, height, 0, 0, (0, 0, 0))
    left, top, right, bottom = box or (0.0, 0.0, float(on.width), float(on.height))
    across = _taps(on.width, left, right, size[0])
    down = _taps(on.height, top, bottom, size[1])
    # Weights of 0 are applied to what lies behind the last column and row.
    turned = np.empty((on.width + across.weights.shape[1], ROWS, 3), np.uint8)
    turned[:] = on.colour
    behind = down.weights.shape[1] + ROWS
    rows = np.empty((on.height + behind, _whole_lanes(3 * size[0])), np.uint8)
    out = np.empty((size[1], rows.shape[1]), np.uint8)
    place = on.left, on.top, on.height
    _resize(image, place, turned.reshape(-1), across, rows.reshape(-1), down, out.reshape(-1))
    return out[:, : 3 * size[0]].reshape(size[1], size[0], 3)


def _whole_lanes(values: int) -> int:
    return -(-values // LANES) * LANES


def _taps(length: int, start: float, end: float, outputs: int) -> _Taps:
    """Return what each output is made of: Pillow's `precompute_coeffs`, `normalize_coeffs_8bpc`.

    Args:
        length: pixels of a row or column.
        start: where the part that is resized begins.
        end: where it ends.
        outputs: pixels that it becomes.
    """
    start_32, end_32 = np.float32(start), np.float32(end)  # as Pillow has a box
    scale, start = float(end_32 - start_32) / outputs, float(start_32)
    stretch = max(scale, 1.0)
    support = SUPPORT * stretch
    centre = start + (np.arange(outputs) + 0.5) * scale
    first = np.maximum((centre - support + 0.5).astype(np.int64), 0)
    behind = np.minimum((centre + support + 0.5).astype(np.int64), length)
    most = -(-(2 * math.ceil(support) + 1) // AT_ONCE) * AT_ONCE
    pixel = np.arange(most)
    x = np.abs((pixel + first[:, None] - centre[:, None] + 0.5) * (1.0 / stretch))
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    weights = np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    weights[pixel >= (behind - first)[:, None]] = 0.0
    # Added up one after the other, as Pillow does.
    total = np.cumsum(weights, axis=1)[:, -1:]
    weights = np.divide(weights, total, out=weights, where=total != 0.0) * (1 << BITS)
    return _Taps(first, np.trunc(weights + np.where(weights < 0, -0.5, 0.5)).astype(np.int32))


def kernel(function: Function) -> Function:
    """Let numba compile a function when it is first called, and keep the result for later processes."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder that it may write to
        return part(function)


def part(function: Function) -> Function:
    """Let numba compile a function into the kernel that calls it."""
    return numba.njit(**OPTIONS)(function)


@kernel
def _resize(image, place, turned, across, rows, down, out):  # type: ignore[no-untyped-def]
    """Resize rows into `rows`, and their columns into `out`; all three are flat."""
    left, top, height = place
    bottom, row_size = top + len(image), len(out) // len(down.first)
    sums, packed = np.empty(LANES, np.int32), np.empty(LANES, np.uint8)
    plain = np.empty(row_size, np.uint8)
    for pixel in range(len(across.first)):
        _weigh(turned, across.first[pixel] * LANES, LANES, across.weights[pixel], sums)
        _clip(sums, packed)
        plain[3 * pixel : 3 * pixel + 3] = packed[:3]  # no image is in `turned` yet
    for y in range(0, len(image), ROWS):
        for row in range(min(ROWS, len(image) - y)):
            _turn(image[y + row].reshape(-1), image.shape[2], turned[left * LANES + 3 * row :])
        for pixel in range(len(across.first)):
            _weigh(turned, across.first[pixel] * LANES, LANES, across.weights[pixel], sums)
            _clip(sums, packed)
            at = (top + y) * row_size + 3 * pixel
            for row in range(ROWS):  # also behind the last one: a fixed number is faster
                three = rows[at + row * row_size : at + row * row_size + 3]
                three[0] = packed[3 * row]
                three[1] = packed[3 * row + 1]
                three[2] = packed[3 * row + 2]
    for y in range(height):
        if y < top or y >= bottom:
            rows[y * row_size : (y + 1) * row_size] = plain
    for y in range(len(down.first)):
        for at in range(0, row_size, LANES):
            _weigh(rows, down.first[y] * row_size + at, row_size, down.weights[y], sums)
            _clip(sums, out[y * row_size + at : y * row_size + at + LANES])


@part
def _turn(row, step, turned):  # type: ignore[no-untyped-def]
    """Make a row, in which a pixel takes `step` bytes, a column of `turned`."""
    for x in range(len(row) // step):
        to, pixel = turned[x * LANES : x * LANES + 3], row[step * x : step * x + 3]
        to[0], to[1], to[2] = pixel[0], pixel[1], pixel[2]


@part
def _weigh(values, at, step, weights, sums):  # type: ignore[no-untyped-def]
    """Add up `LANES` values at `at`, at `at + step`, ..., each times its weight."""
    for i in range(LANES):
        sums[i] = HALF
    for tap in range(0, len(weights), AT_ONCE):
        w0, w1, w2, w3 = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
        from_0 = values[at : at + LANES]
        from_1 = values[at + step : at + step + LANES]
        from_2 = values[at + 2 * step : at + 2 * step + LANES]
        from_3 = values[at + 3 * step : at + 3 * step + LANES]
        for i in range(LANES):
            sums[i] += (
                np.int32(from_0[i]) * w0
                + np.int32(from_1[i]) * w1
                + np.int32(from_2[i]) * w2
                + np.int32(from_3[i]) * w3
            )
        at += AT_ONCE * step


@part
def _clip(sums, out):  # type: ignore[no-untyped-def]
    for i in range(LANES):
        out[i] = min(max(sums[i] >> BITS, 0), 255)
