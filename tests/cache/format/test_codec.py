"""Row codecs in numpy: rows are within the promised error, and their bytes never change.

row = codec.pack(features, "int8")
features = codec.unpack(row, "int8", tokens, width)
"""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache.format import codec

ERROR = {"int8": 0.006, "int4": 0.09}
"""Largest relative error of a row, as documented."""
REACH = {"int8": 0.5 / 127, "int4": 14 / 102.5}
"""Largest distance of a value to its level, divided by the largest magnitude of its block."""
FINITE = st.floats(-65504, 65504, width=32, allow_subnormal=False)


def outlier_features(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Return features like those of transformers: a few channels are a hundred times larger than the rest."""
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    x[:, rng.choice(width, width // 100, replace=False)] *= 100
    return x


def mean_token(x: np.ndarray) -> np.ndarray:
    """Return the mean over the tokens, halves added to halves, as the format prescribes."""
    tokens = np.float32(len(x))
    while (half := len(x) // 2) > 0:
        rest = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        x[: len(rest)] += rest
    return (x[0] / tokens).astype(np.float16)


def rotated(x: np.ndarray) -> np.ndarray:
    """Return the rotated blocks (blocks, 64) of features, by the definition of the transform."""
    x, half = x.reshape(-1, 64) * codec.rotation_signs(), 1
    while half < 64:
        pairs = x.reshape(-1, 2, half)
        x = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        half *= 2
    return x.reshape(-1, 64) * np.float32(0.125)


def plain_pack(x: np.ndarray, name: str) -> np.ndarray:
    """Pack one row, (tokens, width) of float16 numbers, a block at a time and without any haste."""
    codes, scales, mean = [], [], np.zeros(0, np.float16)
    if len(x) >= codec.MEAN_TOKENS:
        mean = mean_token(x)
        x = x - mean.astype(np.float32)
    table = codec.int4_cells()
    levels = np.array(codec.INT4_LEVELS, np.float32)
    for block in rotated(x):
        largest = np.abs(block).max()
        if name == "int8":
            scale = (largest / np.float32(127)).astype(np.float16)
            step = np.float32(scale)
            in_steps = block / step if step else np.zeros_like(block)
            codes.append(np.clip(np.rint(in_steps), -127, 127).astype(np.int8).view(np.uint8))
            scales.append(scale)
            continue
        side = np.float32(-1 if block.max() > -block.min() else 1)
        tried = []
        for divisor in codec.INT4_DIVISORS:
            scale = (largest / divisor * side).astype(np.float16)
            step = np.float32(scale)
            in_steps = block / step if step else np.zeros_like(block)
            number = table[np.clip(np.ceil(2 * in_steps), -255, 255).astype(int) + 255]
            off = levels[number] * step - block
            off = off * off
            while len(off) > 1:
                off = off[: len(off) // 2] + off[len(off) // 2 :]
            tried.append((off[0], number, scale))
        _, number, scale = min(tried, key=lambda each: each[0])  # the first of equal ones
        codes.append(number[:32] | number[32:] << 4)
        scales.append(scale)
    parts = [np.concatenate(codes), np.array(scales, "<f2"), mean.astype("<f2")]
    return np.concatenate([part.view(np.uint8) for part in parts])


def error(x: np.ndarray, name: str) -> float:
    y = codec.unpack(codec.pack(x, name), name, *x.shape[-2:]).astype(np.float32)
    return float(np.linalg.norm(x - y) / np.linalg.norm(x))


@pytest.mark.parametrize("name", ERROR)
@pytest.mark.parametrize("width", [768, 1024, 1152, 2048])
def test_the_error_stays_below_the_limit_despite_outliers(name: str, width: int) -> None:
    rng = np.random.default_rng(0)
    assert error(outlier_features(rng, 37, width), name) <= ERROR[name]
    assert error(rng.standard_normal((37, width)).astype(np.float32), name) <= ERROR[name]


def test_int4_levels_are_better_than_even_steps() -> None:
    """Seven equal steps up to the largest value have a quarter more error."""
    x = np.random.default_rng(5).standard_normal((31, 1024)).astype(np.float32)
    blocks = rotated(x)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 7
    plain = np.linalg.norm(np.rint(blocks / scale) * scale - blocks) / np.linalg.norm(blocks)
    assert error(x, "int4") < 0.8 * plain


def test_int4_unpacks_bytes_written_by_hand() -> None:
    """One block: codes of values j and j + 32 in the halves of byte j, then the scale."""
    codes = np.array([*range(16), *[11] * 16, *range(15, -1, -1), *[3] * 16], np.uint8)
    row = np.empty(34, np.uint8)
    row[:32] = codes[:32] | codes[32:] << 4
    row[32:] = np.array([-0.5], "<f2").view(np.uint8)
    y = codec.unpack(row, "int4", 1, 64)[0]
    levels = np.array(codec.INT4_LEVELS)[codes]
    expected = codec.hadamard() @ levels / 8 * -0.5 * codec.rotation_signs()
    assert np.array_equal(y, expected.astype(np.float16))


@pytest.mark.parametrize(("name", "codes"), [("int8", 128), ("int4", 64)])
def test_the_mean_token_is_stored_once(name: str, codes: int) -> None:
    rng = np.random.default_rng(6)
    shared = 3 * rng.standard_normal(128).astype(np.float32)
    x = shared + rng.standard_normal((64, 128)).astype(np.float32)
    assert error(x, name) < 0.4 * error(x[:31], name)
    row = codec.pack(x, name)
    assert len(row) == codec.row_bytes(name, 64, 128) == 64 * (codes + 4) + 256
    assert len(codec.pack(x[:31], name)) == 31 * (codes + 4)
    mean = row[-256:].view("<f2")
    assert np.array_equal(mean, x.astype(np.float16).mean(0, dtype=np.float64).astype(np.float16))
    exact = np.broadcast_to(shared.astype(np.float16), (64, 128))
    assert np.array_equal(codec.unpack(codec.pack(exact, name), name, 64, 128), exact)


@pytest.mark.parametrize("width", [768, 1024, 1152, 2048])
@pytest.mark.parametrize("tokens", [32, 33, 64])
def test_codes_are_those_of_what_the_mean_token_leaves(tokens: int, width: int) -> None:
    """Integers, so that the mean token and the rest are float16 numbers."""
    rng = np.random.default_rng(tokens * width)
    rest = rng.integers(-100, 100, (tokens, width)).astype(np.float32)
    rest[tokens // 2 : tokens // 2 * 2] = -rest[: tokens // 2]
    rest[tokens // 2 * 2 :] = 0
    shared = rng.integers(-500, 500, width).astype(np.float32)
    row, of_rest = codec.pack(rest + shared, "int8"), codec.pack(rest, "int8")
    assert row[: -2 * width].tobytes() == of_rest[: -2 * width].tobytes()
    assert np.array_equal(row[-2 * width :].view("<f2"), shared)


@settings(max_examples=200, deadline=None)
@given(x=st.floats(-300, 300, width=32))
def test_int4_takes_the_nearest_level(x: float) -> None:
    codes = codec.int4_cells()
    code = codes[int(np.clip(np.ceil(2 * x), -255, 255)) + 255]
    distance = np.abs(np.array(codec.INT4_LEVELS) - x)
    assert distance[code] == distance.min()
    assert np.array_equal(
        np.array(codec.INT4_LEVELS)[codes[255 + 2 * np.array(codec.INT4_LEVELS)]], codec.INT4_LEVELS
    )


def test_the_rotation_lowers_the_error() -> None:
    """Without it, equal bits have several times the error. If this fails, the rotation does nothing."""
    x = outlier_features(np.random.default_rng(1), 8, 1024)
    y = codec.unpack(codec.pack(x, "int8"), "int8", 8, 1024).astype(np.float32)
    blocks = x.reshape(-1, codec.BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    plain = (np.rint(blocks / scale) * scale).reshape(x.shape)
    small = np.abs(x) < 5  # the values beside outliers
    assert np.linalg.norm((x - y)[small]) < np.linalg.norm((x - plain)[small])


SIZES = {
    "ones": lambda rng, shape: rng.standard_normal(shape),
    "many sizes": lambda rng, shape: (
        rng.standard_normal(shape) * 10.0 ** rng.integers(-9, 5, (*shape[:2], 1))
    ),
    "few bits": lambda rng, shape: rng.integers(-3, 4, shape) * 2.0**-24,
    "zeros of both signs": lambda rng, shape: np.where(rng.random(shape) < 0.5, -0.0, 0.0),
    "minus zero": lambda rng, shape: np.full(shape, -0.0),
    "clipped": lambda rng, shape: rng.standard_normal(shape) * 1e5,
    "hundredths": lambda rng, shape: rng.integers(-9, 9, shape) * 0.01,
}


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("kind", SIZES)
def test_rows_are_packed_to_the_bit_as_the_plain_definition_says(kind: str, name: str) -> None:
    """Also in parts: PART_VALUES is smaller than the last two of these."""
    rng = np.random.default_rng(7)
    for shape in ((3, 4, 64), (1, 31, 128), (2, 33, 64), (1300, 1, 64), (1, 144, 640)):
        x = SIZES[kind](rng, shape).astype(np.float32)
        rows = codec.pack(x, name)
        halves = np.clip(x, -65504, 65504).astype("<f2")
        for number in {0, 1, shape[0] - 1} & set(range(shape[0])):
            assert np.array_equal(rows[number], plain_pack(halves[number].astype(np.float32), name))
        for same in (halves, halves.astype(np.float32)):
            assert np.array_equal(codec.quantise(same, name)[0], rows)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_error_is_measured_as_rows_are_packed(name: str) -> None:
    rng = np.random.default_rng(8)
    x = np.stack([outlier_features(rng, 64, 256), 3 + outlier_features(rng, 64, 256)])
    halves = np.concatenate([x, np.zeros((1, 64, 256), np.float32)]).astype("<f2")
    rows, errors = codec.quantise(halves, name)
    back = codec.unpack(rows, name, 64, 256).astype(np.float64)
    wanted = [
        np.linalg.norm(one - other) / np.linalg.norm(one)
        for one, other in zip(halves[:2].astype(np.float64), back, strict=False)
    ]
    assert errors[:2] == pytest.approx(wanted, rel=1e-2)  # unpacked values are rounded to float16
    assert errors[2] == 0


def test_rounding_to_halves_is_that_of_float16() -> None:
    bits = np.arange(0, 2**32, 7919 * 13, dtype=np.uint64).astype(np.uint32)
    ties = (np.arange(0, 65504, dtype=np.uint32) << 13) + 0x38801000  # between two neighbours
    x = np.concatenate([bits, ties, ties + 1, ties - 1]).view(np.float32)
    x = x[np.abs(x) < 65504]
    rounded = codec.round_to_halves(x)
    assert len(x) > 100_000
    assert np.array_equal(rounded.view(np.uint32), x.astype("<f2").astype("<f4").view(np.uint32))


def test_all_halves_are_widened() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    wide = np.empty(len(halves), np.float32)
    codec.widen(halves, wide)
    exact = halves.astype(np.float32)
    assert np.array_equal((wide * codec.HALF_UNIT).view(np.uint32), exact.view(np.uint32))


def test_fp16_is_the_values_themselves() -> None:
    x = np.random.default_rng(2).standard_normal((5, 7, 64)).astype(np.float16)
    assert codec.pack(x, "fp16").tobytes() == x.tobytes()
    assert np.array_equal(codec.unpack(codec.pack(x, "fp16"), "fp16", 7, 64), x)


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=60, deadline=None)
@given(x=hnp.arrays(np.float32, (2, 3, 128), elements=FINITE))
def test_unpacked_values_are_finite_and_close(name: str, x: np.ndarray) -> None:
    rows = codec.pack(x, name)
    assert rows.shape == (2, codec.row_bytes(name, 3, 128))
    y = codec.unpack(rows, name, 3, 128).astype(np.float32)
    assert np.isfinite(y).all()
    norms = np.linalg.norm(x.reshape(2, 3, -1, 64), axis=-1)
    errors = np.linalg.norm((x - y).reshape(2, 3, -1, 64), axis=-1)
    # The largest distance in each of 64 rotated values, and the rounding of float16.
    farthest = 8 * REACH.get(name, 0)
    assert (errors <= norms * (farthest + 2e-3) + 1e-4).all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_nan_and_inf_are_refused_and_large_values_are_clipped(name: str) -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            codec.pack(np.full((1, 64), bad, np.float32), name)
    y = codec.unpack(codec.pack(np.full((1, 64), 1e9, np.float32), name), name, 1, 64)
    assert np.isfinite(y).all()
    assert np.linalg.norm(y.astype(np.float32) - 65504) <= 8 * 65504 * ERROR.get(name, 0)


def test_the_rotation_is_orthonormal_and_part_of_the_format() -> None:
    h = codec.hadamard()
    assert np.array_equal(h @ h.T, 64 * np.eye(64, dtype=np.float32))
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    assert np.allclose(rotated(x), (x * codec.rotation_signs()) @ h / 8, atol=1e-6)
    assert np.packbits(codec.rotation_signs() > 0).tobytes().hex() == "7783de06c5ca1b3e"


def test_wrong_row_lengths_widths_and_codecs_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 10 bytes"):
        codec.unpack(np.zeros(10, np.uint8), "int8", 1, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        codec.row_bytes("int8", 1, 100)
    with pytest.raises(ValueError, match="none of fp16, int8, int4"):
        codec.row_bytes("zip", 1, 64)


PACKED = {
    "fp16": "c87924e8daa738b51f9a9908aebb372ea01a2b44752af27d7c2966d94813ec78",
    "int4": "23342e185aa80f4fa6b84d21cdd23cc1be71be0e84d47d7c4eb71f0c05821bd3",
    "int8": "e4011e8da454518e1b41d6b55a481f0df58b1cfc4780413c11a5f4e09e83b72d",
}


@pytest.mark.parametrize("name", codec.CODECS)
def test_packed_bytes_are_part_of_the_format(name: str) -> None:
    """If this fails, rows on users' disks can no longer be read."""
    numbers = np.arange(36 * 128, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    x = numbers.reshape(36, 128) / 2.0**30 - 2 + np.arange(128) % 7
    row = codec.pack(x.astype(np.float32), name)
    assert hashlib.sha256(row.tobytes()).hexdigest() == PACKED[name]
