"""The demo world's videos: a few shapes stand, one more moves to a neighbouring cell or appears.

Files are YUV4MPEG2 (`.y4m`), uncompressed, written here for the reason that drawings are (see
`encode.sources.demo_drawings`): an encoder's output differs between versions, and other bytes are another
video. Each frame alone shows where shapes are; what moves or appears, and where it was first, is only in
their sequence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from encode.sources.demo_drawings import (
    COLUMNS,
    NUMBERS,
    ROWS,
    Exchange,
    Thing,
    World,
    paint,
    paper,
    place,
)

RATE = 2
"""Frames a second: as many as are taken, so that each is seen."""

STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Rows and columns that something may move by."""

STANDING = (1, 3)
"""Shapes beside the one that something happens to."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What happens in one video."""

    standing: tuple[Thing, ...]
    """Shapes that do nothing."""
    actor: Thing
    """The one that does something, where it is at first."""
    goal: Thing
    """The actor at the end; where it was, if it appears."""
    since: int
    """First frame in which the actor is; 0: it moves."""

    @property
    def shapes(self) -> int:
        """In the last frame."""
        return len(self.standing) + 1


def scene(world: World, number: int) -> Scene:
    """What happens in video `number`."""
    rng = random.Random(f"{world.seed} clip {number}")  # noqa: S311
    cells = range(len(ROWS) * len(COLUMNS))
    start = rng.choice(cells)
    moves = rng.random() < 0.5
    goal = rng.choice(_neighbours(start)) if moves else start
    free = [cell for cell in cells if cell not in (start, goal)]
    standing = [place(rng, cell) for cell in sorted(rng.sample(free, rng.randint(*STANDING)))]
    actor = place(rng, start)
    while any(actor.name == thing.name for thing in standing):
        actor = place(rng, start)
    row, column = divmod(goal, len(COLUMNS))
    at_start = divmod(start, len(COLUMNS))
    return Scene(
        standing=tuple(standing),
        actor=actor,
        goal=replace(
            actor,
            cell=goal,
            x=actor.x + (column - at_start[1]) / len(COLUMNS),
            y=actor.y + (row - at_start[0]) / len(ROWS),
        ),
        since=0 if moves else rng.randrange(1, world.video_frames),
    )


def _neighbours(cell: int) -> list[int]:
    """The cells beside, above and below."""
    row, column = divmod(cell, len(COLUMNS))
    return [
        (row + down) * len(COLUMNS) + column + right
        for down, right in STEPS
        if 0 <= row + down < len(ROWS) and 0 <= column + right < len(COLUMNS)
    ]


def shown(world: World, what: Scene, frame: int) -> tuple[Thing, ...]:
    """The shapes of one frame; the actor moves evenly."""
    if frame < what.since:
        return what.standing
    share = frame / (world.video_frames - 1)
    x = what.actor.x + share * (what.goal.x - what.actor.x)
    y = what.actor.y + share * (what.goal.y - what.actor.y)
    return (*what.standing, replace(what.actor, x=x, y=y))


def film(world: World, number: int) -> bytes:
    """The YUV4MPEG2 file of a video."""
    what, background = scene(world, number), paper(world, f"clip {number}")
    head = f"YUV4MPEG2 W{world.side} H{world.side} F{RATE}:1 Ip A1:1 C444\n".encode()
    images = (paint(world, shown(world, what, i), background) for i in range(world.video_frames))
    return head + b"".join(
        b"FRAME\n" + planes(pixels, palette).tobytes() for pixels, palette in images
    )


def planes(
    pixels: npt.NDArray[np.uint8], palette: Sequence[tuple[int, int, int]]
) -> npt.NDArray[np.uint8]:
    """Palette indices (H, W) -> Y, Cb, Cr (3, H, W): BT.601, limited range, in whole numbers."""
    weights = np.array([[66, 129, 25], [-38, -74, 112], [112, -94, -18]])
    offset = np.array([16, 128, 128])
    colours = (np.array(palette) @ weights.T + 128 >> 8) + offset
    return np.moveaxis(colours.astype(np.uint8)[pixels], -1, 0)


def asked(world: World, number: int) -> list[Exchange]:
    """All questions about a video."""
    what = scene(world, number)
    rng = random.Random(f"{world.seed} clip asked {number}")  # noqa: S311
    moves = what.since == 0
    when, thing = ("start", what.actor) if moves and rng.random() < 0.5 else ("end", what.goal)
    return [
        ("video-count", "How many shapes are there at the end?", NUMBERS[what.shapes - 1]),
        ("video-what", f"What {'moves' if moves else 'appears'}?", what.actor.name),
        ("video-where", f"Where is the {what.actor.name} at the {when}?", thing.place),
    ]
