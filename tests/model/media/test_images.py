"""Images: every supported format decodes to the right pixels, anything else raises BadMediaError.

image = decode_image(data)                                   # upright RGB, or BadMediaError
"""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFile

from model.media import kinds
from model.media.fit import fit_image
from model.media.images import FORMATS, MAX_PIXELS, BadMediaError, decode_image, image_size
from tests.support.photos import (
    GRADIENT,
    STORED,
    heic_file,
    image_files,
    png_chunk,
    png_file,
    saved,
)
from tests.support.video_mutations import mutated
from tests.support.videos import BIKES, psnr

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def reason(data: bytes) -> str:
    with pytest.raises(BadMediaError) as caught:
        decode_image(data)
    assert caught.value.stage == "decode"
    assert str(caught.value) == caught.value.reason
    assert "\n" not in caught.value.reason and len(caught.value.reason) <= 200
    return caught.value.reason


FILES = image_files()
HEIC = heic_file(Image.fromarray(GRADIENT))


def test_the_files_cover_every_supported_format() -> None:
    found = {Image.open(io.BytesIO(data)).format for data in FILES.values()}
    assert found == {*FORMATS, "MPO"}  # MPO: a JPEG until PIL finds its second image


@pytest.mark.parametrize("kind", FILES)
def test_intact_images_of_every_kind_are_decoded(kind: str) -> None:
    assert pixels(FILES[kind]).shape in {(16, 24, 3), (24, 16, 3)}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("PPM", {}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object]) -> None:
    assert np.array_equal(pixels(saved(Image.fromarray(GRADIENT), kind, **options)), GRADIENT)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_images_are_turned_upright(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](GRADIENT)))
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    upright = pixels(saved(stored, kind, exif=exif, **options.get(kind, {})))
    assert upright.shape == GRADIENT.shape
    assert np.abs(upright.astype(int) - GRADIENT).max() <= (4 if kind == "JPEG" else 0)


def test_damaged_exif_does_not_fail_an_image() -> None:
    turned = Image.Exif()
    turned[0x0112], turned[0x010F] = 6, "a camera whose name is long"
    block = bytearray(turned.tobytes())
    name = block.index(b"\x01\x0f\x00\x02")
    block[name + 4 : name + 8] = b"\x7f\xff\xff\xff"  # a name of two billion letters
    original = Image.fromarray(GRADIENT)
    with_damage = saved(original, "JPEG", exif=bytes(block))
    with pytest.warns(UserWarning, match="Tag"), Image.open(io.BytesIO(with_damage)) as image:
        image.getexif()
    assert np.array_equal(pixels(with_damage), pixels(saved(original, "JPEG", exif=turned)))
    for garbage in (b"", b"MM\0", b"garbage without any structure", block[6:20]):
        with_garbage = saved(original, "JPEG", exif=b"Exif\0\0" + garbage)
        assert np.array_equal(pixels(with_garbage), pixels(saved(original, "JPEG")))


def test_transparent_pixels_are_drawn_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (100, 0, 200, 255))
    half.putpixel((1, 0), (100, 0, 200, 128))
    solid, mixed = pixels(saved(half, "PNG"))[0]
    assert tuple(solid) == (100, 0, 200)
    assert np.abs(mixed.astype(int) - (177, 127, 227)).max() <= 1
    for mode, clear in {"LA": (7, 0), "RGBA": (1, 2, 3, 0)}.items():
        assert (pixels(saved(Image.new(mode, (3, 2), clear), "PNG")) == 255).all()


