"""Row codecs in numpy: how `tokens x width` features become the bytes of one row, and back.

    fp16   the values as little-endian float16.
    int8   a random-sign Hadamard rotation over blocks of 64 values, one symmetric fp16 scale a block,
           one signed byte a value. All codes stand first, then all scales: one read gets a row.

The rotation spreads a transformer's outlier channels over their block: on real activations it takes
int8 from 4.2 % to 0.46 % relative error (SmolLM2-135M hidden states, block 64). Unpacking is
sign * (scale / 8) * (H @ codes): the sums are of integers below 2^24 and so exact in float32 in any
order, which is why `model.quantize`, on any device, agrees with this file to the bit. Packing agrees too:
the rotation is six stages of additions in one fixed order.

This file needs numpy and nothing else: `nanomolmo2_codec` loads it by its place for zarr-python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

CODECS = ("fp16", "int8")
BLOCK = 64
"""Values that share a rotation and a scale."""

INT8_MAX = 127
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


def row_bytes(codec: str, tokens: int, width: int) -> int:
    """Bytes of one packed row.

    Raises:
        ValueError: unknown codec, or a row that does not divide into blocks.
    """
    values = tokens * width
    if codec == "fp16":
        return 2 * values
    if codec == "int8":
        if width % BLOCK:
            raise ValueError(f"codec int8 needs a width that is a multiple of {BLOCK}, not {width}")
        return values + 2 * (values // BLOCK)
    raise ValueError(f"codec {codec!r} is none of {', '.join(CODECS)}")


def pack(features: npt.ArrayLike, codec: str) -> npt.NDArray[np.uint8]:
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
    size = row_bytes(codec, tokens, width)
    x = np.clip(x, -FP16_MAX, FP16_MAX)
    # What every codec starts from, so that a row packed from a stored fp16 row is the same row.
    halves = x.astype("<f2")
    if codec == "fp16":
        return np.ascontiguousarray(halves).view(np.uint8).reshape(*lead, size)
    x = halves.astype(np.float32)
    blocks = _rotate(x.reshape(*lead, -1, BLOCK) * rotation_signs())
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    scale = (largest / np.float32(INT8_MAX)).astype("<f2")
    steps = scale.astype(np.float32)
    quotient = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    codes = np.clip(np.rint(quotient), -INT8_MAX, INT8_MAX).astype(np.int8)
    flat_codes = codes.reshape(*lead, tokens * width).view(np.uint8)
    flat_scales = np.ascontiguousarray(scale.reshape(*lead, -1)).view(np.uint8)
    return np.concatenate([flat_codes, flat_scales], axis=-1)


def unpack(
    rows: npt.NDArray[np.uint8], codec: str, tokens: int, width: int
) -> npt.NDArray[np.float16]:
    """Rows (..., row_bytes) uint8 -> features (..., tokens, width) float16.

    Raises:
        ValueError: the rows have another length than `row_bytes(codec, tokens, width)`.
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
    values = tokens * width
    codes = rows[..., :values].view(np.int8).reshape(*lead, -1, BLOCK).astype(np.float32)
    scales = np.ascontiguousarray(rows[..., values:]).view("<f2").astype(np.float32)
    sums = codes @ hadamard()  # exact: integers, at most 64 * 127
    x = sums * (scales * np.float32(0.125))[..., None] * rotation_signs()
    # Rounding can carry a value at float16's edge beyond it.
    return np.clip(x, -FP16_MAX, FP16_MAX).astype(np.float16).reshape(*lead, tokens, width)


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
