"""PNG: what does not change the pixels never makes an image fail.

decode_image(png with a text that expands to 100 MB)      # decodes
"""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from model.media.images import BadMediaError, decode_image, decode_noted
from model.media.png_chunks import SIGNATURE, pixel_chunks
from tests.support.photos import GRADIENT, png_chunk, saved

RGB = Image.fromarray(GRADIENT)
PLAIN = saved(RGB, "PNG")
AT = PLAIN.index(b"IDAT") - 4
BOMB = zlib.compress(b"\0" * 100_000_000, 1)
HUGE = b"k\0" + b"a" * 70_000_000
HARMLESS = {
    "zTXt bomb": [(b"zTXt", b"k\0\0" + BOMB)],
    "iTXt bomb": [(b"iTXt", b"k\0\1\0\0\0" + BOMB)],
    "iCCP bomb": [(b"iCCP", b"k\0\0" + BOMB)],
    "xmp bomb": [(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB)],
    "exif text bomb": [(b"zTXt", b"Raw profile type exif\0\0" + BOMB)],
    "many texts": [(b"tEXt", b"k%d\0" % n + b"a" * 1_000_000) for n in range(70)],
    "huge text": [(b"tEXt", HUGE)],
    "iCCP garbage": [(b"iCCP", b"k\0\0garbage")],
    "iCCP method": [(b"iCCP", b"k\0\7garbage")],
    "iCCP empty": [(b"iCCP", b"")],
    "iCCP name only": [(b"iCCP", b"k")],
    "zTXt method": [(b"zTXt", b"k\0\7abc")],
    "zTXt garbage": [(b"zTXt", b"k\0\0abc")],
    "iTXt garbage": [(b"iTXt", b"\xff\0\1\0\xff\0\xff\0abc")],
    "text that PIL takes for transparency": [(b"tEXt", b"transparency\0\0\0\0")],
    "text that PIL takes for a profile": [(b"tEXt", b"icc_profile\0abc")],
    "short sRGB, gAMA, cHRM, pHYs": [(kind, b"") for kind in (b"sRGB", b"gAMA", b"cHRM", b"pHYs")],
    "broken animation": [(b"acTL", b"\0"), (b"fcTL", b"\0"), (b"fdAT", b"")],
    "unknown": [(b"prVt", b"abc"), (b"prvt", b"\0" * 9)],
    "broken EXIF": [(b"eXIf", b"garbage")],
}


def with_chunks(chunks: list[tuple[bytes, bytes]], *, behind: bool = False) -> bytes:
    at = len(PLAIN) - 12 if behind else AT
    return PLAIN[:at] + b"".join(png_chunk(*chunk) for chunk in chunks) + PLAIN[at:]


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
@pytest.mark.parametrize("name", HARMLESS)
def test_chunks_that_do_not_change_pixels_do_no_harm(name: str, behind: bool) -> None:
    data = with_chunks(HARMLESS[name], behind=behind)
    tracemalloc.start()
    try:
        seen = decode_image(data)
        memory = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(np.asarray(seen), GRADIENT)
    assert memory < 4e6 + 0.1 * len(data)  # neither expanded nor copied


@pytest.mark.parametrize("kind", [b"tEXt", b"iCCP", b"eXIf", b"tIME"])
def test_a_wrong_checksum_of_such_a_chunk_does_no_harm(kind: bytes) -> None:
    chunk = bytearray(png_chunk(kind, b"k\0abc"))
    chunk[-1] ^= 1
    seen = decode_image(PLAIN[:AT] + chunk + PLAIN[AT:])
    assert np.array_equal(np.asarray(seen), GRADIENT)


def test_a_file_that_ends_behind_its_pixels_is_sound() -> None:
    text = png_chunk(b"tEXt", b"k\0" + b"a" * 100)
    for data in (
        PLAIN[:-12],  # no end
        PLAIN[:-5],  # half an end
        PLAIN[:-12] + text[:50],  # a text is cut
        PLAIN[:-12] + b"\0\0",
        PLAIN[:-12] + b"garbage behind the pixels",
        PLAIN + b"garbage behind the end",
    ):
        assert np.array_equal(np.asarray(decode_image(data)), GRADIENT)
        assert decode_noted(data).note is None


def test_pixels_that_are_missing_or_damaged_are_not_sound() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8))
    several = saved(noise, "PNG")
    chunks = [at for at in range(len(several)) if several.startswith(b"IDAT", at)]
    assert len(chunks) > 2
    damaged = bytearray(several)
    damaged[chunks[1] + 100] ^= 1
    for data in (
        several[: chunks[-1] - 4],  # the last chunk of pixels is missing, the others are whole
        several[: chunks[-1] + 99],
        bytes(damaged),
        PLAIN[:AT],
        PLAIN[: AT + 30],
        PLAIN[:AT] + b"\0\0\xff\xfftEXt" + PLAIN[AT:],  # hides the pixels
    ):
        with pytest.raises(BadMediaError):
            decode_image(data)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_orientation_is_found_in_exif_and_in_texts(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {1: GRADIENT, 3: GRADIENT[::-1, ::-1], 6: np.rot90(GRADIENT, -1)}[orientation]
    block = exif.tobytes()
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'
    for chunk in (
        (b"eXIf", block[6:]),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        (b"tEXt", b"Raw profile type exif\0" + text),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode()),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp.encode())),
    ):
        for behind in (False, True):
            data = with_chunks([chunk], behind=behind)
            assert np.array_equal(np.asarray(decode_image(data)), upright), chunk[0]


KINDS = [b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"sRGB", b"gAMA", b"prvt", b"eXIf"]


@given(
    chunks=st.lists(
        st.tuples(st.sampled_from(KINDS), st.binary(max_size=60)),
        max_size=4,
    ),
    behind=st.booleans(),
)  # fmt: skip
def test_any_such_chunks_leave_the_pixels_as_they_are(
    chunks: list[tuple[bytes, bytes]], behind: bool
) -> None:
    # A random block of EXIF could state an orientation; the others cannot.
    seen = np.asarray(decode_image(with_chunks(chunks, behind=behind)))
    assert np.array_equal(seen, GRADIENT)


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_signature_are_handled(rest: bytes) -> None:
    assert pixel_chunks(SIGNATURE + rest).startswith(SIGNATURE)
    assert pixel_chunks(PLAIN[:AT] + rest)


def test_a_sound_file_without_such_chunks_stays_as_it_is() -> None:
    assert pixel_chunks(PLAIN) == PLAIN
    palette = saved(RGB.quantize(8), "PNG", transparency=b"\x00\x80\xff")
    assert pixel_chunks(palette) == palette
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "words")
    RGB.save(file := io.BytesIO(), "PNG", pnginfo=text)
    assert pixel_chunks(file.getvalue()) == PLAIN


def test_many_empty_chunks_take_little_time_and_memory() -> None:
    empty = struct.pack(">I", 0) + b"prvt" + bytes(4)
    data = PLAIN[:AT] + empty * 300_000 + PLAIN[AT:]
    assert np.array_equal(np.asarray(decode_image(data)), GRADIENT)
