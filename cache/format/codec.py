"""Row layouts in numpy: how `tokens x width` features become the bytes of one row, and back.

    fp16    the values as little-endian float16.
    int8m   a random-sign Hadamard rotation over blocks of 64 values, one fp16 scale a block,
            one signed byte a value. Rows of 32 tokens and more hold their mean token apart, and codes of
            what is left without it.
    int4    as int8m, but half a byte a value: the number of one of 16 levels. Byte j of a block holds value
            j in its low half and value j + 32 in its high half.
    int8    int8m without the mean token, whatever the row's length: rows of the first spaces.

All codes stand first, then all scales, then the mean token, both float16: one read gets a row. The
rotation spreads a transformer's outlier channels over their block; what that and the rest is worth,
`python -m tests.benchmarks.codecs` measures. Which layout the rows of a space have, `FeatureSpec.layout`
says: its codec `int8` is int8m, or int8 in the first spaces.

Unpacking is sign * (scale / 8) * (H @ codes) + mean, of int4 H @ levels: sums of integers below 2^24 and
so exact in float32 in any order, which is why `model.quantize`, on any device, agrees with this file to
the bit. Packing agrees too: every sum that decides something is added in one fixed order.

This file needs numpy and nothing else: `nanomolmo2_codec` loads it by its place for zarr-python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

LAYOUTS = ("fp16", "int8m", "int4", "int8")
BLOCK = 64
"""Values that share a rotation and a scale."""

MEAN_TOKENS = 32
"""Tokens from which on a row of int8m or int4 holds its mean token: much of an image's features is the same
in all its tokens, and without that the error is a third lower. In smaller rows it costs more bits than it
saves."""

INT8_MAX = 127
INT4_LEVELS = (-127, -99, -78, -62, -48, -35, -23, -11, 0, 12, 23, 36, 49, 64, 82, 105)
"""What the 16 codes stand for, in scales. Lloyd-Max levels of normal values, which is what a rotation makes
of any others, for scales chosen as below: 9 % less error than even steps. Part of the format."""
INT4_DIVISORS = tuple(map(np.float32, (102.5, 107.5, 117.5, 122.5, 127.5, 132.5, 137.5, 142.5)))
"""Scales tried for a block are its largest magnitude divided by these. Above 127 the largest is clipped
so that the others get finer steps. The best eight; four more gain 0.3 % (2026-11-24)."""
INT4_CELLS = 255
"""`int4_cells` are numbered from -255 to 255."""

FP16_MAX = np.float32(65504)
SIGN_SEED = 0x6E6D32
"""Seeds the rotation's signs. Part of the format: it never changes."""


def rotation_signs() -> npt.NDArray[np.float32]:
    """The fixed +-1 of the rotation, shape (64,): bits of a 64-bit LCG, so no library's generator matters."""
    state, signs = SIGN_SEED, []
    for _ in range(BLOCK):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        signs.append(1.0 if state >> 63 else -1.0)
    return np.array(signs, np.float32)


