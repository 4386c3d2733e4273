"""The row codecs in torch: every bit equals the numpy codec's, and the error of packing is reported.

packed = quantize.pack(features, "int8")                            # .rows, .error, .finite, .clipped
features = unpack(packed.rows, "int8", tokens=576, width=1024)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cache.format import codec
from model import quantize
from nanomolmo2.unpack import unpack

WIDE = hnp.arrays(
    np.float32, (3, 2, 128), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
NEAR_FP16 = hnp.arrays(np.float32, (3, 2, 128), elements=st.floats(-66000, 66000, width=32))


def bits(x: np.ndarray) -> np.ndarray:
    """Return the bytes, so that -0.0 and 0.0 differ."""
    return np.ascontiguousarray(x).view(np.uint8)


def assert_equal_bits(x: np.ndarray, name: str) -> None:
    """Both codecs pack (B, M, V) features to equal rows, and unpack those to equal bits."""
    batch, tokens, width = x.shape
    rows = codec.pack(x, name)
    assert rows.shape == (batch, codec.row_bytes(name, tokens, width))
    packed = quantize.pack(torch.from_numpy(x), name)
    assert np.array_equal(packed.rows.numpy(), rows)
    assert torch.isfinite(packed.error).all()
    ours = unpack(packed.rows, name, tokens, width).numpy()
    assert np.array_equal(bits(ours), bits(codec.unpack(rows, name, tokens, width)))


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=100, deadline=None)
@given(x=WIDE | NEAR_FP16)
@example(x=np.zeros((3, 2, 128), np.float32))
@example(x=np.full((3, 2, 128), 65520, np.float32))  # float16 would round it to infinity
@example(x=np.full((3, 2, 128), 1e-8, np.float32))  # the scale underflows
@example(x=np.full((3, 2, 128), 3.4e38, np.float32))
def test_both_codecs_give_equal_bits(name: str, x: np.ndarray) -> None:
    assert_equal_bits(x, name)


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=20, deadline=None)
@given(
    width=st.sampled_from([64, 768, 1024, 1152, 2048]),
    tokens=st.sampled_from([1, 3, 9, 31, 32, 33, 37]),
    exponent=st.integers(-9, 5),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_codecs_give_equal_bits_at_every_width(
    name: str, width: int, tokens: int, exponent: int, seed: int
) -> None:
    """Scales may be subnormal (1e-6), underflow (1e-9) or overflow (1e5)."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, tokens, width)).astype(np.float32)
    x[..., :: width // 7] *= 50
    x += rng.standard_normal(width).astype(np.float32)
    x *= np.float32(10.0**exponent)
    assert_equal_bits(x, name)


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("tokens", [3, 40])
def test_autocast_changes_no_bit(name: str, tokens: int) -> None:
    """The trainer unpacks under autocast to bfloat16."""
    x = 3 + torch.randn(2, tokens, 128, generator=torch.Generator().manual_seed(2))
    rows = quantize.pack(x, name).rows
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantize.pack(x, name).rows, rows)
        under = unpack(rows, name, tokens, 128)
    assert torch.equal(under, unpack(rows, name, tokens, 128))


@pytest.mark.parametrize("name", codec.CODECS)
@pytest.mark.parametrize("threads", [1, 2])
def test_both_codecs_give_equal_bits_on_whole_images(name: str, threads: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 576, 1024)).astype(np.float32)
    x[..., 7] *= 300
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_equal_bits(x, name)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", codec.CODECS)
@settings(max_examples=50, deadline=None)
@given(rows=st.data())
def test_any_bytes_unpack_to_equal_values(name: str, rows: st.DataObject) -> None:
    """Rows packed by other implementations may have other codes, and damaged ones NaN scales."""
    tokens = rows.draw(st.sampled_from([1, 32]))
    size = codec.row_bytes(name, tokens, 64)
    stored = rows.draw(hnp.arrays(np.uint8, (2, size)))
    with np.errstate(invalid="ignore", over="ignore"):
        theirs = codec.unpack(stored, name, tokens, 64)
    ours = unpack(torch.from_numpy(stored), name, tokens, 64).numpy()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_the_error_is_relative_to_the_features() -> None:
    x = torch.randn(4, 6, 128, generator=torch.Generator().manual_seed(0))
    x[3] = 0
    for name in codec.CODECS:
        packed = quantize.pack(x, name)
        back = unpack(packed.rows, name, 6, 128).float()
        expected = (back - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1).clamp(min=1e-30)
        assert torch.allclose(packed.error, expected, rtol=1e-5)
        assert packed.error[3] == 0 and not packed.clipped.any() and packed.finite.all()
        assert (packed.error[:3] < {"fp16": 4e-4, "int8": 7e-3, "int4": 0.095}[name]).all()


