"""The demo world: seeded drawings of coloured shapes on a grid, with captions, questions and answers.

python -m encode.run --dataset demo --encoder demo --workers 2

Four data sets, in the roles that PixMo's have: `demo-captions`, `demo-points` (counting, pointing),
`demo-questions` (colour, shape, place) about single drawings; `demo-dialogues` about several at once.
A drawing is a pure function of its number and configs/demo.yaml, and so is every byte of its file:
shapes are rasterised here by plain arithmetic and the PNG is not compressed, since both Pillow's shapes
and zlib's output differ between versions, and other bytes are another picture, perhaps held out here and
trained on there. What is asked has one right answer, which nothing in the question gives away.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import configs
from cache.tables import MediaRef, Message, Sample
from configs import UserError, nearest

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
LOSS_WEIGHTS = {"caption": 0.2, "point": 0.5}
"""Of the long answers, which would drown the short ones."""
POINT_STEP = 20
"""Coordinates run from 0 to 1000 and are given to the nearest multiple of this."""

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

    pictures: int
    """Drawings, held-out ones included."""
    seed: int = 0
    """Of everything in them."""
    side: int = 96
    """Side of a drawing, pixels."""
    per_kind: int = 2
    """Questions of each kind about one drawing, at most."""
    dialogues: int = 400
    """Conversations about several drawings."""
    dialogue_pictures: int = 4
    """Drawings in each."""

    def __post_init__(self) -> None:
        for name in ("pictures", "per_kind", "dialogues"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 24 <= self.side <= 256:
            raise ValueError(f"side {self.side} is not between 24 and 256 pixels")
        if not 2 <= self.dialogue_pictures <= min(len(ORDINALS), self.pictures):
            raise ValueError(
                f"dialogue_pictures {self.dialogue_pictures} is not between 2 and {len(ORDINALS)}, "
                "or more than there are"
            )

    @staticmethod
    def load() -> World:
        """The world of configs/demo.yaml."""
        return configs.build(World, configs.load("demo")["world"], "configs/demo.yaml: world")

    @property
    def id8(self) -> str:
        """Of what decides the drawings: other drawings are other files."""
        drawn = {"drawing": DRAWING, "seed": self.seed, "side": self.side}
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
    result = []
    for cell in cells:
        row, column = divmod(cell, len(COLUMNS))
        colour = rng.choice(list(COLOURS))
        radius = rng.uniform(*SIZES)
        slack = 0.5 - radius  # a shape stays within its cell
        result.append(
            Thing(
                colour=colour,
                shape=rng.choice(list(SHAPES)),
                cell=cell,
                x=(column + 0.5 + rng.uniform(-slack, slack)) / len(COLUMNS),
                y=(row + 0.5 + rng.uniform(-slack, slack)) / len(ROWS),
                radius=radius / len(COLUMNS),
                rgb=_tint(rng, COLOURS[colour]),
            )
        )
    return tuple(result)


def _tint(rng: random.Random, rgb: tuple[int, int, int]) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-TINT, TINT))) for c in rgb)
    return red, green, blue


# ---- drawings


def draw(world: World, number: int) -> bytes:
    """The PNG file of a drawing."""
    rng = random.Random(f"{world.seed} paper {number}")  # noqa: S311
    palette = [_tint(rng, (243, 243, 243))]
    pixels = np.zeros((world.side, world.side), np.uint8)
    at = (np.arange(world.side) + 0.5) / world.side
    for thing in things(world, number):
        x, y = np.meshgrid((at - thing.x) / thing.radius, (at - thing.y) / thing.radius)
        pixels[SHAPES[thing.shape](x, y)] = len(palette)
        palette.append(thing.rgb)
    return png(pixels, palette)


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


# ---- what is asked


Exchange = tuple[str, str, str]
"""Kind of question, question, answer."""


def captions(shown: Sequence[Thing]) -> list[Exchange]:
    """One: every shape and its place, row by row."""
    told = "; ".join(f"{thing.name} {thing.place}" for thing in shown)
    return [("caption", "Describe the picture.", told)]


def points(shown: Sequence[Thing]) -> list[Exchange]:
    """How many, and where exactly."""
    counted: Exchange = ("count", "How many shapes are there?", NUMBERS[len(shown) - 1])
    pointed = [("point", f"Point to the {t.name}.", t.points) for t in _single(shown, "name")]
    return [counted, *pointed]


def questions(shown: Sequence[Thing]) -> list[Exchange]:
    """About shapes that one property singles out: their other ones."""
    return [
        *(("colour", f"What colour is the {t.shape}?", t.colour) for t in _single(shown, "shape")),
        *(("shape", f"What is the {t.colour} shape?", t.shape) for t in _single(shown, "colour")),
        *(("cell", f"Where is the {t.name}?", t.place) for t in _single(shown, "name")),
    ]


def _single(shown: Sequence[Thing], name: str) -> list[Thing]:
    """The shapes that share their `name` with no other."""
    times = Counter(getattr(thing, name) for thing in shown)
    return [thing for thing in shown if times[getattr(thing, name)] == 1]


def some(rng: random.Random, exchanges: Sequence[Exchange], most: int) -> list[Exchange]:
    """At most `most` of each kind, in a random order."""
    taken: Counter[str] = Counter()
    result = []
    for exchange in rng.sample(exchanges, len(exchanges)):
        taken[exchange[0]] += 1
        if taken[exchange[0]] <= most:
            result.append(exchange)
    return result


ASKED = {"demo-captions": captions, "demo-points": points, "demo-questions": questions}
DIALOGUES = "demo-dialogues"
NAMES = (*ASKED, DIALOGUES)


# ---- the data sets


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """One of the four. `samples()` first draws what is not there yet."""

    name: str
    """One of NAMES."""
    folder: Path
    """Where the drawings are."""
    world: World
    """What they show."""

    @staticmethod
    def open(name: str, features: Path) -> DemoDataset:
        """The data set `name`, with its drawings below the feature cache.

        Raises:
            UserError: there is none of this name.
        """
        if name not in NAMES:
            raise UserError(
                f"configs/datasets.yaml: {name} is none of {', '.join(NAMES)}{nearest(name, NAMES)}"
            )
        world = World.load()
        return DemoDataset(name=name, folder=features / "demo" / world.id8, world=world)

    def samples(self) -> Iterator[Sample]:
        """All samples, drawing by drawing."""
        yield from self._dialogues() if self.name == DIALOGUES else self._single_pictures()

    def _single_pictures(self) -> Iterator[Sample]:
        ask = ASKED[self.name]
        for number in range(self.world.pictures):
            media = (self.picture(number),)
            rng = random.Random(f"{self.world.seed} {self.name} {number}")  # noqa: S311
            exchanges = some(rng, ask(things(self.world, number)), self.world.per_kind)
            for i, (kind, question, told) in enumerate(exchanges):
                yield Sample(
                    id=f"{number:05}-{i}",
                    dataset=self.name,
                    messages=(
                        Message(role="user", content=question),
                        Message(role="assistant", content=told, weight=LOSS_WEIGHTS.get(kind, 1.0)),
                    ),
                    media=media,
                    task=kind,
                )

    def _dialogues(self) -> Iterator[Sample]:
        for number in range(self.world.dialogues):
            rng = random.Random(f"{self.world.seed} {self.name} {number}")  # noqa: S311
            shown = rng.sample(range(self.world.pictures), self.world.dialogue_pictures)
            turns: list[Message] = []
            for i in rng.sample(range(len(shown)), len(shown)):
                seen = things(self.world, shown[i])
                _, question, told = rng.choice(questions(seen) or points(seen))
                asked = f"In the {ORDINALS[i]} picture: {question[0].lower()}{question[1:]}"
                turns += [
                    Message(role="user", content=asked),
                    Message(role="assistant", content=told),
                ]
            yield Sample(
                id=f"{number:05}",
                dataset=self.name,
                messages=tuple(turns),
                media=tuple(self.picture(n) for n in shown),
                task="dialogue",
            )

    def picture(self, number: int) -> MediaRef:
        """The file of a drawing, made if it is not there whole."""
        path = self.folder / f"{number:05}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            partial.write_bytes(draw(self.world, number))
            partial.replace(path)
        return MediaRef(source=str(path))
