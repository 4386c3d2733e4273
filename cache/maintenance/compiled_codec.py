"""Pack rows in compiled loops: bytes and errors of `cache.format.codec.quantise`, two to three times as fast.

    rows, errors = quantise(halves, "int8")     # (R, tokens, width) float16 -> (R, row_bytes) uint8, (R,)
    pooled, errors = pool(halves, 2)            # -> (R, tokens / 4, width) float16, (R,)

numba compiles the loops at the first call, which takes seconds, and keeps the result for later processes
beside Python's own compiled files, and trusted like them. So this is for many rows: see `WORTH_VALUES` in
convert_rows.py. Nothing is reordered, no product is fused with a sum: every operation is that of
`cache.format.codec`, whose comments say why. The loops differ in what they hold: the blocks of `LANES` tokens
at a time, in columns, all of them in the processor's first cache.

Arrays are flat: value c of the block of token i is at c * LANES + i. So the compiler knows all distances, and
computes with 4, 8 or 16 neighbouring tokens in one instruction. A loop over blocks is a function of its own,
in which the compiler knows that the arrays are not one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from cache.format.codec import (
    BLOCK,
    HALF_BITS,
    HALF_UNIT,
    INT4_DIVISORS,
    INT4_LEVELS,
    INT8_MAX,
    rotation_signs,
    row_parts,
)

LANES = 32
"""Tokens whose blocks are packed together."""

CHANNELS = 256
"""Channels whose tokens are added up together: half of 576 of them fit into the processor's second cache."""

EIGHTHS = rotation_signs() * np.float32(0.125)
"""The signs of the rotation, and what makes it orthonormal."""
DIVISORS = np.array(INT4_DIVISORS)
LEVELS = tuple(map(np.float32, INT4_LEVELS))
CODES = tuple(map(np.int32, range(len(LEVELS))))
BETWEEN = tuple(map(np.float32, np.add(INT4_LEVELS[1:], INT4_LEVELS[:-1])))
"""Twice the value between two levels: where the nearest one changes."""
INF = np.float32(np.inf)
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
LARGEST = np.float32(INT8_MAX)
WHOLE = np.float32(1.5 * 2**23)
"""Added to a magnitude below 2^22 and subtracted again, it leaves the nearest integer; ties go to even."""
SUBNORMALS = np.float32(2**24)
"""The multiples of 2^-24 are the float16 values below 2^-14."""
SMALLEST_NORMAL_BITS = 0x38800000
"""The bits of 2^-14 in float32."""
REBIAS = 112 << 10
"""Difference of the exponents of float32 and float16, where float16 has its exponent."""

Function = Callable[..., Any]

OPTIONS: dict[str, Any] = {"error_model": "numpy", "nogil": True}
"""Of numba: a division by zero is no error, and threads may run beside."""


def kernel(function: Function) -> Function:
    """Let numba compile a function when it is first called, and keep the result for later processes.

    The result contains the functions that it calls. They are not kept themselves: when they were, one of two
    processes that compiled at a time packed other bytes (numba 0.68, docs/BENCHMARKS.md, 2026-11-27).
    """
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no folder that it may write to
        return part(function)


def part(function: Function) -> Function:
    """Let numba compile a function into the kernels that call it."""
    return numba.njit(**OPTIONS)(function)