def test_clipping_is_counted_and_included_in_the_error() -> None:
    x = torch.full((2, 1, 64), 1.0)
    x[1, 0, :3] = torch.tensor([1e6, -7e4, 65504.0])
    packed = quantize.pack(x, "fp16")
    assert packed.clipped.tolist() == [0, 2] and packed.finite.all()
    assert packed.error[0] == 0 and packed.error[1] > 0.9
    assert unpack(packed.rows, "fp16", 1, 64)[1, 0, :2].tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", codec.CODECS)
def test_rows_that_are_not_finite_are_reported_and_change_no_other(name: str, bad: float) -> None:
    x = torch.randn(3, 2, 64, generator=torch.Generator().manual_seed(1))
    clean = quantize.pack(x, name)
    x[1, 1, 5] = bad
    packed = quantize.pack(x, name)
    assert packed.finite.tolist() == [True, False, True]
    assert torch.equal(packed.rows[[0, 2]], clean.rows[[0, 2]])
    assert torch.isfinite(packed.error).all()


@pytest.mark.parametrize("name", codec.CODECS)
def test_what_a_gpu_always_computes_changes_no_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU looks whether a value is NaN or beyond float16; a GPU computes as if some were."""
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(1))
    odd = x.clone()
    odd[1, 0, 0], odd[2, 1, 5], odd[3, 0, :2] = float("nan"), float("inf"), 7e4
    for values in (x, odd):
        ours = quantize.pack(values, name)
        with monkeypatch.context() as patched:
            patched.setattr(quantize, "occurs", lambda _rare: True)
            always = quantize.pack(values, name)
        assert torch.equal(always.rows, ours.rows) and torch.equal(always.finite, ours.finite)
        assert torch.equal(always.clipped, ours.clipped)
        assert torch.allclose(always.error, ours.error, rtol=1e-6)
    assert ours.clipped.tolist() == [0, 0, 0, 2, 0]


def test_bfloat16_packs_like_float32_and_every_dtype_has_the_values_of_float16() -> None:
    x = torch.randn(2, 40, 64).bfloat16()
    rows = quantize.pack(x, "int8").rows
    assert torch.equal(rows, quantize.pack(x.float(), "int8").rows)
    half = unpack(rows, "int8", 40, 64)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(unpack(rows, "int8", 40, 64, dtype=dtype), half.to(dtype))


def test_rows_of_another_shape_are_refused() -> None:
    rows = quantize.pack(torch.randn(2, 4, 64), "int8").rows
    for wrong in (rows[:, :-1], rows[0], rows.view(torch.int8)):
        with pytest.raises(ValueError, match="takes"):
            unpack(wrong, "int8", 4, 64)
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize.pack(torch.randn(1, 2, 60), "int8")
    with pytest.raises(ValueError, match="none of fp16, int8, int4"):
        quantize.pack(torch.randn(1, 2, 64), "int3")


def test_packing_keeps_no_gradient_and_does_not_change_its_input() -> None:
    x = torch.randn(1, 2, 64, requires_grad=True)
    before = x.detach().clone()
    packed = quantize.pack(x, "int8")
    assert not packed.rows.requires_grad and not packed.error.requires_grad
    assert torch.equal(x, before)
