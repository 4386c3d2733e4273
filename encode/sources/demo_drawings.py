"""Draw the images of the demo data sets: seeded shapes on a grid.

Every byte of a drawing's file is a pure function of its number and configs/demo.yaml. The key of an image is
the hash of its bytes, and decides whether the image is held out, so other bytes would give another split.
Therefore shapes are rasterised here and the PNG is not compressed: the output of Pillow and zlib differs
between versions.
"""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

import configs

DRAWING = 1
"""Version of the drawings. Raise it when a change alters the bytes that `draw` returns."""

COLOURS = {
    "red": (214, 40, 40),
    "blue": (40, 80, 220),
    "green": (40, 160, 60),
    "yellow": (240, 200, 30),
    "purple": (140, 50, 180),
    "black": (30, 30, 30),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "centre", "right")
NUMBERS = ("one", "two", "three", "four", "five")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
SIZES = (0.38, 0.46)
"""Smallest and largest radius of a shape, in cells."""
TINT = 12
"""Largest difference of a shape from the colour of its name, in each channel."""
POINT_STEP = 20
"""Coordinates in answers are multiples of this, from 0 to 1000."""

QuestionAnswer = tuple[str, str, str]
"""(task, question, answer)"""

Mask = npt.NDArray[np.bool_]
Grid = npt.NDArray[np.float64]


# ---- shapes


SHAPES: dict[str, Callable[[Grid, Grid], Mask]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 0.86,
    "triangle": lambda x, y: (y <= 0.85) & (y >= 2 * abs(x) * 0.925 - 1),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1),
    "ring": lambda x, y: (x * x + y * y <= 1) & (x * x + y * y >= 0.36),
}
"""Name -> which points (x, y) it covers, x and y from -1 to 1, y downwards."""


@dataclass(frozen=True, kw_only=True)
class DemoWorld:
    """What is drawn: the section `world` of configs/demo.yaml."""

    images: int
    """Number of drawings, held-out ones included."""
    seed: int = 0
    """Seed of all drawings, videos and questions."""
    side: int = 96
    """Side of a drawing or video in pixels."""
    per_task: int = 2
    """Largest number of questions of each task about one drawing."""
    dialogues: int = 400
    """Number of conversations about several drawings."""
    dialogue_images: int = 4
    """Number of drawings in each conversation."""
    videos: int = 1500
    """Number of videos, held-out ones included."""
    video_frames: int = 4
    """Number of frames of each video, two per second."""

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("images", "per_task", "dialogues", "videos"), (1, 1 << 30))
        ranges |= {"side": (24, 256), "video_frames": (2, 16)}
        ranges["dialogue_images"] = (2, min(len(ORDINALS), self.images))
        for name, (least, most) in ranges.items():
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} is not between {least} and {most}")

    @staticmethod
    def load() -> DemoWorld:
        """Return the world of configs/demo.yaml."""
        return configs.build(DemoWorld, configs.load("demo")["world"], "configs/demo.yaml: world")

    @property
    def id8(self) -> str:
        """Hash of the settings that change files; it names their folder."""
        drawn = {name: getattr(self, name) for name in ("seed", "side", "video_frames")}
        drawn["drawing"] = DRAWING
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class DrawnShape:
    """One shape in a drawing."""

    colour: str
    shape: str
    cell: int
    """Number of its cell, counted row by row."""
    x: float
    """Centre, as a share of the drawing's width from the left."""
    y: float
    """Centre, as a share of the drawing's height from the top."""
    radius: float
    """Radius as a share of the drawing's width."""
    rgb: tuple[int, int, int]
    """Its colour, close to the named one."""

    @property
    def name(self) -> str:
        """Its name in questions."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """Name of its cell in answers."""
        row, column = divmod(self.cell, len(COLUMNS))
        return f"{ROWS[row]} {COLUMNS[column]}"

    @property
    def points(self) -> str:
        """Answer to a pointing question: Molmo2's html-v2, coordinates from 0 to 1000."""
        x, y = (POINT_STEP * round(1000 * at / POINT_STEP) for at in (self.x, self.y))
        return f'<points coords="1 1 {x} {y}">{self.name}</points>'


def shapes_in(world: DemoWorld, number: int) -> tuple[DrawnShape, ...]:
    """Return the one to five shapes of a drawing, row by row."""
    rng = random.Random(f"{world.seed} things {number}")  # noqa: S311
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), rng.randint(1, len(NUMBERS))))
    return tuple(random_shape(rng, cell) for cell in cells)


def random_shape(rng: random.Random, cell: int) -> DrawnShape:
    """Return a random shape in a cell."""
    row, column = divmod(cell, len(COLUMNS))
    colour = rng.choice(list(COLOURS))
    radius = rng.uniform(*SIZES)
    slack = 0.5 - radius  # the shape stays inside its cell
    return DrawnShape(
        colour=colour,
        shape=rng.choice(list(SHAPES)),
        cell=cell,
        x=(column + 0.5 + rng.uniform(-slack, slack)) / len(COLUMNS),
        y=(row + 0.5 + rng.uniform(-slack, slack)) / len(ROWS),
        radius=radius / len(COLUMNS),
        rgb=_tint(rng, COLOURS[colour]),
    )


def _tint(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-TINT, TINT))) for c in rgb)
    return red, green, blue


# ---- drawings


def draw(world: DemoWorld, number: int) -> bytes:
    """Return the PNG file of a drawing."""
    return png(*rasterise(world, shapes_in(world, number), background(world, number)))


def background(world: DemoWorld, name: int | str) -> tuple[int, int, int]:
    """Return the background colour of a drawing or video."""
    rng = random.Random(f"{world.seed} paper {name}")  # noqa: S311
    return _tint(rng, (243, 243, 243))


def rasterise(
    world: DemoWorld, shapes: Sequence[DrawnShape], background: tuple[int, int, int]
) -> tuple[npt.NDArray[np.uint8], list[tuple[int, int, int]]]:
    """Return (side, side) palette indices, and the palette."""
    palette = [background]
    pixels = np.zeros((world.side, world.side), np.uint8)
    at = (np.arange(world.side) + 0.5) / world.side
    for shape in shapes:
        x, y = np.meshgrid((at - shape.x) / shape.radius, (at - shape.y) / shape.radius)
        pixels[SHAPES[shape.shape](x, y)] = len(palette)
        palette.append(shape.rgb)
    return pixels, palette


def png(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """Return palette indices (height, width) as an uncompressed PNG file."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    parts = range(0, len(rows), 0xFFFF)  # the largest uncompressed block of zlib
    blocks = b"".join(
        struct.pack("<BHH", at == parts[-1], len(part), len(part) ^ 0xFFFF) + part
        for at in parts
        for part in [rows[at : at + 0xFFFF]]
    )
    data = b"\x78\x01" + blocks + struct.pack(">I", zlib.adler32(rows))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": bytes(value for rgb in palette for value in rgb),
        b"IDAT": data,
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks.items()
    )
