"""Pack the `tokens x width` features of one row into bytes, and unpack them: the row codecs in numpy.

    fp16    The values as little-endian float16.
    int8    A random-sign Hadamard rotation over blocks of 64 values, then one float16 scale a block and one
            signed byte a value. A row of 32 tokens or more also stores its mean token, and its codes
            describe the difference from that token.
    int4    As int8, but half a byte a value: the number of one of 16 levels. Byte j of a block has value j
            in its low half and value j + 32 in its high half.

A row is all codes, then all scales, then the mean token; scales and mean token are float16. So one read gets
a row. The rotation spreads the outlier channels of a transformer over their block.
`python -m tests.benchmarks.codecs` measures what the rotation, the levels and the mean token gain.

Unpacking is sign * (scale / 8) * (H @ codes) + mean; for int4, H @ levels. These are sums of integers below
2^24, so float32 holds them exactly in any order of addition. Therefore `nanomolmo2.unpack` agrees with this
file to the bit on every device. Packing by `model.quantize` agrees too: each sum that decides something has
one fixed order.

This file needs nothing but numpy: `nanomolmo2.codec` loads it by its path for zarr-python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CODECS = ("fp16", "int8", "int4")
"""How rows can be stored."""

BLOCK = 64
"""Values that share one rotation and one scale."""

MEAN_TOKENS = 32
"""Tokens a row of int8 or int4 needs to store its mean token."""
# Much of an image's features is the same in all its tokens; storing that part once lowers the error by a
# third. In rows with fewer tokens the mean token costs more bits than it saves.

INT8_MAX = 127
INT4_LEVELS = (-127, -99, -78, -62, -48, -35, -23, -11, 0, 12, 23, 36, 49, 64, 82, 105)
"""The value of each of the 16 codes, in scales. Part of the format."""
# Lloyd-Max levels of normally distributed values, which rotated values nearly are, for scales chosen with
# INT4_DIVISORS: 9 % less error than even steps.
INT4_DIVISORS = tuple(map(np.float32, (102.5, 107.5, 117.5, 122.5, 127.5, 132.5, 137.5, 142.5)))
"""The scales tried for a block are its largest magnitude divided by these."""
# A divisor above 127 clips the largest magnitude, and gives the other values finer steps. These are the best
# eight; four more gain 0.3 % (2026-11-24).
INT4_CELLS = 255
"""`int4_cells` are numbered from -255 to 255."""

FP16_MAX = np.float32(65504)
"""The largest finite float16."""
ROTATED_BLOCKS = 256
"""Blocks rotated together: 64 KiB."""
SIGN_SEED = 0x6E6D32
"""Seed of the rotation's signs. Part of the format: it never changes."""


def rotation_signs() -> npt.NDArray[np.float32]:
    """Return the fixed +-1 of the rotation, shape (64,)."""
    # Bits of a 64-bit LCG: the generators of libraries may change.
    state, signs = SIGN_SEED, []
    for _ in range(BLOCK):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        signs.append(1.0 if state >> 63 else -1.0)
    return np.array(signs, np.float32)


