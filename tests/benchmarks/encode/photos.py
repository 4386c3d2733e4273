"""Real photographs as JPEG files of mixed sizes: those of scikit-image and scikit-learn, cut and scaled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import skimage.data
import sklearn.datasets
from PIL import Image

NAMES = (
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
    "china.jpg",
    "flower.jpg",
)
SMALLEST, LARGEST = 400, 2000
"""Pixels of the longer side."""
QUALITY = (75, 95)
"""JPEG's quality, from and to."""


def make_photos(folder: Path, count: int, *, largest: int = LARGEST) -> list[Path]:
    """Write `count` different photographs; return their paths.

    Sizes are spread evenly between SMALLEST and `largest`, in an order that mixes them, so that every part of
    the list costs about as much to decode.
    """
    folder.mkdir(parents=True, exist_ok=True)
    originals = [_original(name) for name in NAMES]
    rng = np.random.default_rng(0)
    sides = np.linspace(min(SMALLEST, largest), largest, count).astype(int)
    order = np.argsort([_mixed(number) for number in range(count)])
    paths = []
    for number, side in enumerate(sides[order]):
        image = originals[number % len(originals)]
        keep = rng.uniform(0.7, 1.0)
        width, height = (max(1, int(length * keep)) for length in image.size)
        left, top = (
            int(rng.uniform(0, a - b + 1)) for a, b in zip(image.size, (width, height), strict=True)
        )
        cut = image.crop((left, top, left + width, top + height))
        scale = side / max(cut.size)
        cut = cut.resize(
            [max(1, round(length * scale)) for length in cut.size], Image.Resampling.BICUBIC
        )
        paths.append(folder / f"{number:05d}.jpg")
        cut.save(paths[-1], quality=int(rng.integers(*QUALITY)))
    return paths


def make_small_files(folder: Path, photo: Path, count: int) -> list[Path]:
    """Write `count` files of one photograph that differ in a comment of eight bytes; return their paths."""
    folder.mkdir(parents=True)
    data = photo.read_bytes()
    paths = [folder / f"{number:05d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        comment = b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big")
        path.write_bytes(data[:2] + comment + data[2:])
    return paths


def _mixed(number: int) -> float:
    """Return a position in [0, 1) such that every run of numbers is spread over it."""
    return number * 0.6180339887498949 % 1.0


def _original(name: str) -> Image.Image:
    path = Path(skimage.data.__file__).parent / name
    if not path.exists():
        path = Path(sklearn.datasets.__file__).parent / "images" / name
    with Image.open(path) as image:
        return image.convert("RGB")
