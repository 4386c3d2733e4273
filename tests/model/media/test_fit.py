"""The encoder's square input: as Hugging Face's processors make it, also of JPEGs decoded at a reduced scale.

square = fit_image(image, 336, "squash", mean=CLIP_MEAN)     # (336, 336, 3) uint8
square = fit.prepare(fit.decode(data))                       # fit = InputFit.of(spec)
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import skimage.data
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPImageProcessorPil,
    LlavaImageProcessor,
    LlavaImageProcessorPil,
)

from model.media.fit import LONGEST_STRIP, SCALES, InputFit, fit_image
from model.media.images import BadMediaError, decode_image, decode_noted
from tests.support.photos import STORED, image_files, saved
from tests.support.video_mutations import mutated

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
FITS = ("squash", "pad", "crop")


def photographs() -> list[Image.Image]:
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return [Image.fromarray(getattr(skimage.data, name)()) for name in names]


SWITCHES = ("do_center_crop", "do_rescale", "do_normalize")
PLAIN = {"size": {"height": 336, "width": 336}, **dict.fromkeys(SWITCHES, False)}
CUT = {**PLAIN, "size": {"shortest_edge": 384}, "crop_size": 336, "do_center_crop": True}


@pytest.mark.parametrize(
    ("fit", "processor", "levels"),
    [
        ("squash", CLIPImageProcessorPil(**PLAIN), 0),
        ("squash", CLIPImageProcessor(**PLAIN), 1),  # torchvision rounds at other steps
        ("crop", CLIPImageProcessorPil(**CUT), 0),
        ("crop", CLIPImageProcessor(**CUT), 1),
        ("pad", LlavaImageProcessorPil(do_pad=True, image_mean=list(CLIP_MEAN), **PLAIN), 0),
        ("pad", LlavaImageProcessor(do_pad=True, image_mean=list(CLIP_MEAN), **PLAIN), 1),
    ],
    ids=[
        "squash-pil",
        "squash-torchvision",
        "crop-pil",
        "crop-torchvision",
        "pad-pil",
        "pad-torchvision",
    ],
)
def test_fits_agree_with_hugging_face(fit: str, processor: object, levels: int) -> None:
    for image in photographs():
        theirs = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
        ours = fit_image(image, 336, fit, CLIP_MEAN, 384).transpose(2, 0, 1)
        difference = np.abs(theirs.astype(int) - ours)
        assert (difference > levels).mean() <= 1e-5 and difference.mean() <= 0.015


def test_pad_fills_with_the_mean_colour_and_crop_takes_the_centre() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255
    padded = fit_image(Image.fromarray(wide), 60, "pad", (0.5, 0.25, 1.0))
    assert (padded[:20] == (127, 63, 255)).all() and (padded[40:] == (127, 63, 255)).all()
    assert np.array_equal(padded[22:38], wide[2:18])
    cropped = fit_image(Image.fromarray(wide), 20, "crop", CLIP_MEAN)
    assert (cropped[:, 2:18] == 255).all()
    with pytest.raises(ValueError, match="fit 'stretch'"):
        fit_image(Image.fromarray(wide), 20, "stretch", CLIP_MEAN)


@pytest.mark.parametrize("fit", ["squash", "pad", "crop"])
@pytest.mark.parametrize("size", [(1, 200_000), (200_000, 1)])
def test_extreme_strips_do_not_take_extreme_memory(fit: str, size: tuple[int, int]) -> None:
    strip = Image.new("RGB", size, (255, 0, 0))
    # A full padded square would be 40 billion pixels.
    square = fit_image(strip, 336, fit, CLIP_MEAN)
    assert square.shape == (336, 336, 3)
    assert (square[168, 168, 0] > square[168, 168, 1]).all()


# ---- decoded at a reduced scale --------------------------------------------------------------------


def reducing(fit: str, size: int = 32, shorter_side: int | None = None) -> InputFit:
    return InputFit(
        size=size, fit=fit, mean=CLIP_MEAN, shorter_side=shorter_side or size, reduces=True
    )


def rocket(width: int, height: int) -> Image.Image:
    """Return a photograph whose corners all differ, of this size."""
    return Image.fromarray(skimage.data.rocket()).resize((width, height), Image.Resampling.BICUBIC)


def difference(fit: InputFit, data: bytes) -> float:
    """Return the mean difference, in 8-bit levels, between inputs of the reduced and of the whole image."""
    decoded = fit.decode(data)
    assert decoded.reduced is not None, "it was not reduced, so nothing was compared"
    whole = fit.prepare(decode_image(data))
    return float(np.abs(fit.prepare(decoded).astype(int) - whole).mean())


@pytest.mark.parametrize(
    ("fit", "sizes"),
    [
        # The shorter side decides: it becomes 336 pixels, or 384 before the cut.
        ("squash", {(1343, 9000): 1, (9000, 1344): 2, (2687, 3000): 2, (2688, 2688): 4}),
        ("crop", {(1535, 9000): 1, (1536, 9000): 2, (3072, 4000): 4, (6144, 6144): 8}),
        # The longer one becomes 336.
        ("pad", {(1343, 1343): 1, (1344, 10): 2, (20, 2688): 4, (5376, 1): 8}),
    ],
)
def test_the_side_that_decides_keeps_twice_its_pixels(
    fit: str, sizes: dict[tuple[int, int], int]
) -> None:
    chosen = reducing(fit, 336, 384 if fit == "crop" else None)
    assert {size: chosen.scale(*size) for size in sizes} == sizes
    assert all(replace(chosen, reduces=False).scale(*size) == 1 for size in sizes)


@given(
    width=st.integers(1, 65_535),
    height=st.integers(1, 65_535),
    size=st.integers(1, 600),
    more=st.integers(0, 200),
    fit=st.sampled_from(FITS),
)
def test_the_scale_is_the_largest_that_is_allowed(
    width: int, height: int, size: int, more: int, fit: str
) -> None:
    wanted = size + (more if fit == "crop" else 0)
    by = reducing(fit, size, wanted).scale(width, height)
    side = max(width, height) if fit == "pad" else min(width, height)
    assert by in (1, *SCALES)
    assert by == 1 or side / by >= 2 * wanted
    is_strip = fit == "crop" and max(width, height) > LONGEST_STRIP * min(width, height)
    assert by == 8 or is_strip or side / (2 * by) < 2 * wanted


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", [key for key in STORED if key <= 8])
def test_what_is_reduced_stays_where_it_is(fit: str, orientation: int) -> None:
    """Neither side is a multiple of 4, and a camera may store the image in any of eight positions."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = np.asarray(rocket(301, 389))
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = saved(stored, "JPEG", exif=exif, quality=95)
    chosen = reducing(fit)
    decoded = chosen.decode(data)
    assert decoded.size == (301, 389) and decoded.image.size == (76, 98)
    assert decoded.reduced is not None and decoded.reduced.by == 4
    right = difference(chosen, data)
    assert right < 0.5
    # Without the box the last quarter of a pixel counts as a whole one, and all others move.
    ceiled = np.asarray(chosen.prepare(decoded.image)).astype(int)
    assert np.abs(ceiled - chosen.prepare(decode_image(data))).mean() > 3 * right


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize("side", [256, 301, 389])
def test_what_has_no_margin_is_not_mixed_with_one(side: int, orientation: int) -> None:
    """The resize looks at pixels around the image; a square has none, whatever its fit."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(rocket(side, side), "JPEG", exif=exif, quality=95)
    squashed, padded, cropped = (
        fit.prepare(fit.decode(data)) for fit in map(reducing, ("squash", "pad", "crop"))
    )
    assert np.array_equal(padded, squashed) and np.array_equal(cropped, squashed)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("by", SCALES)
def test_every_scale_shows_the_whole_image(fit: str, by: int) -> None:
    data = saved(rocket(64 * by + 3, 75 * by + 1), "JPEG", quality=95)
    decoded = reducing(fit).decode(data)
    assert decoded.reduced is not None and decoded.reduced.by == by
    assert difference(reducing(fit), data) < 0.6


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2, "optimize": True}),
        ("RGB", {"restart_marker_rows": 1}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
        ("CMYK", {"progressive": True, "subsampling": 0}),
    ],
    ids=str,
)
def test_every_kind_of_jpeg_is_reduced_to_the_same_picture(
    mode: str, options: dict[str, object]
) -> None:
    data = saved(rocket(301, 389).convert(mode), "JPEG", quality=92, **options)
    for fit in FITS:
        assert difference(reducing(fit), data) < 0.6


def test_a_jpeg_with_several_images_is_reduced_to_its_first() -> None:
    first, other = rocket(301, 389), Image.new("RGB", (301, 389), "red")
    data = saved(first, "MPO", save_all=True, append_images=[other], quality=92)
    assert difference(reducing("squash"), data) < 0.6


def test_other_formats_are_decoded_whole() -> None:
    """The files of every format are small: the encoder's input is smaller still."""
    reduced = set()
    for kind, data in image_files().items():
        fit = reducing("squash", 2)
        decoded = fit.decode(data)
        if decoded.reduced is not None:
            reduced.add(kind)
        else:
            assert decoded.image.tobytes() == decode_image(data).tobytes()
        assert decoded.size == decode_image(data).size
    assert reduced == {"jpeg", "progressive", "cmyk", "mpo"}


