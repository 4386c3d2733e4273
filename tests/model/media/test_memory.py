"""The memory that decoding an image takes: estimated from its header, and not exceeded.

decoding_bytes(data)        # from 9 bytes a pixel
"""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model.media import images
from model.media.images import decode_image, decoding_bytes
from tests.support import ROOT

SIDE = 2000
"""Pixels. One copy as RGB takes 16 MB."""

MEASURE = """
import re, sys
from pathlib import Path
from PIL import Image
from model.media.fit import fit_image
from model.media.images import decode_image
Image.init()
compiled = sys.argv.pop() == "compiled"
fit_image(Image.new("RGB", (9, 9)), 8, "pad", (0.5, 0.5, 0.5), compiled=compiled)  # loads the loops
def read(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10
for path in map(Path, sys.argv[1:]):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = read("VmRSS")
    fit_image(decode_image(path.read_bytes()), 32, "pad", (0.5, 0.5, 0.5), compiled=compiled)
    print(read("VmHWM") - before)
"""
"""A process's own peak: `resource.getrusage` also counts the process that started it."""


def png(side: int, *, bits: int, colour: int, interlaced: bool) -> bytes:
    """Return a PNG of zeros, in any of its layouts; colour 3 has a palette with transparency."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [
            (0, 0, 8, 8),
            (4, 0, 8, 8),
            (0, 4, 4, 8),
            (2, 0, 4, 4),
            (0, 2, 2, 4),
            (1, 0, 2, 2),
        ]
        passes += [(0, 1, 1, 2)]
    nbytes = sum(
        -(-(side - y) // dy) * (1 + (-(-(side - x) // dx) * bits * channels + 7) // 8)
        for x, y, dx, dy in passes
    )

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(name + data))
        return struct.pack(">I", len(data)) + name + data + crc

    head = struct.pack(">IIBBBBB", side, side, bits, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    pixels = chunk(b"IDAT", zlib.compress(bytes(nbytes)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + palette + pixels + chunk(b"IEND", b"")


def saved(side: int, mode: str, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (9, 99, 200)).convert(mode).save(file, kind, **options)
    return file.getvalue()


KINDS = {
    "16-bit RGBA, interlaced": lambda side: png(side, bits=16, colour=6, interlaced=True),
    "8-bit RGBA": lambda side: png(side, bits=8, colour=6, interlaced=False),
    "16-bit grey": lambda side: png(side, bits=16, colour=0, interlaced=False),
    "palette": lambda side: png(side, bits=8, colour=3, interlaced=True),
    "progressive JPEG": lambda side: saved(side, "CMYK", "JPEG", progressive=True, subsampling=0),
    "GIF": lambda side: saved(side, "P", "GIF"),
    "TIFF": lambda side: saved(side, "RGB", "TIFF", compression="tiff_lzw"),
    "WebP": lambda side: saved(side, "RGB", "WEBP", lossless=True, method=0, quality=0),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says the peak")
@pytest.mark.parametrize("resize", ["by pillow", "compiled"])
@pytest.mark.parametrize("side", [SIDE, 3000])
def test_decoding_takes_no_more_memory_than_the_header_says(
    side: int, resize: str, tmp_path: Path
) -> None:
    files, bounds = [], {}
    for number, (kind, make) in enumerate(KINDS.items()):
        data = make(side)
        files.append(tmp_path / str(number))
        files[-1].write_bytes(data)
        bounds[kind] = decoding_bytes(data)
        assert bounds[kind] <= side * side * 20 + len(data)
    command = [sys.executable, "-c", MEASURE, *map(str, files), resize]
    # Otherwise glibc keeps the memory of some images for the next ones, which seem to take none.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=env)
    peaks = dict(zip(KINDS, map(int, done.stdout.split()), strict=True))
    for kind, peak in peaks.items():
        assert side * side * 4 < peak < bounds[kind] + (8 << 20), kind


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "I", "RGB"])
def test_pixels_do_not_depend_on_the_strips(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    rgba = Image.fromarray(draw.integers(0, 256, (37, 23, 4), dtype=np.uint8), "RGBA")
    options: dict[str, object] = {}
    if mode in ("I;16", "I"):
        wide = draw.integers(0, 65536, (37, 23)).astype(np.uint16 if mode == "I;16" else np.int32)
        image = Image.fromarray(wide)
    elif mode == "P":
        image, options = rgba.convert("RGB").quantize(64), {"transparency": bytes(range(64))}
    elif mode == "RGB":
        image, options = rgba.convert("RGB"), {"transparency": (1, 2, 3)}
        image.paste((1, 2, 3), (3, 4, 9, 30))
    else:
        image = rgba.convert(mode)
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "I" else "PNG", **options)
    whole = np.asarray(decode_image(file.getvalue()))
    if mode == "RGBA":
        white = Image.new("RGBA", rgba.size, "white")
        assert (whole == np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))).all()
    for pixels in (1, 23, 100, 300):
        monkeypatch.setattr(images, "STRIP_PIXELS", pixels)
        assert (np.asarray(decode_image(file.getvalue())) == whole).all()
