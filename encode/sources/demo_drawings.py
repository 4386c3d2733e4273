"""The demo world's drawings: seeded shapes on a grid, rasterised by plain arithmetic.

A drawing is a pure function of its number and configs/demo.yaml, and so is every byte of its file: shapes
are rasterised here and the PNG is not compressed, since both Pillow's shapes and zlib's output differ
between versions, and other bytes are another image, perhaps held out here and trained on there.
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
"""Version of what `draw` makes: raised when the same numbers would give other bytes."""

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
"""Radius of a shape, in cells."""
TINT = 12
"""A shape's colour is off its name's by at most this, in each channel."""
POINT_STEP = 20
"""Coordinates run from 0 to 1000 and are given to the nearest multiple of this."""

Exchange = tuple[str, str, str]
"""Kind of question, question, answer."""

Mask = npt.NDArray[np.bool_]
Grid = npt.NDArray[np.float64]


# ---- what there is


def _circle(x: Grid, y: Grid) -> Mask:
    return np.asarray(x * x + y * y <= 1)


def _square(x: Grid, y: Grid) -> Mask:
    return np.asarray(np.maximum(abs(x), abs(y)) <= 0.86)


def _triangle(x: Grid, y: Grid) -> Mask:
    return np.asarray((y <= 0.85) & (y >= 2 * abs(x) * 0.925 - 1))


def _cross(x: Grid, y: Grid) -> Mask:
    arms = np.minimum(abs(x), abs(y))
    return np.asarray((arms <= 0.3) & (np.maximum(abs(x), abs(y)) <= 1))


def _ring(x: Grid, y: Grid) -> Mask:
    distance = x * x + y * y
    return np.asarray((distance <= 1) & (distance >= 0.36))


SHAPES: dict[str, Callable[[Grid, Grid], Mask]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "ring": _ring,
}
"""Each covers points (x, y) of the square from -1 to 1, y downwards."""


@dataclass(frozen=True, kw_only=True)
class World:
    """What is drawn: `world` in configs/demo.yaml."""

    images: int
    """Drawings, held-out ones included."""
    seed: int = 0
    """Of everything in them."""
    side: int = 96
    """Side of a drawing, pixels."""
    per_kind: int = 2
    """Questions of each kind about one drawing, at most."""
    dialogues: int = 400
    """Conversations about several drawings."""
    dialogue_images: int = 4
    """Drawings in each."""
    videos: int = 1500
    """Videos, held-out ones included."""
    video_frames: int = 4
    """Frames of each, two a second."""

    def __post_init__(self) -> None:
        for name in ("images", "per_kind", "dialogues", "videos"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 24 <= self.side <= 256:
            raise ValueError(f"side {self.side} is not between 24 and 256 pixels")
        if not 2 <= self.video_frames <= 16:
            raise ValueError(f"video_frames {self.video_frames} is not between 2 and 16")
        if not 2 <= self.dialogue_images <= min(len(ORDINALS), self.images):
            raise ValueError(
                f"dialogue_images {self.dialogue_images} is not between 2 and {len(ORDINALS)}, "
                "or more than there are"
            )

    @staticmethod
    def load() -> World:
        """The world of configs/demo.yaml."""
        return configs.build(World, configs.load("demo")["world"], "configs/demo.yaml: world")

    @property
    def id8(self) -> str:
        """Of what decides the drawings and videos: other ones are other files."""
        drawn = {name: getattr(self, name) for name in ("seed", "side", "video_frames")}
        drawn["drawing"] = DRAWING
        return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape in a drawing."""

    colour: str
    shape: str
    cell: int
    """Number of its cell, row by row."""
    x: float
    """Centre, in drawings' widths from the left."""
    y: float
    """Centre, in drawings' heights from the top."""
    radius: float
    """In drawings' widths."""
    rgb: tuple[int, int, int]
    """Its own tint of the colour."""

    @property
    def name(self) -> str:
        """As questions call it."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """As answers call its cell."""
        row, column = divmod(self.cell, len(COLUMNS))
        return f"{ROWS[row]} {COLUMNS[column]}"

    @property
    def points(self) -> str:
        """As pointing answers it: Molmo2's html-v2, coordinates from 0 to 1000."""
        x, y = (POINT_STEP * round(1000 * at / POINT_STEP) for at in (self.x, self.y))
        return f'<points coords="1 1 {x} {y}">{self.name}</points>'


def things(world: World, number: int) -> tuple[Thing, ...]:
    """The one to five shapes of a drawing, row by row."""
    rng = random.Random(f"{world.seed} things {number}")  # noqa: S311
    cells = sorted(rng.sample(range(len(ROWS) * len(COLUMNS)), rng.randint(1, len(NUMBERS))))
    return tuple(place(rng, cell) for cell in cells)


def place(rng: random.Random, cell: int) -> Thing:
    """Some shape in a cell."""
    row, column = divmod(cell, len(COLUMNS))
    colour = rng.choice(list(COLOURS))
    radius = rng.uniform(*SIZES)
    slack = 0.5 - radius  # a shape stays within its cell
    return Thing(
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


def draw(world: World, number: int) -> bytes:
    """The PNG file of a drawing."""
    return png(*paint(world, things(world, number), paper(world, number)))


def paper(world: World, number: int | str) -> tuple[int, int, int]:
    """The colour of a drawing's background."""
    rng = random.Random(f"{world.seed} paper {number}")  # noqa: S311
    return _tint(rng, (243, 243, 243))


def paint(
    world: World, shown: Sequence[Thing], background: tuple[int, int, int]
) -> tuple[npt.NDArray[np.uint8], list[tuple[int, int, int]]]:
    """(side, side) palette indices, and the palette."""
    palette = [background]
    pixels = np.zeros((world.side, world.side), np.uint8)
    at = (np.arange(world.side) + 0.5) / world.side
    for thing in shown:
        x, y = np.meshgrid((at - thing.x) / thing.radius, (at - thing.y) / thing.radius)
        pixels[SHAPES[thing.shape](x, y)] = len(palette)
        palette.append(thing.rgb)
    return pixels, palette


def png(pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]) -> bytes:
    """A PNG of palette indices (height, width), uncompressed."""
    height, width = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)  # 0: no filter
    parts = range(0, len(rows), 0xFFFF)
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
