"""Compiled loops resize to Pillow's pixels, whatever is resized; where they do not, Pillow does.

pixels = compiled_resize.resize(rgb, (336, 336), canvas=Canvas.square(rgb, grey))
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model.media import compiled_resize
from model.media import fit as fit_module
from model.media.compiled_resize import Canvas, resize
from model.media.fit import InputFit, fit_image
from model.media.images import decode_noted
from tests.support.photos import saved

Pixels = npt.NDArray[np.uint8]

MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture
def no_loops_yet() -> Iterator[None]:
    fit_module._loops.cache_clear()
    yield
    fit_module._loops.cache_clear()


@st.composite
def pictures(draw: st.DrawFn, longest: int = 150) -> Pixels:
    """Noise, plain areas, and extreme values side by side, which bicubic takes beyond 0 and 255."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    width, height = draw(st.tuples(st.integers(1, longest), st.integers(1, longest)))
    kind = draw(st.sampled_from(["noise", "extremes", "plain"]))
    if kind == "plain":
        return np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    return pixels if kind == "noise" else (pixels // 128 * 255).astype(np.uint8)


def by_pillow(pixels: Pixels, size: tuple[int, int], box: Any = None) -> Pixels:
    """Resize rows first, which Pillow 13 does not always do by itself."""
    left, top, right, bottom = box or (0, 0, *pixels.shape[1::-1])
    image, height = Image.fromarray(pixels), len(pixels)
    rows = image.resize((size[0], height), Image.Resampling.BICUBIC, (left, 0, right, height))
    columns = 0, top, size[0], bottom
    return np.asarray(rows.resize(size, Image.Resampling.BICUBIC, columns))


sizes = st.tuples(st.integers(1, 90), st.integers(1, 90))


@settings(max_examples=300)
@given(pixels=pictures(), size=sizes)
def test_any_size_becomes_any_size(pixels: Pixels, size: tuple[int, int]) -> None:
    np.testing.assert_array_equal(resize(pixels, size), by_pillow(pixels, size))


@settings(max_examples=200)
@given(pixels=pictures(), size=sizes, draw=st.data())
def test_a_part_is_resized(pixels: Pixels, size: tuple[int, int], draw: st.DataObject) -> None:
    height, width = pixels.shape[:2]

    def ends(length: int) -> tuple[float, float]:
        start = draw.draw(st.floats(0, length - 0.5))
        return start, draw.draw(st.floats(start + 0.25, length))

    (left, right), (top, bottom) = ends(width), ends(height)
    box = left, top, right, bottom
    np.testing.assert_array_equal(resize(pixels, size, box), by_pillow(pixels, size, box))


@settings(max_examples=200)
@given(pixels=pictures(), size=sizes, colour=st.tuples(*[st.integers(0, 255)] * 3))
def test_an_image_on_a_square(
    pixels: Pixels, size: tuple[int, int], colour: tuple[int, int, int]
) -> None:
    canvas = Canvas.square(pixels, colour)
    square = Image.new("RGB", (canvas.width, canvas.height), colour)
    square.paste(Image.fromarray(pixels), (canvas.left, canvas.top))
    np.testing.assert_array_equal(
        resize(pixels, size, canvas=canvas), by_pillow(np.asarray(square), size)
    )


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2000, 3), (768, 1024), (17, 16)])
def test_strips_and_photographs(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    for size in ((336, 336), (378, 24), (1, 1)):
        np.testing.assert_array_equal(resize(pixels, size), by_pillow(pixels, size))


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("by", [1, 2, 4])
@settings(max_examples=40, deadline=None)
@given(pixels=pictures(longest=400))
def test_every_fit_of_whole_and_of_reduced_images(fit: str, by: int, pixels: Pixels) -> None:
    decoded = decode_noted(saved(Image.fromarray(pixels), "JPEG"), lambda *_: by)
    for size, shorter in ((32, 32), (56, 64)):
        same = InputFit(size=size, fit=fit, mean=MEAN, shorter_side=shorter)
        np.testing.assert_array_equal(
            replace(same, compiled=True).prepare(decoded), same.prepare(decoded)
        )


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("more", [0, 1])
def test_long_images(fit: str, more: int) -> None:
    length = fit_module.MOST_COMPILED + more
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (2, length, 3), np.uint8))
    for one in (image, image.transpose(Image.Transpose.ROTATE_90)):
        np.testing.assert_array_equal(
            fit_image(one, 28, fit, MEAN, compiled=True), fit_image(one, 28, fit, MEAN)
        )


def test_large_images_become_arrays_strip_by_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 91, 3), np.uint8))
    whole = fit_image(image, 28, "pad", MEAN, compiled=True)
    assert fit_module._pixels(image).shape == (57, 91, 4), "without a copy"
    monkeypatch.setattr("pyarrow.array", Mock(side_effect=ValueError("in several pieces")))
    assert fit_module._pixels(image).shape == (57, 91, 3)
    np.testing.assert_array_equal(fit_image(image, 28, "pad", MEAN, compiled=True), whole)
    monkeypatch.setattr(fit_module, "WHOLE_PIXELS", 0)
    for pixels in (1, 91, 1000, 1 << 20):
        monkeypatch.setattr(fit_module, "STRIP_PIXELS", pixels)
        np.testing.assert_array_equal(fit_image(image, 28, "pad", MEAN, compiled=True), whole)


def test_the_loops_are_what_resizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image that is not too long, by compiled fits alone."""
    assert fit_module._loops() is compiled_resize, "numba works here"
    wrong = np.zeros((28, 28, 3), np.uint8)
    monkeypatch.setattr(compiled_resize, "resize", lambda *_, **__: wrong)
    white = Image.new("RGB", (40, 30), "white")
    strip = Image.new("RGB", (fit_module.MOST_COMPILED + 1, 1), "white")
    for fit in ("squash", "pad"):
        assert not fit_image(white, 28, fit, MEAN, compiled=True).any()
        assert fit_image(white, 28, fit, MEAN).any()
    assert fit_image(strip, 28, "squash", MEAN, compiled=True).any()


@pytest.mark.usefixtures("no_loops_yet")
@pytest.mark.parametrize(
    ("loops", "says"),
    [
        (Mock(return_value=np.zeros((31, 29, 3), np.uint8)), "they give other pixels"),
        (Mock(side_effect=RuntimeError("no such\nprocessor")), "no such processor"),
    ],
)
def test_pillow_resizes_where_the_loops_do_not_work(
    loops: Mock, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled_resize, "resize", loops)
    white = Image.new("RGB", (40, 30), "white")
    with caplog.at_level(logging.WARNING):
        fit = InputFit(size=28, fit="squash", mean=MEAN, shorter_side=28, compiled=True)
        fit.compile()
        assert (fit.prepare(white) == 255).all()
    [warning] = caplog.messages
    assert says in warning and "rm -f " in warning and "compiled_resize" in warning


@pytest.mark.usefixtures("no_loops_yet")
def test_pillow_resizes_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model.media.compiled_resize", None)
    monkeypatch.delattr("model.media.compiled_resize")
    white = Image.new("RGB", (40, 30), "white")
    assert (fit_image(white, 28, "squash", MEAN, compiled=True) == 255).all()