def test_transparent_colours_of_palette_grey_and_rgb_are_white() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    row = pixels(saved(palette, "PNG", transparency=bytes([0, 255, 255])))[0]
    assert row.tolist() == [[255] * 3, [40, 50, 60], [70, 80, 90]]
    row = pixels(saved(palette, "GIF", transparency=1))[0]
    assert row.tolist() == [[10, 20, 30], [255] * 3, [70, 80, 90]]
    grey = Image.fromarray(np.array([[5, 6]], np.uint8))
    assert pixels(saved(grey, "PNG", transparency=6))[0].tolist() == [[5] * 3, [255] * 3]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(saved(rgb, "PNG", transparency=(1, 2, 3)))[0].tolist() == [[255] * 3, [4, 5, 6]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    seen = pixels(saved(Image.fromarray(grey), kind))
    assert np.abs(seen - grey[..., None] / 257.0).max() <= 0.501
    assert seen.min() == 0 and seen.max() == 255


def test_pixels_without_a_defined_white_are_refused() -> None:
    assert "floating-point" in reason(saved(Image.new("F", (4, 4), 0.5), "TIFF"))
    assert "white" in reason(saved(Image.new("I", (4, 4), 1_000_000), "TIFF"))
    assert "white" in reason(saved(Image.new("I", (4, 4), -1), "TIFF"))


def without_adobe_marker(jpeg: bytes) -> bytes:
    start = jpeg.index(b"\xff\xee")
    (length,) = struct.unpack(">H", jpeg[start + 2 : start + 4])
    assert jpeg[start + 4 : start + 9] == b"Adobe"
    return jpeg[:start] + jpeg[start + 2 + length :]


def test_cmyk_keeps_its_colours_in_either_polarity() -> None:
    rgb = Image.new("RGB", (32, 32), (220, 40, 90))
    jpeg = saved(rgb.convert("CMYK"), "JPEG", quality=95)
    for data in (jpeg, without_adobe_marker(jpeg), saved(rgb.convert("CMYK"), "TIFF")):
        assert np.abs(pixels(data).astype(int) - (220, 40, 90)).max() <= 4


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_images_is_used(kind: str) -> None:
    red, blue = Image.new("RGB", (8, 6), "red"), Image.new("RGB", (8, 6), "blue")
    data = saved(red, kind, save_all=True, append_images=[blue])
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.abs(pixels(data).astype(int) - (255, 0, 0)).max() <= 5


def test_damage_behind_the_first_image_does_not_matter() -> None:
    """PIL warns about both files; the warning must not make an intact image fail."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    several = saved(noise, "MPO", save_all=True, append_images=[noise])
    assert np.array_equal(pixels(several[: several.index(b"\xff\xd8\xff", 3)]), pixels(several))
    index = several.index(b"MPF\0") + 4
    broken = several[:index] + b"garbage!" + several[index + 8 :]
    with pytest.warns(UserWarning, match="malformed MPO"):
        Image.open(io.BytesIO(broken)).close()
    assert np.array_equal(pixels(broken), pixels(several))

    whole = saved(noise, "PNG", save_all=True, append_images=[noise])
    control = whole.index(b"acTL")
    broken = whole[: control - 4] + png_chunk(b"acTL", bytes(8)) + whole[control + 16 :]
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(broken)).close()
    assert np.array_equal(pixels(broken), np.asarray(noise))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_one_pixel_is_an_image(kind: str) -> None:
    data = saved(Image.new("RGB", (1, 1), "white"), kind)
    assert pixels(data).shape == (1, 1, 3)
    for fit in ("squash", "pad", "crop"):
        assert (fit_image(decode_image(data), 28, fit, CLIP_MEAN) == 255).all()


@pytest.mark.parametrize("kind", FILES)
def test_truncated_files_fail_even_if_another_library_allows_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = FILES[kind]
    if kind in ("progressive", "jpeg", "png", "webp"):
        name = "JPEG" if kind == "progressive" else kind.upper()
        whole = saved(noise, name, progressive=kind == "progressive")
    first_only = {"mpo": 0.3, "apng": 0.4, "webp-moving": 0.3, "gif": 0.3}
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    reason(whole[: int(len(whole) * first_only.get(kind, 0.6))])


def reason_and_memory(data: bytes) -> tuple[str, int]:
    """Return why an image is refused, and the peak bytes that took."""
    tracemalloc.start()
    try:
        return reason(data), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS], ids=["lifted", "pil's"])
@pytest.mark.parametrize(
    "size", [(MAX_PIXELS + 1, 1), (9460, 9460), (14000, 14000), (60000, 60000)]
)
def test_images_beyond_the_limit_are_refused_from_their_header(
    size: tuple[int, int], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    found, memory = reason_and_memory(png_file(*size, bytes(4)))
    assert str(MAX_PIXELS) in found and memory < 2e6


def test_the_reason_names_what_is_not_an_image() -> None:
    assert reason(b"") == "empty file"
    assert reason(b"  <!DOCTYPE html><html>404</html>") == "an HTML page, not an image"
    assert "SVG" in reason(b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    assert reason(b"Not Found") == "a text, not an image"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n").startswith("a PostScript document, not an image")
    assert reason(bytes(100)).startswith("no readable image in a known format (JPEG")
    assert reason(b"\xff\xd8\xff\xe0" + bytes(99)) == "a JPEG image with a damaged header"
    listed = "video, not an image; list it as a video in the data set"
    assert reason(BIKES.read_bytes()) == f"an MP4 {listed}"


def test_a_camera_raw_is_refused_although_pil_opens_its_preview() -> None:
    tiff = bytearray(FILES["tiff"])
    first = int.from_bytes(tiff[4:8], "little")
    # The last tag becomes DNG's version: the image that PIL finds may be a thumbnail.
    count = int.from_bytes(tiff[first : first + 2], "little")
    last = first + 2 + 12 * (count - 1)
    tiff[last : last + 12] = struct.pack("<HHII", 50706, 1, 4, 0x00000401)
    Image.open(io.BytesIO(tiff)).load()
    found = "a camera raw image, which is not supported; convert it to PNG or JPEG"
    assert reason(bytes(tiff)) == found


# ---- HEIC


@pytest.mark.parametrize("orientation", range(1, 9))
def test_heic_is_decoded_upright(orientation: int) -> None:
    """The encoder stores EXIF's orientation as a transformation and keeps EXIF, as telephones do."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](GRADIENT)))
    data = heic_file(stored, quality=-1, chroma=444, exif=exif.tobytes())
    seen = pixels(data)
    assert seen.shape == GRADIENT.shape == (*image_size(data)[::-1], 3)
    assert np.abs(seen.astype(int) - GRADIENT).max() <= 2


def test_heic_of_other_kinds_is_decoded() -> None:
    photo = Image.fromarray(skimage.data.astronaut())
    seen = pixels(heic_file(photo, quality=90))
    assert psnr(seen, np.asarray(photo)) > 33
    clear = photo.convert("RGBA")
    clear.putalpha(0)
    assert pixels(heic_file(clear)).min() >= 254
    grey = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    seen = pixels(heic_file(Image.fromarray(grey), quality=-1))
    assert np.abs(seen - grey[..., None] / 257.0).max() <= 1
    first, second = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (64, 64), "blue")
    seen = pixels(heic_file(first, more=[second]))
    assert np.abs(seen.astype(int) - (255, 0, 0)).max() <= 8