def hadamard() -> npt.NDArray[np.float32]:
    """Return the unnormalised Sylvester-Hadamard matrix, shape (64, 64), entries +-1, symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]).astype(np.float32)
    return matrix


def int4_cells() -> npt.NDArray[np.uint8]:
    """Return a table of codes, shape (511,): entry ceil(2 x) + 255 is the level nearest to x scales."""
    # Levels are integers, so the boundary between two of them is a multiple of 0.5.
    levels = np.array(INT4_LEVELS)
    twice_between = levels[1:] + levels[:-1]
    cells = np.arange(-INT4_CELLS, INT4_CELLS + 1)
    return np.searchsorted(twice_between, cells).astype(np.uint8)


def row_bytes(codec: str, tokens: int, width: int) -> int:
    """Return the bytes of one packed row.

    Raises:
        ValueError: the codec is unknown, or the width does not divide into blocks.
    """
    values = tokens * width
    if codec == "fp16":
        return 2 * values
    if codec not in CODECS:
        raise ValueError(f"codec {codec!r} is none of {', '.join(CODECS)}")
    if width % BLOCK:
        raise ValueError(
            f"int8 and int4 need a width that is a multiple of {BLOCK}, not {width}; fp16 takes any"
        )
    return row_parts(codec, tokens, width)[-1]


def row_parts(codec: str, tokens: int, width: int) -> tuple[int, int, int]:
    """Return where the codes, the scales and the mean token of an int8 or int4 row end, in bytes."""
    values = tokens * width
    codes = values // 2 if codec == "int4" else values
    scales = codes + 2 * (values // BLOCK)
    return codes, scales, scales + 2 * width * (tokens >= MEAN_TOKENS)


def pack(features: npt.ArrayLike, codec: str) -> npt.NDArray[np.uint8]:
    """Pack features (..., tokens, width) into rows (..., row_bytes) uint8.

    Values beyond the range of float16 are clipped. `model.quantize.pack` gives equal rows on the encoder's
    device; it also counts the clipped values and measures the error.

    Raises:
        ValueError: a feature is NaN or Inf, the codec is unknown, or the width does not divide into blocks.
    """
    x = np.asarray(features, np.float32)
    if not np.isfinite(x).all():
        raise ValueError("NaN or Inf among the features")
    *lead, tokens, width = x.shape
    size = row_bytes(codec, tokens, width)
    x = np.clip(x, -FP16_MAX, FP16_MAX)
    # Every codec starts from float16, so packing a stored fp16 row gives the row that encoding gives.
    halves = x.astype("<f2")
    if codec == "fp16":
        return np.ascontiguousarray(halves).view(np.uint8).reshape(*lead, size)
    x = halves.astype(np.float32)
    _, before_mean, _ = row_parts(codec, tokens, width)
    mean = np.zeros((*lead, 0), "<f2")
    if before_mean < size:
        mean = _mean_token(x).astype("<f2")
        x = x - mean.astype(np.float32)[..., None, :]
    blocks = _rotate(x.reshape(*lead, -1, BLOCK) * rotation_signs())
    codes, scales = (_int4_codes if codec == "int4" else _int8_codes)(blocks)
    tail = np.concatenate([scales, mean], axis=-1).view(np.uint8)
    return np.concatenate([codes.reshape(*lead, -1), tail], axis=-1)


def unpack(
    rows: npt.NDArray[np.uint8], codec: str, tokens: int, width: int
) -> npt.NDArray[np.float16]:
    """Unpack rows (..., row_bytes) uint8 into features (..., tokens, width) float16.

    Raises:
        ValueError: the length of the rows is not `row_bytes(codec, tokens, width)`.
    """
    size = row_bytes(codec, tokens, width)
    if rows.shape[-1] != size:
        raise ValueError(
            f"a row of {rows.shape[-1]} bytes; {codec} {tokens} x {width} takes {size}"
        )
    lead = rows.shape[:-1]
    rows = np.ascontiguousarray(rows)
    if codec == "fp16":
        return rows.view("<f2").astype(np.float16, copy=False).reshape(*lead, tokens, width)
    codes_end, scales_end, _ = row_parts(codec, tokens, width)
    blocks = tokens * width // BLOCK
    stored = rows[..., :codes_end].reshape(*lead, blocks, -1)
    tail = np.ascontiguousarray(rows[..., codes_end:]).view("<f2").astype(np.float32)
    # H = [[h, h], [h, -h]]: the sums and differences of a block's halves are the first stage of H.
    halves = np.empty((*stored.shape[:-1], 2, BLOCK // 2), np.float32)
    if codec == "int4":
        high, low = np.meshgrid(*[np.array(INT4_LEVELS, np.float32)] * 2, indexing="ij")
        halves[..., 0, :] = (low + high).ravel()[stored]
        halves[..., 1, :] = (low - high).ravel()[stored]
    else:
        codes = stored.view(np.int8).astype(np.float32)
        left, right = codes[..., : BLOCK // 2], codes[..., BLOCK // 2 :]
        np.add(left, right, out=halves[..., 0, :])
        np.subtract(left, right, out=halves[..., 1, :])
    # Exact: integers, at most 64 * 127.
    x = (halves @ hadamard()[: BLOCK // 2, : BLOCK // 2]).reshape(*lead, blocks, BLOCK)
    x *= (tail[..., :blocks] * np.float32(0.125))[..., None]
    x *= rotation_signs()
    x = x.reshape(*lead, tokens, width)
    if scales_end < size:
        x += tail[..., None, blocks:]
    # Rounding can move a value at the edge of float16's range beyond it.
    return np.clip(x, -FP16_MAX, FP16_MAX, out=x).astype(np.float16)


def _int8_codes(blocks: Any) -> tuple[Any, Any]:
    """Return codes (..., 64) uint8 and scales (...,) float16 of rotated blocks (..., 64)."""
    scales = (np.abs(blocks).max(axis=-1) / np.float32(INT8_MAX)).astype("<f2")
    codes = np.clip(np.rint(_in_scales(blocks, scales)), -INT8_MAX, INT8_MAX)
    return codes.astype(np.int8).view(np.uint8), scales


def _int4_codes(blocks: Any) -> tuple[Any, Any]:
    """Return bytes (..., 32) and scales (...,) float16 of rotated blocks (..., 64).

    Of the scales tried, a block gets the first with the smallest squared error.
    """
    # The levels reach further below 0 than above it. The sign of a scale therefore maps the largest magnitude
    # to the lowest level.
    high, low = blocks.max(axis=-1), blocks.min(axis=-1)
    largest = np.maximum(np.abs(high), np.abs(low))
    side = np.where(high > -low, np.float32(-1), np.float32(1))
    codes_of = int4_cells()
    levels_of = np.array(INT4_LEVELS, np.float32)[codes_of]
    least = np.full(largest.shape, np.inf, np.float32)
    best = np.zeros(largest.shape, "<f2")
    for divisor in INT4_DIVISORS:
        scales = (largest / divisor * side).astype("<f2")
        off = levels_of[_cell(blocks, scales)] * scales.astype(np.float32)[..., None] - blocks
        lost = _sum(off * off)
        better = lost < least
        least = np.where(better, lost, least)
        best = np.where(better, scales, best)
    codes = codes_of[_cell(blocks, best)]
    return codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4, best


def _cell(blocks: Any, scales: Any) -> Any:
    """Return the index into `int4_cells` of each value."""
    cells = np.ceil(_in_scales(blocks, scales) * np.float32(2))
    return np.clip(cells, -INT4_CELLS, INT4_CELLS).astype(np.intp) + INT4_CELLS


def _in_scales(blocks: Any, scales: Any) -> Any:
    """Return the values divided by the scale of their block, 0 where the scale is 0."""
    steps = scales.astype(np.float32)[..., None]
    return np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps != 0)


def _mean_token(x: Any) -> Any:
    """Return the mean (..., width) of tokens (..., tokens, width)."""
    # A fixed order that every library can follow: halves are added to halves, an odd last token to the first.
    tokens = np.float32(x.shape[-2])
    while (half := x.shape[-2] // 2) > 0:
        last = x[..., 2 * half :, :]
        x = x[..., :half, :] + x[..., half : 2 * half, :]
        x[..., : last.shape[-2], :] += last
    return x[..., 0, :] / tokens


def _sum(values: Any) -> Any:
    """Return the sum over the last axis (64), adding halves to halves: one order for all libraries."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _rotate(blocks: Any) -> Any:
    """Return the orthonormal Hadamard transform of the last axis (64), in six butterfly stages."""
    # Transposed, a few hundred blocks at a time: each stage then adds long contiguous runs that fit in the
    # processor's cache, which is three times faster than adding within a block.
    flat = blocks.reshape(-1, BLOCK)
    rotated = np.empty_like(flat)
    for start in range(0, len(flat), ROTATED_BLOCKS):
        x = np.ascontiguousarray(flat[start : start + ROTATED_BLOCKS].T)
        y = np.empty_like(x)
        half = 1
        while half < BLOCK:
            pairs = (BLOCK // (2 * half), 2, half, x.shape[1])
            before, after = x.reshape(pairs), y.reshape(pairs)
            np.add(before[:, 0], before[:, 1], out=after[:, 0])
            np.subtract(before[:, 0], before[:, 1], out=after[:, 1])
            x, y = y, x
            half *= 2
        np.multiply(x.T, np.float32(0.125), out=rotated[start : start + ROTATED_BLOCKS])
    return rotated.reshape(blocks.shape)
