"""What `encode.run --decode reduced` changes in the features of a real tower, beside what int8 changes.

One photograph here, of 1,411 pixels, is large enough to be reduced. Others of their own size are put beside
each other, which keeps the detail that photographs have; those that are enlarged have less of it.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from cache.format import codec
from model.media.fit import InputFit
from tests.benchmarks.bench import Requirements
from tests.benchmarks.codecs import activations

TILE = (400, 300)
"""Width and height of a photograph in a mosaic, pixels."""
TILES = {3: 4, 6: 3, 12: 2}
"""Photographs along a side of a mosaic -> mosaics: at 1/2, 1/4 and 1/8 of their size."""
ENLARGED, COUNT = 3000, 6
"""Longer side of enlarged photographs, pixels, and how many."""
QUALITY = 90
LIMIT = 0.03
"""Error of features, at most: half of int4's."""


def measure_reduced(requirements: Requirements) -> None:
    """Print the errors of reduced decoding and of codecs on the same images."""
    photos = activations.photographs()
    cases = {"1,411 pixels": [photo for photo in photos if min(photo.size) >= 1411]}
    cases |= {f"{n} x {n} photographs": _mosaics(photos, n, count) for n, count in TILES.items()}
    cases[f"enlarged to {ENLARGED:,}"] = [_enlarged(photo) for photo in photos[:COUNT]]
    side = activations.VISION_SIDE
    red, green, blue = map(float, activations.MEAN)
    mean = (red, green, blue)
    fit = InputFit(size=side, fit="squash", mean=mean, shorter_side=side, reduces=True)
    tower = activations.vision_tower()
    for name, images in cases.items():
        rows = [errors(fit, tower, _jpeg(image)) for image in images]
        by, levels, reduced, int8, int4 = np.mean(rows, axis=0)
        print(
            f"{name}, at 1/{by:.0f}: pixels {levels:.2f} of 255 off; int8's error {int8:.4f}, "
            f"int4's {int4:.4f}"
        )
        requirements.at_most(f"reduced decoding, {name}: error of features", reduced, LIMIT)


def errors(
    fit: InputFit, tower: activations.Tower, data: bytes
) -> tuple[float, float, float, float, float]:
    """Return scale, difference of pixels, and the relative errors of reduced decoding, int8 and int4."""
    whole = replace(fit, reduces=False)
    decoded = fit.decode(data)
    assert decoded.reduced is not None, "it is too small, so nothing would be measured"
    pixels = whole.prepare(whole.decode(data)), fit.prepare(decoded)
    x, y = (tower(activations.normalised(one))[None] for one in pixels)
    off = np.abs(pixels[0].astype(int) - pixels[1]).mean()
    int8, int4 = (_error(x, _stored(x, name)) for name in ("int8", "int4"))
    return decoded.reduced.by, float(off), _error(x, y), int8, int4


def _error(x: activations.Features, y: activations.Features) -> float:
    return float(np.linalg.norm(y - x) / np.linalg.norm(x))


def _stored(x: activations.Features, name: str) -> activations.Features:
    return codec.unpack(codec.pack(x, name), name, *x.shape[1:]).astype(np.float32)


def _mosaics(photos: Sequence[Image.Image], tiles: int, count: int) -> list[Image.Image]:
    rng, (width, height) = np.random.default_rng(tiles), TILE
    fitting = [p for p in photos if p.width >= width and p.height >= height]
    made = []
    for _ in range(count):
        mosaic = Image.new("RGB", (tiles * width, tiles * height))
        for number in range(tiles * tiles):
            photo = fitting[int(rng.integers(len(fitting)))]
            left = int(rng.integers(photo.width - width + 1))
            top = int(rng.integers(photo.height - height + 1))
            tile = photo.crop((left, top, left + width, top + height))
            mosaic.paste(tile, (number % tiles * width, number // tiles * height))
        made.append(mosaic)
    return made


def _enlarged(photo: Image.Image) -> Image.Image:
    scale = ENLARGED / max(photo.size)
    size = (round(photo.width * scale), round(photo.height * scale))
    return photo.resize(size, Image.Resampling.BICUBIC)


def _jpeg(image: Image.Image) -> bytes:
    image.save(out := io.BytesIO(), "JPEG", quality=QUALITY)
    return out.getvalue()