def hadamard() -> npt.NDArray[np.float32]:
    """The unnormalised Sylvester-Hadamard matrix, shape (64, 64), entries +-1, symmetric."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]).astype(np.float32)
    return matrix


def int4_cells() -> npt.NDArray[np.uint8]:
    """The code of the level nearest to x scales, at ceil(2 x) + 255, shape (511,): as levels are integers,
    what separates two of them is a multiple of a half."""
    levels = np.array(INT4_LEVELS)
    twice_between = levels[1:] + levels[:-1]
    cells = np.arange(-INT4_CELLS, INT4_CELLS + 1)
    return np.searchsorted(twice_between, cells).astype(np.uint8)


def row_bytes(layout: str, tokens: int, width: int) -> int:
    """Bytes of one packed row.

    Raises:
        ValueError: unknown layout, or a row that does not divide into blocks.
    """
    values = tokens * width
    if layout == "fp16":
        return 2 * values
    if layout not in LAYOUTS:
        raise ValueError(f"row layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if width % BLOCK:
        raise ValueError(
            f"int8 and int4 need a width that is a multiple of {BLOCK}, not {width}; fp16 takes any"
        )
    return row_parts(layout, tokens, width)[-1]


def row_parts(layout: str, tokens: int, width: int) -> tuple[int, int, int]:
    """Where the codes, the scales and the mean token of a lossy row end, bytes."""
    values = tokens * width
    codes = values // 2 if layout == "int4" else values
    scales = codes + 2 * (values // BLOCK)
    has_mean = layout != "int8" and tokens >= MEAN_TOKENS
    return codes, scales, scales + 2 * width * has_mean


def pack(features: npt.ArrayLike, layout: str) -> npt.NDArray[np.uint8]:
    """Features (..., tokens, width), finite -> rows (..., row_bytes) uint8.

    What exceeds float16 is clipped to its range. `model.quantize.pack` is the twin that runs on the
    encoder's device, counts what was clipped and measures the error.

    Raises:
        ValueError: NaN or Inf among the features, or as `row_bytes`.
    """
    x = np.asarray(features, np.float32)
    if not np.isfinite(x).all():
        raise ValueError("NaN or Inf among the features")
    *lead, tokens, width = x.shape
    size = row_bytes(layout, tokens, width)
    x = np.clip(x, -FP16_MAX, FP16_MAX)
    # What every layout starts from, so that a row packed from a stored fp16 row is the same row.
    halves = x.astype("<f2")
    if layout == "fp16":
        return np.ascontiguousarray(halves).view(np.uint8).reshape(*lead, size)
    x = halves.astype(np.float32)
    _, before_mean, _ = row_parts(layout, tokens, width)
    mean = np.zeros((*lead, 0), "<f2")
    if before_mean < size:
        mean = _mean_token(x).astype("<f2")
        x = x - mean.astype(np.float32)[..., None, :]
    blocks = _rotate(x.reshape(*lead, -1, BLOCK) * rotation_signs())
    codes, scales = (_int4_codes if layout == "int4" else _int8_codes)(blocks)
    tail = np.concatenate([scales, mean], axis=-1).view(np.uint8)
    return np.concatenate([codes.reshape(*lead, -1), tail], axis=-1)


def unpack(
    rows: npt.NDArray[np.uint8], layout: str, tokens: int, width: int
) -> npt.NDArray[np.float16]:
    """Rows (..., row_bytes) uint8 -> features (..., tokens, width) float16.

    Raises:
        ValueError: the rows have another length than `row_bytes(layout, tokens, width)`.
    """
    size = row_bytes(layout, tokens, width)
    if rows.shape[-1] != size:
        raise ValueError(
            f"a row of {rows.shape[-1]} bytes; {layout} {tokens} x {width} takes {size}"
        )
    lead = rows.shape[:-1]
    rows = np.ascontiguousarray(rows)
    if layout == "fp16":
        return rows.view("<f2").astype(np.float16, copy=False).reshape(*lead, tokens, width)
    codes_end, scales_end, _ = row_parts(layout, tokens, width)
    blocks = tokens * width // BLOCK
    stored = rows[..., :codes_end].reshape(*lead, blocks, -1)
    tail = np.ascontiguousarray(rows[..., codes_end:]).view("<f2").astype(np.float32)
    # H = [[h, h], [h, -h]]: the sums and differences of a block's halves are the first stage.
    halves = np.empty((*stored.shape[:-1], 2, BLOCK // 2), np.float32)
    if layout == "int4":
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
    # Rounding can carry a value at float16's edge beyond it.
    return np.clip(x, -FP16_MAX, FP16_MAX, out=x).astype(np.float16)


def _int8_codes(blocks: Any) -> tuple[Any, Any]:
    """Rotated blocks (..., 64) -> codes (..., 64) uint8, scales (...,) float16."""
    scales = (np.abs(blocks).max(axis=-1) / np.float32(INT8_MAX)).astype("<f2")
    codes = np.clip(np.rint(_in_scales(blocks, scales)), -INT8_MAX, INT8_MAX)
    return codes.astype(np.int8).view(np.uint8), scales


def _int4_codes(blocks: Any) -> tuple[Any, Any]:
    """Rotated blocks (..., 64) -> bytes (..., 32), scales (...,) float16: of those tried, the first with the
    smallest squared error.

    The levels reach further below 0 than above, so a scale takes the sign that gives the lowest level to
    the largest magnitude.
    """
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
    """Where `int4_cells` has the code of each value."""
    cells = np.ceil(_in_scales(blocks, scales) * np.float32(2))
    return np.clip(cells, -INT4_CELLS, INT4_CELLS).astype(np.intp) + INT4_CELLS


def _in_scales(blocks: Any, scales: Any) -> Any:
    """Values divided by the scale of their block; 0 where that is 0."""
    steps = scales.astype(np.float32)[..., None]
    return np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps != 0)


def _mean_token(x: Any) -> Any:
    """(..., tokens, width) -> (..., width): halves added to halves, an odd last token to the first."""
    tokens = np.float32(x.shape[-2])
    while (half := x.shape[-2] // 2) > 0:
        last = x[..., 2 * half :, :]
        x = x[..., :half, :] + x[..., half : 2 * half, :]
        x[..., : last.shape[-2], :] += last
    return x[..., 0, :] / tokens


def _sum(values: Any) -> Any:
    """Sum over the last axis (64): halves added to halves, an order that every library can follow."""
    while (half := values.shape[-1] // 2) > 0:
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _rotate(blocks: Any) -> Any:
    """Orthonormal Hadamard transform of the last axis (64), six butterfly stages in a fixed order.

    Values of a block stand below one another meanwhile, a few hundred blocks at a time: every stage is then
    additions of long runs that a cache holds, three times faster than side by side.
    """
    flat = blocks.reshape(-1, BLOCK)
    rotated = np.empty_like(flat)
    for start in range(0, len(flat), _ROTATED):
        x = np.ascontiguousarray(flat[start : start + _ROTATED].T)
        y = np.empty_like(x)
        half = 1
        while half < BLOCK:
            pairs = (BLOCK // (2 * half), 2, half, x.shape[1])
            before, after = x.reshape(pairs), y.reshape(pairs)
            np.add(before[:, 0], before[:, 1], out=after[:, 0])
            np.subtract(before[:, 0], before[:, 1], out=after[:, 1])
            x, y = y, x
            half *= 2
        np.multiply(x.T, np.float32(0.125), out=rotated[start : start + _ROTATED])
    return rotated.reshape(blocks.shape)


_ROTATED = 256
"""Blocks rotated together: 64 KB."""
