"""The demo world: seeded drawings of coloured shapes on a grid, with captions, questions and answers.

python -m encode.run --dataset demo --encoder demo --workers 2

Five data sets, in the roles that PixMo's have: `demo-captions`, `demo-points` (counting, pointing),
`demo-questions` (colour, shape, place) about single drawings; `demo-dialogues` about several at once;
and `demo-videos` about short films (see `encode.sources.demo_videos`).
What is drawn is in `encode.sources.demo_drawings`. What is asked has one right answer, which nothing in the
question gives away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from cache.store.files import new_file
from cache.store.samples import MediaRef, Message, Sample
from configs import UserError, nearest
from encode.sources import demo_videos
from encode.sources.demo_drawings import NUMBERS, ORDINALS, Exchange, Thing, World, draw, things

LOSS_WEIGHTS = {"caption": 0.5}
"""Of the long answers, which would drown the short ones."""


# ---- what is asked


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
VIDEOS = "demo-videos"
NAMES = (*ASKED, DIALOGUES, VIDEOS)


# ---- the data sets


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """One of NAMES. `samples()` first draws what is not there yet."""

    name: str
    """One of NAMES."""
    folder: Path
    """Where the drawings are."""
    world: World
    """What they show."""

    needs_sizes: ClassVar[bool] = False
    """Nothing here depends on them."""

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

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - what other data sets need
    ) -> Iterator[Sample]:
        """All samples, drawing by drawing."""
        special = {DIALOGUES: self._dialogues, VIDEOS: self._videos}
        yield from special.get(self.name, self._single_images)()

    def _single_images(self) -> Iterator[Sample]:
        ask = ASKED[self.name]
        for number in range(self.world.images):
            media = (self.image(number),)
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
            shown = rng.sample(range(self.world.images), self.world.dialogue_images)
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
                media=tuple(self.image(n) for n in shown),
                task="dialogue",
            )

    def _videos(self) -> Iterator[Sample]:
        for number in range(self.world.videos):
            path = self._file(f"{number:05}.y4m", partial(demo_videos.film, self.world, number))
            media = (MediaRef(source=path, kind="video"),)
            for i, (kind, question, told) in enumerate(demo_videos.asked(self.world, number)):
                yield Sample(
                    id=f"{number:05}-{i}",
                    dataset=self.name,
                    messages=(
                        Message(role="user", content=question),
                        Message(role="assistant", content=told),
                    ),
                    media=media,
                    task=kind,
                )

    def image(self, number: int) -> MediaRef:
        """The file of a drawing, made if it is not there whole."""
        return MediaRef(source=self._file(f"{number:05}.png", partial(draw, self.world, number)))

    def _file(self, name: str, make: Callable[[], bytes]) -> str:
        path = self.folder / name
        if not path.exists():
            with new_file(path, durable=False) as file:
                file.write(make())
        return str(path)