def test_a_small_jpeg_and_a_fit_that_does_not_reduce_change_no_pixel() -> None:
    data = saved(rocket(127, 300), "JPEG")
    for fit in (reducing("squash"), replace(reducing("squash", 8), reduces=False)):
        decoded = fit.decode(data)
        assert decoded == replace(decode_noted(data), image=decoded.image)
        assert decoded.reduced is None
        assert decoded.image.tobytes() == decode_image(data).tobytes()


def test_a_jpeg_without_its_end_has_the_note_of_the_whole_one() -> None:
    data = saved(rocket(301, 389), "JPEG", quality=92)
    cut = data[: int(len(data) * 0.95)]
    whole, reduced = decode_noted(cut), reducing("squash").decode(cut)
    assert whole.note is not None and whole.note == reduced.note
    assert reduced.reduced is not None and reduced.size == whole.size
    assert difference(reducing("squash"), cut) < 0.8
    for share in (0.1, 0.5):
        with pytest.raises(BadMediaError, match="the JPEG ends early"):
            reducing("squash").decode(data[: int(len(data) * share)])


@pytest.mark.soak_counted
def test_damaged_jpegs_decode_alike_at_every_scale(soak: Callable[[int, int], int]) -> None:
    """A file is refused for its bytes, not for the scale it is decoded at."""
    options = ({}, {"progressive": True}, {"restart_marker_rows": 1})
    files = [saved(rocket(90, 70), "JPEG", **one) for one in options]
    files.append(saved(rocket(90, 70).convert("CMYK"), "JPEG"))
    outcomes = {"image": 0, "bad": 0}
    for number in range(soak(200, 5000)):
        data = mutated(number, files)
        try:
            expected = decode_noted(data)
        except BadMediaError:
            outcomes["bad"] += 1
            with pytest.raises(BadMediaError):
                reducing("squash", 8).decode(data)
        else:
            outcomes["image"] += 1
            decoded = reducing("squash", 8).decode(data)
            assert (decoded.size, decoded.note) == (expected.size, expected.note)
            assert reducing("squash", 8).prepare(decoded).shape == (8, 8, 3)
    assert min(outcomes.values()) > 30  # both outcomes occurred


def test_a_long_strip_is_reduced_for_pad_only() -> None:
    out = io.BytesIO()
    rocket(4003, 41).save(out, "JPEG", quality=92)
    assert difference(reducing("pad"), out.getvalue()) < 0.6
    for fit in ("squash", "crop"):
        assert reducing(fit).decode(out.getvalue()).reduced is None


def test_a_fit_can_be_sent_to_another_process() -> None:
    fit = reducing("crop", 32, 40)
    data = saved(rocket(401, 402), "JPEG")
    again = pickle.loads(pickle.dumps(fit))
    assert again == fit
    assert np.array_equal(again.prepare(again.decode(data)), fit.prepare(fit.decode(data)))
