"""The demo data sets: seeded drawings of coloured shapes on a grid, with captions, questions and answers.

python -m encode.run --dataset demo --encoder demo --workers 2

`demo-captions`, `demo-points` (counting, pointing) and `demo-questions` (colour, shape, place) are about
single drawings, `demo-dialogues` is about several drawings at once, and `demo-videos` about short videos.
Each question has one right answer, which the question itself does not give away.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from cache.format.gate import refuse_links
from cache.store.files import new_file
from cache.store.samples import MediaRef, Message, Sample
from configs import UserError, nearest
from encode.records.account import Account
from encode.sources import demo_videos
from encode.sources.demo_drawings import (
    NUMBERS,
    ORDINALS,
    DemoWorld,
    DrawnShape,
    QuestionAnswer,
    draw,
    shapes_in,
)

LOSS_WEIGHTS = {"caption": 0.5}
"""Task -> weight of its answers in the loss. Long answers would outweigh the short ones."""


# ---- questions


def captions(shapes: Sequence[DrawnShape]) -> list[QuestionAnswer]:
    """Return one caption: every shape and its place, row by row."""
    caption = "; ".join(f"{shape.name} {shape.place}" for shape in shapes)
    return [("caption", "Describe the picture.", caption)]


def points(shapes: Sequence[DrawnShape]) -> list[QuestionAnswer]:
    """Return the number of shapes, and the coordinates of each."""
    return [
        ("count", "How many shapes are there?", NUMBERS[len(shapes) - 1]),
        *(("point", f"Point to the {s.name}.", s.points) for s in _unique(shapes, "name")),
    ]


def questions(shapes: Sequence[DrawnShape]) -> list[QuestionAnswer]:
    """Return questions about the other properties of shapes that one property identifies."""
    return [
        *(("colour", f"What colour is the {s.shape}?", s.colour) for s in _unique(shapes, "shape")),
        *(("shape", f"What is the {s.colour} shape?", s.shape) for s in _unique(shapes, "colour")),
        *(("cell", f"Where is the {s.name}?", s.place) for s in _unique(shapes, "name")),
    ]


def _unique(shapes: Sequence[DrawnShape], attribute: str) -> list[DrawnShape]:
    """Return the shapes whose value of `attribute` no other shape has."""
    times = Counter(getattr(shape, attribute) for shape in shapes)
    return [shape for shape in shapes if times[getattr(shape, attribute)] == 1]


def choose(
    rng: random.Random, candidates: Sequence[QuestionAnswer], most: int
) -> list[QuestionAnswer]:
    """Return at most `most` questions of each task, in random order."""
    taken: Counter[str] = Counter()
    result = []
    for candidate in rng.sample(candidates, len(candidates)):
        taken[candidate[0]] += 1
        if taken[candidate[0]] <= most:
            result.append(candidate)
    return result


def _turns(question: str, answer: str, weight: float = 1.0) -> tuple[Message, Message]:
    reply = Message(role="assistant", content=answer, weight=weight)
    return Message(role="user", content=question), reply


ASKED = {"demo-captions": captions, "demo-points": points, "demo-questions": questions}
DIALOGUES = "demo-dialogues"
VIDEOS = "demo-videos"
NAMES = (*ASKED, DIALOGUES, VIDEOS)


# ---- the data sets


@dataclass(frozen=True, kw_only=True)
class DemoDataset:
    """One of the demo data sets. `samples()` draws the files that are missing."""

    name: str
    """One of NAMES."""
    folder: Path
    """Folder of the drawings."""
    world: DemoWorld
    """What is drawn."""

    needs_sizes: ClassVar[bool] = False
    """No text here depends on the size of an image."""

    @staticmethod
    def open(name: str, features: Path) -> DemoDataset:
        """Return the data set `name`, with its drawings below the feature cache.

        Raises:
            UserError: no such data set.
        """
        if name not in NAMES:
            raise UserError(
                f"configs/datasets.yaml: {name} is none of {', '.join(NAMES)}{nearest(name, NAMES)}"
            )
        world = DemoWorld.load()
        return DemoDataset(name=name, folder=features / "demo" / world.id8, world=world)

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folder of the drawings."""
        return (self.folder,)

    def samples(
        self,
        sizes: Mapping[str, tuple[int, int]] = {},  # noqa: ARG002 - part of the protocol
        account: Account | None = None,  # noqa: ARG002 - nothing is left out here
    ) -> Iterator[Sample]:
        """Yield all samples, drawing by drawing."""
        special = {DIALOGUES: self._dialogues, VIDEOS: self._videos}
        yield from special.get(self.name, self._single_images)()

    def _single_images(self) -> Iterator[Sample]:
        ask = ASKED[self.name]
        for number in range(self.world.images):
            rng = random.Random(f"{self.world.seed} {self.name} {number}")  # noqa: S311
            chosen = choose(rng, ask(shapes_in(self.world, number)), self.world.per_task)
            yield from self._samples_of(number, self.image(number), chosen)

    def _videos(self) -> Iterator[Sample]:
        for number in range(self.world.videos):
            draw = partial(demo_videos.draw_video, self.world, number)
            video = MediaRef(source=self._file(f"{number:05}.y4m", draw), kind="video")
            yield from self._samples_of(number, video, demo_videos.questions(self.world, number))

    def _samples_of(
        self, number: int, media: MediaRef, asked: Sequence[QuestionAnswer]
    ) -> Iterator[Sample]:
        for i, (task, question, answer) in enumerate(asked):
            yield Sample(
                id=f"{number:05}-{i}",
                dataset=self.name,
                messages=_turns(question, answer, LOSS_WEIGHTS.get(task, 1.0)),
                media=(media,),
                task=task,
            )

    def _dialogues(self) -> Iterator[Sample]:
        for number in range(self.world.dialogues):
            rng = random.Random(f"{self.world.seed} {self.name} {number}")  # noqa: S311
            shown = rng.sample(range(self.world.images), self.world.dialogue_images)
            turns: list[Message] = []
            for i in rng.sample(range(len(shown)), len(shown)):
                shapes = shapes_in(self.world, shown[i])
                _, question, answer = rng.choice(questions(shapes) or points(shapes))
                question = f"In the {ORDINALS[i]} picture: {question[0].lower()}{question[1:]}"
                turns += _turns(question, answer)
            yield Sample(
                id=f"{number:05}",
                dataset=self.name,
                messages=tuple(turns),
                media=tuple(self.image(n) for n in shown),
                task="dialogue",
            )

    def image(self, number: int) -> MediaRef:
        """Return the file of a drawing, drawn if it is missing."""
        return MediaRef(source=self._file(f"{number:05}.png", partial(draw, self.world, number)))

    def _file(self, name: str, make: Callable[[], bytes]) -> str:
        path, root = self.folder / name, self.folder.parent.parent
        refuse_links(path, root)
        if not path.exists():
            with new_file(path, root=root, durable=False) as file:
                file.write(make())
            if not (ignored := self.folder / ".gitignore").exists():
                with new_file(ignored, root=root, durable=False) as file:
                    file.write(b"*\n")  # the default cache/ is in a checkout
        return str(path)
