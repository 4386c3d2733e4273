"""Compiled packing against that of numpy: bytes and errors are equal.

rows, errors = compiled_codec.quantise(halves, "int4")
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.format import codec
from cache.maintenance import compiled_codec, convert_rows

pytestmark = pytest.mark.slow

CODECS = ("int8", "int4")

Halves = npt.NDArray[np.float16]


def assert_equal(x: Halves, name: str) -> None:
    rows, errors = compiled_codec.quantise(x, name)
    wanted, wanted_errors = codec.quantise(x, name)
    np.testing.assert_array_equal(rows, wanted)
    np.testing.assert_array_equal(errors, wanted_errors)


@st.composite
def features(draw: st.DrawFn) -> Halves:
    """Features whose channels differ in size by up to 2^40, some beyond both ends of float16's range."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 70), st.sampled_from([64, 128, 192])))
    largest = 2.0 ** rng.integers(-30, draw(st.integers(-29, 18)), (1, 1, shape[2]))
    values = np.clip(rng.standard_normal(shape) * largest, -codec.FP16_MAX, codec.FP16_MAX)
    values[rng.random(shape[:2]) < draw(st.sampled_from([0.0, 0.3]))] = 0
    return values.astype("<f2")


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=100)
@given(x=features())
def test_bytes_and_errors_equal_those_of_numpy(name: str, x: Halves) -> None:
    assert_equal(x, name)


@settings(max_examples=100)
@given(x=features(), window=st.sampled_from([1, 2, 3, 4]), side=st.integers(1, 3))
def test_pooled_values_equal_those_of_numpy(x: Halves, window: int, side: int) -> None:
    x = np.resize(x, (2, (side * window) ** 2, x.shape[2]))
    pooled, errors = compiled_codec.pool(x, window)
    wanted = convert_rows.pool(x, window)
    rounded = codec.round_to_halves(wanted)
    np.testing.assert_array_equal(pooled.view(np.uint16), rounded.astype("<f2").view(np.uint16))
    off = (pooled.astype(np.float64) - wanted).reshape(2, -1)
    norms = np.linalg.norm(wanted.reshape(2, -1).astype(np.float64), axis=1)
    relative = np.divide(np.linalg.norm(off, axis=1), norms, out=np.zeros(2), where=norms > 0)
    np.testing.assert_allclose(errors, relative, rtol=1e-4)


@pytest.mark.parametrize("name", CODECS)
def test_every_float16_value(name: str) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    finite = every[(every & 0x7FFF) < 0x7C00].view(np.float16)
    for tokens in (31, 62):
        x = np.resize(finite, (2 * len(finite) // (tokens * 64), tokens, 64))
        assert_equal(x, name)
        assert_equal(np.sort(x, axis=None).reshape(x.shape), name)


@pytest.mark.parametrize("name", CODECS)
def test_values_between_two_levels(name: str) -> None:
    """A block that keeps its values has its largest in one place, and others halfway between two codes."""
    blocks = np.arange(64 * 512, dtype=np.float32).reshape(512, 64) % 257 - 128
    x = np.concatenate([blocks / 2, blocks, blocks[::-1] * 64]).astype("<f2")
    assert_equal(x.reshape(48, 32, 64), name)
    assert_equal(x.reshape(96, 16, 64), name)


def test_without_a_folder_to_write_to_it_compiles_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = numba.njit

    def njit(**options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError(
                "cannot cache function 'add': no locator available for file '<stdin>'"
            )
        return real(**options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled_codec.kernel(lambda a, b: a + b)(1, 2) == 3