def test_heic_that_is_damaged_or_too_large_fails_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = heic_file(Image.fromarray(skimage.data.astronaut()))
    for kept in (12, 40, 200):
        assert reason(data[:kept]).startswith("damaged HEIC: ")
    for kept in (len(data) // 2, len(data) - 10):
        assert "Unexpected end of file" in reason(data[:kept])
    place = data.index(b"ispe") + 8  # the size that the header states
    assert "60000 x 60000 pixels, more than" in reason(
        data[:place] + struct.pack(">II", 60000, 60000) + data[place + 8 :]
    )
    assert reason(data[:place] + struct.pack(">II", 8, 8) + data[place + 8 :])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert reason(data[: len(data) // 2])


def test_heic_without_its_reader_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heic_file(Image.new("RGB", (64, 64)))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setattr(kinds, "can_decode_heic", lambda: False)
    advice = "install its reader: pip install 'nanomolmo2[heic]'"
    assert reason(data) == f"an HEIC image, which is not supported; {advice}"


def test_heic_leaves_pil_as_it_was() -> None:
    code = (
        "import io, sys; from PIL import Image; from model.media.images import decode_image;"
        "decode_image(sys.stdin.buffer.read()); print('HEIF' in Image.OPEN, '.heic' in Image.EXTENSION)"
    )
    data = heic_file(Image.new("RGB", (64, 64)))
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout.split() == [b"False", b"False"]


@pytest.mark.soak_counted
def test_mutated_files_decode_or_raise_bad_media(soak: Callable[[int, int], int]) -> None:
    files = [*FILES.values(), HEIC]
    outcomes = {"image": 0, "bad": 0}
    with warnings.catch_warnings():
        # As in production: only filters of model.media.images make errors.
        warnings.simplefilter("default")
        for number in range(soak(60, 3000) * len(files)):
            try:
                image = decode_image(mutated(number, files))
            except BadMediaError as error:
                outcomes["bad"] += 1
                assert error.reason and "\n" not in error.reason
            else:
                outcomes["image"] += 1
                assert image.mode == "RGB" and image.width * image.height <= MAX_PIXELS
                assert fit_image(image, 14, "pad", CLIP_MEAN).shape == (14, 14, 3)
    assert min(outcomes.values()) > 100  # both outcomes occurred


def test_threads_decode_equal_pixels() -> None:
    files = [*FILES.values(), HEIC]
    jobs = [*files, *(mutated(number, files) for number in range(len(files)))] * 8

    def outcome(data: bytes) -> object:
        try:
            return pixels(data).tobytes()
        except BadMediaError as error:
            return error.reason

    alone = [outcome(data) for data in jobs]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, jobs)) == alone
