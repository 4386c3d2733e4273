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

import itertools
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
SMALLEST_NORMAL = np.float32(2**-14)
"""Smaller magnitudes have fewer bits in float16."""
HALF_BITS = np.int32(0x8FFFE000 - 2**32)
"""The bits of a float32 that those of a float16 are moved to."""
HALF_UNIT = np.float32(2**112)
"""What `widen` leaves to multiply by."""
PART_VALUES = 80_000
"""Values that are packed together, about: the passes over them find them in the processor's cache."""
# Of 576 tokens two groups of channels. Half of that takes a quarter longer, because the runs are short.
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
    row_bytes(codec, tokens, width)  # raises for what the codec cannot pack
    # Every codec starts from float16, so packing a stored fp16 row gives the row that encoding gives.
    halves = np.clip(x, -FP16_MAX, FP16_MAX).astype("<f2")
    if codec == "fp16":
        return np.ascontiguousarray(halves).view(np.uint8).reshape(*lead, -1)
    return quantise(halves.reshape(-1, tokens, width), codec)[0].reshape(*lead, -1)


def quantise(
    x: npt.NDArray[np.float16] | npt.NDArray[np.float32], codec: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pack values that float16 holds into int8 or int4 rows, and measure the error.

    Args:
        x: (rows, tokens, width) little-endian float16, or float32 after `round_to_halves`; finite.
        codec: int8 or int4.

    Returns:
        Rows (rows, row_bytes) uint8, and their errors |unpacked - x| / |x| (rows,) float32, 0 for a row of
        zeros. They are errors of the codec alone, before `unpack` rounds to float16.
    """
    rows, tokens, width = x.shape
    codes_end, scales_end, size = row_parts(codec, tokens, width)
    groups = width // BLOCK
    packed = np.empty((rows, size), np.uint8)
    words = codes_end // (4 * tokens * groups)
    codes = packed[:, :codes_end].view("<u4").reshape(rows, tokens, groups, words)
    scales = packed[:, codes_end:scales_end].view("<f2").reshape(rows, tokens, groups)
    means = packed[:, scales_end:].view("<f2")
    lost, energy = np.zeros(rows), np.zeros(rows)
    # All tokens of a few groups of 64 channels at a time, so that the passes below find them in the
    # processor's cache. Transposed, (64, blocks), each pass is over long contiguous runs.
    fitting = max(1, PART_VALUES // (tokens * BLOCK))
    step, group_step = max(1, fitting // groups), min(fitting, groups)
    scratch = _Scratch(min(step, rows) * group_step * tokens)
    for start, group in itertools.product(range(0, rows, step), range(0, groups, group_step)):
        part = slice(start, start + step), slice(None), slice(group, group + group_step)
        values = x.reshape(rows, tokens, groups, BLOCK)[part]
        blocks, mean, of_mean = _rotated(values, scratch, scales_end < size)
        if mean is not None:
            means.reshape(rows, groups, BLOCK)[part[0], part[2]] = mean.transpose(1, 2, 0)
        of_blocks = _squares(blocks, scratch)
        quantised, chosen, off = (_int4_codes if codec == "int4" else _int8_codes)(blocks, scratch)
        shape = len(values), values.shape[2], tokens
        codes[part] = quantised.reshape(-1, *shape).transpose(1, 3, 2, 0)
        scales[part] = chosen.reshape(shape).transpose(0, 2, 1)
        # The rotation keeps lengths, so the sum of squares is the same before and after it.
        lost[part[0]] += off.reshape(shape).sum((1, 2), dtype=np.float64)
        energy[part[0]] += of_blocks.reshape(shape).sum((1, 2), dtype=np.float64) + of_mean
    relative = np.sqrt(np.divide(lost, energy, out=np.zeros(rows), where=energy > 0))
    return packed, relative.astype(np.float32)


def round_to_halves(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round values below 65504 in magnitude as float16 does, but return float32.

    It takes a fifth of the time of `x.astype(float16).astype(float32)`, and gives the same.
    """
    bits = x.view(np.int32)
    rounded = bits >> 13
    rounded &= 1  # a tie goes to the even neighbour
    rounded += 0xFFF
    rounded += bits
    rounded &= ~0x1FFF
    halves = rounded.view(np.float32)
    few = np.flatnonzero(np.abs(x) < SMALLEST_NORMAL)  # these have fewer bits
    halves.ravel()[few] = x.ravel()[few].astype(np.float16)
    return halves


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


def widen(halves: npt.NDArray[np.float16], out: npt.NDArray[np.float32]) -> None:
    """Write float16 values, divided by HALF_UNIT, to `out` of the same shape. They are finite.

    Adding and subtracting them rounds as it does at their true size.
    """
    # The bits of a float16, moved, are those of a float32 whose exponent is 112 too small. These three passes
    # take a quarter of the time of numpy's conversion.
    bits = out.view(np.int32)
    np.copyto(bits, halves.view("<i2"))
    bits <<= 13
    bits &= HALF_BITS


class _Scratch:
    """Arrays that the passes over one part after another write to. Only one thread may use them."""

    def __init__(self, blocks: int):
        values = blocks * BLOCK
        self.one, self.two = np.empty(values, np.float32), np.empty(values, np.float32)
        self.three = np.empty(values, np.float32)
        self.index = np.empty(values, np.intp)
        self.bytes = np.empty(values, np.uint8)


def _like(array: Any, blocks: Any) -> Any:
    """Return the beginning of a flat scratch array in the shape of `blocks`."""
    return array[: blocks.size].reshape(blocks.shape)


def _rotated(values: Any, scratch: _Scratch, with_mean: bool) -> tuple[Any, Any, Any]:
    """Return the rotated blocks of one part, which `scratch` holds, and its mean token.

    Args:
        values: (rows, tokens, groups, 64) float16 or float32, in any memory layout.
        scratch: of at least as many values.
        with_mean: whether the mean token is subtracted.

    Returns:
        Blocks (64, N); the mean token (64, rows, groups) float16, or None; and what it adds to the sum of
        squares of the blocks of each row, (rows,).
    """
    # Tokens are often 2 KB apart, and a processor's cache holds few addresses of such a distance: first they
    # are moved together.
    together = _like(scratch.two, values)
    unit = np.float32(1)
    if values.dtype.itemsize == 2:
        widen(values, together)
        unit = HALF_UNIT
    else:
        np.copyto(together, values)
    mean, of_mean = None, np.float64(0)
    # An eighth makes the rotation orthonormal.
    signs = rotation_signs().reshape(-1, 1, 1) * np.float32(0.125)
    transposed = together.transpose(3, 0, 2, 1)
    x = scratch.one[: values.size].reshape(transposed.shape)
    # A product with a power of two: nothing is rounded.
    np.multiply(transposed, (signs * unit)[..., None], out=x)
    if with_mean:
        total = _token_sum(together).transpose(2, 0, 1) * unit
        mean = (total / np.float32(values.shape[1])).astype("<f2")
        exact = mean.astype(np.float64)
        of_mean = (exact * (2 * total.astype(np.float64) - values.shape[1] * exact)).sum((0, 2))
        x -= (mean.astype(np.float32) * signs)[..., None]
    return _rotate(x, scratch.two[: x.size]), mean, of_mean


def _int8_codes(blocks: Any, scratch: _Scratch) -> tuple[Any, Any, Any]:
    """Quantise rotated blocks (64, N).

    Returns:
        Codes (64, N) uint8, scales (N,) float16, and the sum of squared errors (N,) float32.
    """
    work, codes = _like(scratch.three, blocks), _like(scratch.bytes, blocks)
    high, minus_low = _range(blocks, scratch)
    largest = np.maximum(np.abs(high), np.abs(minus_low))
    scales = (largest / np.float32(INT8_MAX)).astype("<f2")
    steps = scales.astype(np.float32)
    np.rint(_in_scales(blocks, steps, work), out=work)
    # A scale is rounded to float16. Only one of a few bits is so much too small that a code does not fit.
    if (largest > np.float32(INT8_MAX + 0.4) * steps).any():
        np.clip(work, -INT8_MAX, INT8_MAX, out=work)
    np.copyto(codes.view(np.int8), work, casting="unsafe")
    return _words(codes), scales, _lost(work, steps, blocks, scratch)


def _int4_codes(blocks: Any, scratch: _Scratch) -> tuple[Any, Any, Any]:
    """Quantise rotated blocks (64, N): two codes a byte (32, N); see `_int8_codes`.

    Of the scales tried, a block gets the first with the smallest squared error.
    """
    work, codes = _like(scratch.three, blocks), _like(scratch.bytes, blocks)
    # The levels reach further below 0 than above it. The sign of a scale therefore maps the largest magnitude
    # to the lowest level.
    high, minus_low = _range(blocks, scratch)
    largest = np.maximum(np.abs(high), np.abs(minus_low))
    side = np.where(high > minus_low, np.float32(-1), np.float32(1))
    codes_of = int4_cells()
    levels_of = np.array(INT4_LEVELS, np.float32)[codes_of]
    least = np.full(largest.shape, np.inf, np.float32)
    best = np.zeros(largest.shape, "<f2")
    for divisor in INT4_DIVISORS:
        scales = (largest / divisor * side).astype("<f2")
        steps = scales.astype(np.float32)
        levels_of.take(_cell(blocks, steps, scratch), out=work, mode="clip")
        lost = _lost(work, steps, blocks, scratch)
        better = lost < least
        least = np.where(better, lost, least)
        best = np.where(better, scales, best)
    codes_of.take(_cell(blocks, best.astype(np.float32), scratch), out=codes, mode="clip")
    low_half, high_half = codes[: BLOCK // 2], codes[BLOCK // 2 :]
    high_half <<= 4
    low_half |= high_half
    return _words(low_half), best, least


def _cell(blocks: Any, steps: Any, scratch: _Scratch) -> Any:
    """Return the index into `int4_cells` of each value, for `take` with mode="clip"."""
    cells = _in_scales(blocks, steps * np.float32(0.5), _like(scratch.three, blocks))
    np.ceil(cells, out=cells)
    cells += np.float32(INT4_CELLS)
    whole, index = _like(scratch.two, blocks).view(np.int32), _like(scratch.index, blocks)
    np.copyto(whole, cells, casting="unsafe")  # in two steps, twice as fast
    np.copyto(index, whole)
    return index


def _in_scales(blocks: Any, steps: Any, out: Any) -> Any:
    """Write the values (64, N) divided by the scale of their block to `out`, 0 where the scale is 0."""
    return np.divide(blocks, np.where(steps == 0, np.float32(np.inf), steps), out=out)


def _lost(levels: Any, steps: Any, blocks: Any, scratch: _Scratch) -> Any:
    """Return the sum of squares (N,) of what quantised values are off. Overwrites `levels`."""
    levels *= steps
    levels -= blocks
    return _squares(levels, scratch)


def _squares(values: Any, scratch: _Scratch) -> Any:
    """Return the sum of squares (N,) of values (64, N)."""
    squares = _like(scratch.two, values)
    return _fold(np.add, np.multiply(values, values, out=squares)).copy()


def _range(blocks: Any, scratch: _Scratch) -> tuple[Any, Any]:
    """Return the largest value (N,) of each block, and minus its smallest."""
    half, work = BLOCK // 2, _like(scratch.two, blocks)
    high = _fold(np.maximum, np.maximum(blocks[:half], blocks[half:], out=work[:half])).copy()
    low = _fold(np.minimum, np.minimum(blocks[:half], blocks[half:], out=work[:half]))
    return high, -low


def _fold(add: Any, values: Any) -> Any:
    """Combine the rows of `values`, halves with halves: one order for all libraries. Overwrites them."""
    while (half := len(values) // 2) > 0:
        values = add(values[:half], values[half:], out=values[:half])
    return values[0]


def _token_sum(x: Any) -> Any:
    """Return the sum over axis 1, the tokens. Overwrites `x`."""
    # A fixed order that every library can follow: halves are added to halves, an odd last token to the first.
    while (half := x.shape[1] // 2) > 0:
        first, last = x[:, :half], x[:, 2 * half :]
        first += x[:, half : 2 * half]
        first[:, : last.shape[1]] += last
        x = first
    return x[:, 0]


def _words(codes: Any) -> Any:
    """Return bytes (4 n, N) as (n, N) uint32: four rows in each, which takes less time to transpose."""
    words = codes[3::4].astype("<u4")
    for row in (2, 1, 0):
        words <<= 8
        words |= codes[row::4]
    return words


def _rotate(x: Any, y: Any) -> Any:
    """Return the Hadamard transform of the first axis (64, N), in six butterfly stages: 8 times its length.

    Overwrites `x` and `y`, of equal size.
    """
    x, y = x.reshape(BLOCK, -1), y.reshape(BLOCK, -1)
    half = 1
    while half < BLOCK:
        pairs = (BLOCK // (2 * half), 2, half, x.shape[1])
        before, after = x.reshape(pairs), y.reshape(pairs)
        np.add(before[:, 0], before[:, 1], out=after[:, 0])
        np.subtract(before[:, 0], before[:, 1], out=after[:, 1])
        x, y = y, x
        half *= 2
    return x
