"""The row layouts in torch: equal to those in numpy to the bit, and honest about what they did to a row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache.format import codec
from model import quantize

WIDE = hnp.arrays(
    np.float32, (3, 2, 128), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
NEAR_FP16 = hnp.arrays(np.float32, (3, 2, 128), elements=st.floats(-66000, 66000, width=32))


def bits(x: np.ndarray) -> np.ndarray:
    """So that -0.0 and 0.0 differ."""
    return np.ascontiguousarray(x).view(np.uint8)


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=100, deadline=None)
@given(x=WIDE | NEAR_FP16)
@example(x=np.zeros((3, 2, 128), np.float32))
@example(x=np.full((3, 2, 128), 65520, np.float32))  # float16 would round it to infinity
@example(x=np.full((3, 2, 128), 1e-8, np.float32))  # the scale underflows
@example(x=np.full((3, 2, 128), 3.4e38, np.float32))
def test_twins_agree_to_the_bit(name: str, x: np.ndarray) -> None:
    rows = codec.pack(x, name)
    packed = quantize.pack(torch.from_numpy(x), name)
    assert np.array_equal(packed.rows.numpy(), rows)
    assert torch.isfinite(packed.error).all()
    ours = quantize.unpack(packed.rows, name, tokens=2, width=128)
    assert np.array_equal(bits(ours.numpy()), bits(codec.unpack(rows, name, 2, 128)))


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([64, 768, 1024, 1152, 2048]),
    tokens=st.sampled_from([1, 3, 9, 31, 32, 33, 37]),
    exponent=st.integers(-9, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_twins_agree_at_every_width(
    name: str, width: int, tokens: int, exponent: int, seed: int
) -> None:
    """Also where scales are subnormal (1e-6), vanish (1e-9) or overflow (1e5)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, tokens, width)).astype(np.float32)
    x[..., :: width // 7] *= 50
    x += rng.standard_normal(width).astype(np.float32)
    x *= np.float32(10.0**exponent)
    rows = codec.pack(x, name)
    assert rows.shape == (2, codec.row_bytes(name, tokens, width))
    assert np.array_equal(quantize.pack(torch.from_numpy(x), name).rows.numpy(), rows)
    ours = quantize.unpack(torch.from_numpy(rows), name, tokens, width).numpy()
    assert np.array_equal(bits(ours), bits(codec.unpack(rows, name, tokens, width)))


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_autocast_changes_no_bit(name: str, tokens: int) -> None:
    """The trainer unpacks where its matrix products are bfloat16."""
    x = 3 + torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(2))
    rows = quantize.pack(x, name).rows
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize.pack(x, name).rows, rows)
        under = quantize.unpack(rows, name, tokens, 128)
    assert torch.equal(under, quantize.unpack(rows, name, tokens, 128))


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("threads", [1, 2])
def test_twins_agree_on_whole_images(name: str, threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 576, 1024)).astype(np.float32)
    x[..., 7] *= 300
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = quantize.pack(torch.from_numpy(x), name)
        ours = quantize.unpack(packed.rows, name, 576, 1024)
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(packed.rows.numpy(), codec.pack(x, name))
    assert np.array_equal(
        bits(ours.numpy()), bits(codec.unpack(packed.rows.numpy(), name, 576, 1024))
    )


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=50, deadline=None)
@given(rows=st.data())
def test_any_bytes_unpack_alike(name: str, rows: st.DataObject) -> None:
    """Not only what we packed: other implementations may choose other codes, NaN scales included."""
    tokens = rows.draw(st.sampled_from([1, 32]))
    size = codec.row_bytes(name, tokens, 64)
    stored = rows.draw(hnp.arrays(np.uint8, (2, size)))
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = codec.unpack(stored, name, tokens, 64)
    ours = quantize.unpack(torch.from_numpy(stored), name, tokens, 64).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_error_is_measured_against_the_features_themselves() -> None:
    x = torch.randn(4, 6, 128, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    for name in codec.CODECS:
        packed = quantize.pack(x, name)
        back = quantize.unpack(packed.rows, name, 6, 128).float()
        expected = (back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-30)
        assert torch.allclose(packed.error, expected, rtol=1e-5)
        assert packed.error[3] == 0 and packed.clipped == 0 and packed.finite.all()
        assert (packed.error[:3] < {"fp16": 4e-4, "int8": 7e-3, "int4": 0.095}[name]).all()


def test_clipping_is_counted_and_shows_in_the_error() -> None:
    x = torch.full((2, 1, 64), 1.0)
    x[1, 0, :3] = torch.tensor([1e6, -7e4, 65504.0])
    packed = quantize.pack(x, "fp16")
    assert packed.clipped == 2 and packed.finite.all()
    assert packed.error[0] == 0 and packed.error[1] > 0.9
    assert quantize.unpack(packed.rows, "fp16", 1, 64)[1, 0, :2].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", codec.CODECS)
def test_rows_that_are_not_finite_are_told_and_spoil_no_other(name: str, bad: float) -> None:
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    clean = quantize.pack(x, name)
    x[1, 1, 5] = bad
    packed = quantize.pack(x, name)
    assert packed.finite.tolist() == [True, False, True]
    assert torch.equal(packed.rows[[0, 2]], clean.rows[[0, 2]])
    assert torch.isfinite(packed.error).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_precision_holds_the_values_of_float16(dtype: torch.dtype) -> None:
    rows = quantize.pack(torch.randn(2, 40, 64), "int8").rows
    half = quantize.unpack(rows, "int8", 40, 64)
    assert torch.equal(quantize.unpack(rows, "int8", 40, 64, dtype=dtype), half.to(dtype))


def test_low_precision_features_are_packed_as_they_are() -> None:
    x = torch.randn(2, 40, 64).bfloat16()
    assert torch.equal(quantize.pack(x, "int8").rows, quantize.pack(x.float(), "int8").rows)


def test_rows_of_another_shape_are_refused() -> None:
    rows = quantize.pack(torch.randn(2, 4, 64), "int8").rows
    for wrong in (rows[:, :-1], rows[0], rows.view(torch.int8)):
        with pytest.raises(ValueError, match="takes"):
            quantize.unpack(wrong, "int8", 4, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize.pack(torch.randn(1, 2, 60), "int8")
    with pytest.raises(ValueError, match="none of fp16, int8, int4"):
        quantize.pack(torch.randn(1, 2, 64), "int3")


def test_packing_leaves_no_gradient_and_no_change_behind() -> None:
    x = torch.randn(1, 2, 64, requires_grad=True)
    before = x.detach().clone()
    packed = quantize.pack(x, "int8")
    assert not packed.rows.requires_grad and not packed.error.requires_grad
    assert torch.equal(x, before)
