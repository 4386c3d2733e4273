"""The row codecs in numpy (their torch twins: test_quantize)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache import codec

FINITE = st.floats(-65504, 65504, width=32, allow_subnormal=False)


def outlier_features(rng: np.random.Generator, tokens: int, width: int) -> np.ndarray:
    """Rows as transformers make them: a few channels a hundred times larger than the rest."""
    x = rng.standard_normal((tokens, width)).astype(np.float32)
    x[:, rng.choice(width, width // 100, replace=False)] *= 100
    return x


@pytest.mark.parametrize("width", [768, 1024, 1152, 2048])
def test_int8_stays_within_its_promised_error_despite_outliers(width: int) -> None:
    x = outlier_features(np.random.default_rng(0), 36, width)
    y = codec.unpack(codec.pack(x, "int8"), "int8", 36, width).astype(np.float32)
    assert np.linalg.norm(x - y) / np.linalg.norm(x) <= 0.006


def test_rotation_is_what_keeps_the_error_small() -> None:
    """Without it the same bits lose several times more; if this fails the rotation does nothing."""
    x = outlier_features(np.random.default_rng(1), 8, 1024)
    y = codec.unpack(codec.pack(x, "int8"), "int8", 8, 1024).astype(np.float32)
    blocks = x.reshape(-1, codec.BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    plain = (np.rint(blocks / scale) * scale).reshape(x.shape)
    small = np.abs(x) < 5  # what outliers drown
    assert np.linalg.norm((x - y)[small]) < np.linalg.norm((x - plain)[small])


def test_fp16_is_the_values_themselves() -> None:
    x = np.random.default_rng(2).standard_normal((5, 7, 64)).astype(np.float16)
    assert codec.pack(x, "fp16").tobytes() == x.tobytes()
    assert np.array_equal(codec.unpack(codec.pack(x, "fp16"), "fp16", 7, 64), x)


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=60, deadline=None)
@given(x=hnp.arrays(np.float32, (2, 3, 128), elements=FINITE))
def test_what_comes_back_is_finite_and_near(name: str, x: np.ndarray) -> None:
    rows = codec.pack(x, name)
    assert rows.shape == (2, codec.row_bytes(name, 3, 128))
    y = codec.unpack(rows, name, 3, 128).astype(np.float32)
    assert np.isfinite(y).all()
    norms = np.linalg.norm(x.reshape(2, 3, -1, 64), axis=-1)
    errors = np.linalg.norm((x - y).reshape(2, 3, -1, 64), axis=-1)
    # Half a step in each of 64 rotated values, and float16's own rounding.
    assert (errors <= norms * (0.5 * 8 / 127 + 2e-3) + 1e-4).all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_nan_and_inf_are_refused_and_large_values_clipped(name: str) -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            codec.pack(np.full((1, 64), bad, np.float32), name)
    y = codec.unpack(codec.pack(np.full((1, 64), 1e9, np.float32), name), name, 1, 64)
    assert np.isfinite(y).all()
    assert np.allclose(y.astype(np.float32), 65504, rtol=0.03)


def test_the_rotation_is_orthonormal_and_part_of_the_format() -> None:
    h = codec.hadamard()
    assert np.array_equal(h @ h.T, 64 * np.eye(64, dtype=np.float32))
    x = np.random.default_rng(3).standard_normal((4, 64)).astype(np.float32)
    assert np.allclose(codec._rotate(x), x @ h / 8, atol=1e-6)
    assert np.packbits(codec.rotation_signs() > 0).tobytes().hex() == "7783de06c5ca1b3e"


def test_rows_of_a_wrong_length_and_widths_without_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 10 bytes"):
        codec.unpack(np.zeros(10, np.uint8), "int8", 1, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        codec.row_bytes("int8", 1, 100)
    with pytest.raises(ValueError, match="none of fp16, int8"):
        codec.row_bytes("zip", 1, 64)