def quantise(
    x: npt.NDArray[Any], codec: str
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Pack values into int8 or int4 rows, and measure the error.

    Args:
        x: (rows, tokens, width), finite, contiguous: float16, or float32 that float16 holds.
        codec: int8 or int4.

    Returns:
        Rows (rows, row_bytes) uint8, and their errors |unpacked - x| / |x| (rows,) float32, as
        `cache.format.codec.quantise` returns them.
    """
    rows, tokens, width = x.shape
    codes_end, scales_end, size = row_parts(codec, tokens, width)
    with_mean, count, groups = scales_end < size, rows * tokens, width // BLOCK
    codes = np.empty((count, codes_end // tokens), np.uint8)
    scales = np.empty((count, groups), np.uint16)
    means = np.zeros((rows, width), np.uint16)
    totals = np.zeros((rows, width), np.float32)
    lost, energy = np.empty((2, count, groups), np.float32)
    # Without a mean token, rows do not matter, and all of them are one.
    in_row = tokens if with_mean else count
    pack = _pack_int4 if codec == "int4" else _pack_int8
    bits = x.astype(np.float16, copy=False).view(np.int16).reshape(count, width)
    pack(bits, in_row, with_mean, codes, scales, means, totals, lost, energy)
    parts = codes, scales, means[:, : size - scales_end]
    packed = np.concatenate([part.reshape(rows, -1).view(np.uint8) for part in parts], axis=1)
    exact = means.view(np.float16).astype(np.float64)
    of_means = (exact * (2 * totals.astype(np.float64) - tokens * exact)).sum(1)
    lost_of, energy_of = (a.reshape(rows, -1).sum(1, dtype=np.float64) for a in (lost, energy))
    energy_of += of_means
    relative = np.sqrt(np.divide(lost_of, energy_of, out=np.zeros(rows), where=energy_of > 0))
    return packed, relative.astype(np.float32)


def pool(
    halves: npt.NDArray[np.float16], window: int
) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Average windows of patches as `cache.maintenance.convert_rows.pool` does, and round to float16.

    Args:
        halves: (rows, patches, width) float16, finite, contiguous: a square grid in row-major order.
        window: the side of a window, in patches; it divides the grid's side.

    Returns:
        (rows, patches / window^2, width) float16, and what rounding is off |rounded - pooled| / |pooled|
        (rows,) float32, 0 for a row of zeros.
    """
    rows, patches, width = halves.shape
    pooled = np.empty((rows, patches // window**2, width), np.uint16)
    lost, energy = np.zeros((2, rows, width), np.float32)
    _pool(halves.view(np.int16), math.isqrt(patches), window, pooled, lost, energy)
    off, norm = (squares.sum(1, dtype=np.float64) for squares in (lost, energy))
    relative = np.sqrt(np.divide(off, norm, out=np.zeros(rows), where=norm > 0))
    return pooled.view(np.float16), relative.astype(np.float32)


@kernel
def _pool(bits: Any, grid: int, window: int, pooled: Any, lost: Any, energy: Any) -> None:
    """Pool rows (R, grid^2, V) into `pooled`, bits of float16.

    Adds to `lost` and `energy` (R, V) the squares of what rounding is off, and of the values before it.
    """
    width, side = bits.shape[2], grid // window
    exact, part = np.empty(width, np.float32), np.empty(width, np.float32)
    share = np.float32(1 / window**2)
    for row in range(len(bits)):
        for place in range(side * side):
            first = (place // side * grid + place % side) * window
            _widen(bits[row], first, 0, part)
            for patch in range(1, window * window):
                _widen(bits[row], first + patch // window * grid + patch % window, 0, exact)
                for c in range(width):
                    part[c] += exact[c]
            for c in range(width):
                part[c] = part[c] * HALF_UNIT * share + ZERO  # not -0.0
                exact[c] = part[c]
            _to_halves(part, pooled[row, place])
            for c in range(width):
                off = part[c] - exact[c]
                lost[row, c] += off * off
                energy[row, c] += exact[c] * exact[c]


@kernel
def _pack_int8(
    bits: Any,
    in_row: int,
    with_mean: bool,
    codes: Any,
    scales: Any,
    means: Any,
    totals: Any,
    lost: Any,
    energy: Any,
) -> None:
    """Pack N tokens of G blocks into int8.

    Args:
        bits: (N, 64 G) int16, those of float16 values.
        in_row: tokens of a row.
        with_mean: whether its mean token is subtracted.
        codes, scales, means: the parts of the rows, (N, 64 G) uint8, (N, G) and (rows, 64 G) uint16.
        totals: (rows, 64 G) float32, the sum of the tokens.
        lost, energy: (N, G) float32, the squared error of each block and its sum of squares.
    """
    mean, sums, tokens, x, y = _scratch(in_row, with_mean, bits.shape[1])
    steps, divisors, squares, _, _, _ = _lanes()
    halves = np.empty(LANES, np.uint16)
    for start in range(0, len(bits), in_row):
        row, end = start // in_row, start + in_row
        if with_mean:
            _mean_token(bits, start, end, sums, mean, means[row], totals[row])
        for first in range(start, end, LANES):
            count = min(LANES, end - first)
            _load(bits, first, count, tokens)
            for group in range(bits.shape[1] // BLOCK):
                _rotated(tokens, group * BLOCK, mean, y, x)
                _sum_squares(x, y, squares)
                energy[first : first + count, group] = squares[:count]
                _largest(x, steps)
                for i in range(LANES):
                    steps[i] /= LARGEST
                _to_halves(steps, halves)
                scales[first : first + count, group] = halves[:count]
                _divide_by(steps, ONE, divisors)
                _round(x, steps, divisors, y)
                for i in range(count):
                    for c in range(BLOCK):
                        codes[first + i, group * BLOCK + c] = np.int8(y[c * LANES + i])
                _sum_squares(x, y, squares)
                lost[first : first + count, group] = squares[:count]


@kernel
def _pack_int4(
    bits: Any,
    in_row: int,
    with_mean: bool,
    codes: Any,
    scales: Any,
    means: Any,
    totals: Any,
    lost: Any,
    energy: Any,
) -> None:
    """Pack N tokens of G blocks into int4: codes (N, 32 G); the others are those of `_pack_int8`."""
    mean, sums, tokens, x, y = _scratch(in_row, with_mean, bits.shape[1])
    work = np.empty(LANES * BLOCK // 8, np.float32)
    chosen = np.empty(LANES * BLOCK, np.int32)
    steps, divisors, squares, extreme, best, least = _lanes()
    halves, best_halves = np.empty(LANES, np.uint16), np.empty(LANES, np.uint16)
    for start in range(0, len(bits), in_row):
        row, end = start // in_row, start + in_row
        if with_mean:
            _mean_token(bits, start, end, sums, mean, means[row], totals[row])
        for first in range(start, end, LANES):
            count = min(LANES, end - first)
            _load(bits, first, count, tokens)
            for group in range(bits.shape[1] // BLOCK):
                _rotated(tokens, group * BLOCK, mean, y, x)
                _sum_squares(x, work, squares)
                energy[first : first + count, group] = squares[:count]
                _extreme(x, steps, extreme)
                least[:] = INF
                for divisor in DIVISORS:
                    for i in range(LANES):
                        steps[i] = extreme[i] / divisor
                    _to_halves(steps, halves)
                    _divide_by(steps, HALF, divisors)
                    _off_levels(x, steps, divisors, y)
                    _sum_squares(y, work, squares)
                    for i in range(LANES):
                        if squares[i] < least[i]:
                            least[i], best[i] = squares[i], steps[i]
                            best_halves[i] = halves[i]
                scales[first : first + count, group] = best_halves[:count]
                lost[first : first + count, group] = least[:count]
                _divide_by(best, HALF, divisors)
                _choose(x, divisors, chosen)
                for i in range(count):
                    for c in range(BLOCK // 2):
                        high = chosen[(c + BLOCK // 2) * LANES + i] << 4
                        codes[first + i, group * BLOCK // 2 + c] = chosen[c * LANES + i] | high


@part
def _scratch(in_row: int, with_mean: bool, width: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return what a kernel fills: mean token, sums of tokens, tokens of a tile, and twice its blocks."""
    mean = np.zeros(width, np.float32)
    sums = np.empty(in_row // 2 * CHANNELS if with_mean else 0, np.float32)
    tokens = np.empty(LANES * width, np.float32)
    return (
        mean,
        sums,
        tokens,
        np.empty(LANES * BLOCK, np.float32),
        np.empty_like(tokens[: LANES * BLOCK]),
    )


@part
def _lanes() -> tuple[Any, Any, Any, Any, Any, Any]:
    """Return six arrays of a value for each lane."""
    a, b, c = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    d, e, f = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    return a, b, c, d, e, f


@part
def _widen(bits: Any, token: int, channel: int, out: Any) -> None:
    """Fill `out` with values of a token from `channel` on, divided by HALF_UNIT."""
    moved = out.view(np.int32)
    for c in range(len(moved)):
        moved[c] = (np.int32(bits[token, channel + c]) << 13) & HALF_BITS


@part
def _mean_token(
    bits: Any, start: int, end: int, sums: Any, mean: Any, halves: Any, total: Any
) -> None:
    """Compute the mean token of a row: rounded to float16 in `mean` and `halves`, its sum in `total`.

    Overwrites `sums`, of half as many tokens with CHANNELS values each.
    """
    line = np.empty(CHANNELS, np.float32)
    for channel in range(0, bits.shape[1], CHANNELS):
        count = min(CHANNELS, bits.shape[1] - channel)
        part = line[:count]
        half = (end - start) // 2
        for i in range(half):
            one = sums[i * count : (i + 1) * count]
            _widen(bits, start + i, channel, one)
            _widen(bits, start + half + i, channel, part)
            for c in range(count):
                one[c] += part[c]
        if (end - start) % 2:
            _widen(bits, end - 1, channel, part)
            for c in range(count):
                sums[c] += part[c]
        while half > 1:
            is_odd, half = half % 2, half // 2
            for c in range(half * count):
                sums[c] += sums[half * count + c]
            if is_odd:
                for c in range(count):
                    sums[c] += sums[2 * half * count + c]
        for c in range(count):
            total[channel + c] = sums[c] * HALF_UNIT
            mean[channel + c] = total[channel + c] / np.float32(end - start)
    _to_halves(mean, halves)


@part
def _to_halves(values: Any, halves: Any) -> None:
    """Round values in place as float16 does; write the bits of it to `halves`."""
    bits = values.view(np.int32)
    for i in range(len(values)):
        magnitude = bits[i] & 0x7FFFFFFF
        few = np.int32((abs(values[i]) * SUBNORMALS + WHOLE) - WHOLE)
        many = ((magnitude + 0xFFF + (magnitude >> 13 & 1)) >> 13) - REBIAS
        half = few if magnitude < SMALLEST_NORMAL_BITS else many
        halves[i] = half | (bits[i] >> 16 & 0x8000)
    for i in range(len(values)):
        half = np.int32(halves[i]) & 0x7FFF
        below_normal = np.float32(half) / SUBNORMALS
        bits[i] = half + REBIAS << 13
        size = below_normal if half < 0x400 else values[i]
        values[i] = -size if halves[i] > 0x7FFF else size


@part
def _load(bits: Any, first: int, count: int, out: Any) -> None:
    """Fill `out` (LANES * width) with `count` tokens, divided by HALF_UNIT, and zeros for the other lanes."""
    width = bits.shape[1]
    for i in range(count):
        _widen(bits, first + i, 0, out[i * width : (i + 1) * width])
    out[count * width :] = 0


@part
def _rotated(tokens: Any, channel: int, mean: Any, together: Any, x: Any) -> None:
    """Write the rotated blocks of LANES tokens to `x`, less the mean token's. Overwrites `together`."""
    width = len(mean)
    # A processor's cache holds few addresses 4 KB apart.
    for i in range(LANES):
        for c in range(BLOCK):
            together[i * BLOCK + c] = tokens[i * width + channel + c]
    for c in range(BLOCK):
        eighth = EIGHTHS[c] * HALF_UNIT
        off = mean[channel + c] * EIGHTHS[c]
        for i in range(LANES):
            x[c * LANES + i] = together[i * BLOCK + c] * eighth - off
    _stages(x, 1)
    _stages(x, 8)


@part
def _divide_by(steps: Any, factor: Any, out: Any) -> None:
    """Write what values are divided by to `out`: steps times `factor`, or where that is 0, infinity."""
    for i in range(LANES):
        out[i] = INF if steps[i] == 0 else steps[i] * factor


@part
def _stages(x: Any, step: int) -> None:
    """Compute three stages of the Hadamard transform: of values 1, 2 and 4 times `step` apart."""
    apart = step * LANES
    for one in range(BLOCK // 8):
        at = (one % step + one // step * 8 * step) * LANES
        for i in range(at, at + LANES):
            a, b = x[i], x[i + apart]
            c, d = x[i + 2 * apart], x[i + 3 * apart]
            e, f = x[i + 4 * apart], x[i + 5 * apart]
            g, h = x[i + 6 * apart], x[i + 7 * apart]
            a, b, c, d = a + b, a - b, c + d, c - d
            e, f, g, h = e + f, e - f, g + h, g - h
            a, b, c, d = a + c, b + d, a - c, b - d
            e, f, g, h = e + g, f + h, e - g, f - h
            x[i], x[i + apart] = a + e, b + f
            x[i + 2 * apart], x[i + 3 * apart] = c + g, d + h
            x[i + 4 * apart], x[i + 5 * apart] = a - e, b - f
            x[i + 6 * apart], x[i + 7 * apart] = c - g, d - h


@part
def _sum_squares(x: Any, work: Any, out: Any) -> None:
    """Write the sum of squares of each block to `out` (LANES), halves added to halves. Overwrites `work`."""
    eighth = BLOCK // 8 * LANES
    for i in range(eighth):
        a = x[i] * x[i] + x[i + 4 * eighth] * x[i + 4 * eighth]
        b = x[i + 2 * eighth] * x[i + 2 * eighth] + x[i + 6 * eighth] * x[i + 6 * eighth]
        c = x[i + eighth] * x[i + eighth] + x[i + 5 * eighth] * x[i + 5 * eighth]
        d = x[i + 3 * eighth] * x[i + 3 * eighth] + x[i + 7 * eighth] * x[i + 7 * eighth]
        work[i] = (a + b) + (c + d)
    for i in range(LANES):
        a = (work[i] + work[i + 4 * LANES]) + (work[i + 2 * LANES] + work[i + 6 * LANES])
        b = (work[i + LANES] + work[i + 5 * LANES]) + (work[i + 3 * LANES] + work[i + 7 * LANES])
        out[i] = a + b


@part
def _largest(x: Any, out: Any) -> None:
    """Write the largest magnitude of each block to `out` (LANES)."""
    out[:] = 0
    for c in range(BLOCK):
        for i in range(LANES):
            out[i] = max(out[i], abs(x[c * LANES + i]))


@part
def _extreme(x: Any, high: Any, out: Any) -> None:
    """Write the value of largest magnitude of each block, its sign turned, to `out`. Overwrites `high`."""
    low = out
    high[:], low[:] = -INF, INF
    for c in range(BLOCK):
        for i in range(LANES):
            high[i] = max(high[i], x[c * LANES + i])
            low[i] = min(low[i], x[c * LANES + i])
    for i in range(LANES):
        magnitude = max(abs(high[i]), abs(low[i]))
        out[i] = -magnitude if high[i] > -low[i] else magnitude


@part
def _round(x: Any, steps: Any, divisors: Any, y: Any) -> None:
    """Write the codes of values to `y`, and what they are off to `x`."""
    for c in range(BLOCK):
        for i in range(LANES):
            code = (x[c * LANES + i] / divisors[i] + WHOLE) - WHOLE
            code = min(max(code, -LARGEST), LARGEST)
            y[c * LANES + i] = code
            x[c * LANES + i] = code * steps[i] - x[c * LANES + i]


@part
def _nearest(twice: float, r: Any) -> Any:
    """Return the one of 16 results that stands for the level nearest to a value, by twice the value."""
    # Four comparisons. All results are computed and one is taken, since several values are looked up at once.
    b = BETWEEN
    upper = twice > b[7]
    second = twice > (b[11] if upper else b[3])
    third = twice > ((b[13] if upper else b[5]) if second else (b[9] if upper else b[1]))
    in_high = (b[14] if third else b[12]) if second else (b[10] if third else b[8])
    in_low = (b[6] if third else b[4]) if second else (b[2] if third else b[0])
    last = twice > (in_high if upper else in_low)
    a = (r[15] if last else r[14]) if third else (r[13] if last else r[12])
    c = (r[11] if last else r[10]) if third else (r[9] if last else r[8])
    d = (r[7] if last else r[6]) if third else (r[5] if last else r[4])
    e = (r[3] if last else r[2]) if third else (r[1] if last else r[0])
    return (a if second else c) if upper else (d if second else e)


@part
def _off_levels(x: Any, steps: Any, divisors: Any, out: Any) -> None:
    """Write what values are off when they become the nearest level, in steps, to `out`."""
    for c in range(BLOCK):
        for i in range(LANES):
            level = _nearest(x[c * LANES + i] / divisors[i], LEVELS)
            out[c * LANES + i] = level * steps[i] - x[c * LANES + i]


@part
def _choose(x: Any, divisors: Any, out: Any) -> None:
    """Write the codes of the levels nearest to values to `out`."""
    for c in range(BLOCK):
        for i in range(LANES):
            out[c * LANES + i] = _nearest(x[c * LANES + i] / divisors[i], CODES)
