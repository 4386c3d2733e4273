"""A cache small enough to train on in seconds, made without an encoder.

Each "picture" is a PNG file of one colour on disk, and its features are that colour's code plus noise: a
language model that looks can name it. Questions: colour (learnable), caption, and a text-only sample.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from cache import codec
from cache.layout import CacheRoot
from cache.spec import FeatureSpec
from cache.tables import MediaRecord, MediaRef, Message, Sample, append_media, write_samples
from cache.writer import ShardWriter, Space

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "white": (240, 240, 240),
}
WIDTH, SIDE = 64, 2


def spec(**changes: object) -> FeatureSpec:
    """Four tokens of 64 values a picture."""
    values = {
        "encoder": "made-up",
        "architecture": "none:colours",
        "weights": "0" * 64,
        "activation": "gelu",
        "blocks": (0,),
        "image_size": 28,
        "patch_size": 14,
        "width": WIDTH,
        "fit": "squash",
        "resize": "none",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "pool_picture": 1,
        "pool_frame": 1,
        "compute_dtype": "float32",
        "batch_size": 1,
        "codec": "fp16",
    }
    return FeatureSpec(**{**values, **changes})  # type: ignore[arg-type]


def png(color: tuple[int, int, int], number: int, side: int = 24) -> bytes:
    """A square of one colour; `number` in its last pixels makes every file another."""
    rows = bytearray()
    for y in range(side):
        row = bytearray(bytes(color) * side)
        if y == side - 1:
            row[-3:] = number.to_bytes(3, "big")
        rows += b"\0" + row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def features(color: str, number: int) -> np.ndarray:
    """(4, 64) float32: the colour's code in every token, and noise of the picture's own."""
    noise = np.random.default_rng(number).normal(size=(SIDE * SIDE, WIDTH)) * 0.3
    code = np.zeros(WIDTH)
    code[list(COLORS).index(color) * 8 : list(COLORS).index(color) * 8 + 8] = 3.0
    return (noise + code).astype(np.float32)


def make(
    folder: Path, pictures: int = 60, *, first: int = 0, dataset: str = "colors", **changes: object
) -> CacheRoot:
    """A cache below `folder` with `pictures` pictures; called again with more, it grows."""
    root = CacheRoot(folder / "cache")
    files = folder / "pictures"
    files.mkdir(parents=True, exist_ok=True)
    space = Space.create(root, spec(**changes), {"library": "none"}, shard_bytes=1 << 16)
    shard = ShardWriter(space, "picture", space.next_shard("picture"))
    records: list[MediaRecord] = []
    for number in range(first, pictures):
        color = list(COLORS)[number % len(COLORS)]
        data = png(COLORS[color], number)
        path = files / f"{number}.png"
        path.write_bytes(data)
        key = hashlib.sha256(data).hexdigest()
        shard.append(key, "full", codec.pack(features(color, number), space.spec.codec))
        records.append(MediaRecord(source=str(path), key=key, bytes=len(data), width=24, height=24))
    shard.commit()
    space.grow("picture")
    append_media(root, records, "test")
    write_samples(root, dataset, samples(files, pictures, dataset))
    return root


def samples(files: Path, pictures: int, dataset: str) -> list[Sample]:
    """A question about the colour and a caption for each picture."""
    result: list[Sample] = []
    for number in range(pictures):
        color = list(COLORS)[number % len(COLORS)]
        media = (MediaRef(source=str(files / f"{number}.png")),)
        asked = {"colour": ("Which colour?", color), "caption": ("Describe.", f"all {color}")}
        for task, (question, answer) in asked.items():
            messages = (
                Message(role="user", content=question),
                Message(role="assistant", content=answer),
            )
            name = f"{number}-{task}"
            result.append(
                Sample(id=name, dataset=dataset, messages=messages, media=media, task=task)
            )
    return result
