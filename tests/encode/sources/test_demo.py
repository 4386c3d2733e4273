"""The demo data sets have the same bytes everywhere, and questions with one right answer.

(captions,) = open_datasets(["demo-captions"], Path("cache"))
samples = list(captions.samples())      # draws cache/demo/<id>/00000.png, ...
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import subprocess
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.format.frame_sampling import sample_times
from cache.store.samples import Sample
from configs import UserError
from encode.sources import demo as world
from encode.sources import demo_videos as videos
from encode.sources.catalogue import open_datasets
from encode.sources.demo import DemoDataset
from encode.sources.demo_drawings import (
    SHAPES,
    DemoWorld,
    DrawnShape,
    background,
    draw,
    png,
    rasterise,
    shapes_in,
)
from model.language.model import load_tokenizer
from model.media.video import frames
from model.media.video_index import probe
from train.demo import TYPES

SMALL = DemoWorld(images=200, dialogues=20, videos=40)


def all_samples(tmp_path: Path, name: str) -> list[Sample]:
    return list(DemoDataset(name=name, folder=tmp_path, world=SMALL).samples())


def shown_in(sample: Sample, which: int = 0) -> tuple[DrawnShape, ...]:
    return shapes_in(SMALL, int(Path(sample.media[which].source).stem))


def test_git_ignores_the_drawings(tmp_path: Path) -> None:
    all_samples(tmp_path, "demo-captions")
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    seen = subprocess.run(
        ["git", "-C", tmp_path, "status", "--porcelain"], check=True, capture_output=True, text=True
    )
    assert seen.stdout == "" and len(list(tmp_path.glob("*.png"))) == SMALL.images


# ---- drawings


@pytest.mark.parametrize(
    ("draw_one", "number", "sha256"),
    [
        (draw, 100, "49040e0e1c8c6ada44d692782126987da62766589c5ea76992640aeb8bdfec6d"),
        (videos.draw_video, 20, "60fb83dea7a0aa4eacc16b154dc7d050e7985bed0a0d258627bca1f4edee17a2"),
    ],
)
def test_drawings_and_videos_are_the_same_bytes_on_every_machine(
    draw_one: Callable[[DemoWorld, int], bytes], number: int, sha256: str
) -> None:
    """These bytes decide which images are held out: other bytes would give another split."""
    drawn = b"".join(draw_one(DemoWorld(images=100), n) for n in range(number))
    assert hashlib.sha256(drawn).hexdigest() == sha256


def test_pillow_reads_what_was_drawn() -> None:
    for number in range(20):
        image = Image.open(io.BytesIO(draw(SMALL, number))).convert("RGB")
        assert image.size == (SMALL.side, SMALL.side)
        pixels = np.asarray(image)
        shown = shapes_in(SMALL, number)
        colors = {tuple(c) for c in pixels.reshape(-1, 3).tolist()}
        assert len(colors) == len(shown) + 1
        for thing in shown:
            rows, columns = np.nonzero((pixels == thing.rgb).all(-1))
            centre = np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / SMALL.side
            # The centre of mass of a triangle is below the middle of its height.
            assert np.allclose(centre, [thing.x, thing.y], atol=0.05)
            cells = set((rows * 3 // SMALL.side * 3 + columns * 3 // SMALL.side).tolist())
            assert cells == {thing.cell}


@pytest.mark.parametrize("size", [(1, 1), (96, 96), (300, 300), (255, 257)])
def test_a_png_of_any_size_is_valid(size: tuple[int, int]) -> None:
    """An uncompressed block has at most 65,535 bytes, so larger images need several."""
    palette = [(i, 255 - i, i // 2) for i in range(256)]
    pixels = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    image = Image.open(io.BytesIO(png(pixels, palette)))
    image.load()
    assert np.array_equal(np.asarray(image.convert("RGB")), np.array(palette, np.uint8)[pixels])


def test_shapes_differ_in_more_than_a_few_pixels() -> None:
    at = (np.arange(28) + 0.5) / 14 - 1
    masks = [inside(*np.meshgrid(at, at)) for inside in SHAPES.values()]
    for one, other in itertools.combinations(masks, 2):
        assert (one != other).mean() > 0.1


def test_only_missing_files_are_drawn(tmp_path: Path) -> None:
    before = all_samples(tmp_path, "demo-captions")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    assert len(stamps) == SMALL.images
    lost = tmp_path / "00003.png"
    data = lost.read_bytes()
    lost.unlink()
    assert all_samples(tmp_path, "demo-captions") == before
    assert lost.read_bytes() == data
    del stamps[lost]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_settings_that_change_drawings_change_their_folder() -> None:
    ids = {DemoWorld(images=9, **change).id8 for change in ({}, {"seed": 1}, {"side": 48})}
    assert len(ids) == 3
    assert DemoWorld(images=9, per_task=1).id8 == DemoWorld(images=7).id8


# ---- videos


def test_the_decoder_reads_the_frames_that_were_drawn() -> None:
    """Colours differ by the rounding of 8-bit YUV, and times are half a second apart."""
    for number in range(4):
        data = videos.draw_video(SMALL, number)
        info = probe(data)
        assert (info.frames, info.duration_s) == (SMALL.video_frames, (SMALL.video_frames - 1) / 2)
        what = videos.scene(SMALL, number)
        decoded = list(frames(data, sample_times(info.duration_s, 128), info))
        assert [frame.time_s for frame in decoded] == [i / 2 for i in range(SMALL.video_frames)]
        for i, frame in enumerate(decoded):
            drawn, palette = rasterise(
                SMALL, videos.shapes_at(SMALL, what, i), background(SMALL, f"clip {number}")
            )
            expected = np.array(palette)[drawn]
            assert np.abs(np.asarray(frame.image).astype(int) - expected).max() <= 4


def test_planes_are_bt601_in_limited_range() -> None:
    white, black, red = (
        videos.planes(np.zeros((1, 1), np.uint8), [colour]).ravel().tolist()
        for colour in [(255, 255, 255), (0, 0, 0), (255, 0, 0)]
    )
    assert (white, black) == ([235, 128, 128], [16, 128, 128])
    assert red == [82, 90, 240]


def find_event(number: int) -> dict[str, str]:
    """Return what happens in a video and the answer to every question, from the shapes in its frames."""
    what = videos.scene(SMALL, number)
    shown_all = [videos.shapes_at(SMALL, what, i) for i in range(SMALL.video_frames)]
    first, last = shown_all[0], shown_all[-1]
    found = {"count": ("one", "two", "three", "four", "five")[len(last) - 1]}
    new = [t for t in last if t.name not in {other.name for other in first}]
    if new:
        return {**found, "appears": new[0].name, "end": where(new[0])}
    (pair,) = [(a, b) for a, b in zip(first, last, strict=True) if (a.x, a.y) != (b.x, b.y)]
    return {**found, "moves": pair[0].name, "start": where(pair[0]), "end": where(pair[1])}


def where(thing: DrawnShape) -> str:
    """Return the name of a cell from the centre of a shape."""
    row = ("top", "middle", "bottom")[int(thing.y * 3)]
    return f"{row} {('left', 'centre', 'right')[int(thing.x * 3)]}"


def test_every_question_about_a_video_has_its_right_answer() -> None:
    seen = set()
    for number in range(SMALL.videos):
        truth = find_event(number)
        for kind, question, answer in videos.questions(SMALL, number):
            words = question.rstrip("?").split()
            key = "count" if kind == "video-count" else words[-1]
            assert answer == truth[key], question
            seen.add((kind, key))
            if kind == "video-where":
                assert " ".join(words[3:5]) == truth.get("moves", truth.get("appears"))
        what = videos.scene(SMALL, number)
        cells = [thing.cell for thing in (*what.still, what.actor)]
        assert len(set(cells)) == len(cells)
        assert what.goal.cell not in {thing.cell for thing in what.still}
    assert seen == {
        *(("video-where", "start"), ("video-where", "end"), ("video-count", "count")),
        *(("video-what", "moves"), ("video-what", "appears")),
    }


# ---- questions


def answer_by_search(question: str, shown: tuple[DrawnShape, ...]) -> list[str]:
    """Return every right answer, found without the code that asks."""
    words = question.rstrip("?.").split()

    def fitting(colour: str | None, shape: str | None) -> list[DrawnShape]:
        return [t for t in shown if colour in (None, t.colour) and shape in (None, t.shape)]

    if question.startswith("How many"):
        return [("one", "two", "three", "four", "five")[len(shown) - 1]]
    if question.startswith("What colour"):
        return [t.colour for t in fitting(None, words[-1])]
    if question.startswith("What is"):
        return [t.shape for t in fitting(words[-2], None)]
    found = fitting(words[-2], words[-1])
    if question.startswith("Where"):
        return [where(t) for t in found]
    assert question.startswith("Point to")
    return [t.points for t in found]


@pytest.mark.parametrize("name", ["demo-points", "demo-questions"])
def test_every_question_has_one_right_answer(tmp_path: Path, name: str) -> None:
    samples = all_samples(tmp_path, name)
    assert len(samples) > SMALL.images
    for sample in samples:
        question, answer = (m.content for m in sample.messages)
        assert answer_by_search(question, shown_in(sample)) == [answer]


def test_every_question_of_a_dialogue_has_one_right_answer(tmp_path: Path) -> None:
    for sample in all_samples(tmp_path, "demo-dialogues"):
        assert len(sample.media) == len({m.source for m in sample.media})
        turns = [m.content for m in sample.messages]
        for asked, answer in zip(turns[::2], turns[1::2], strict=True):
            which, question = asked.removeprefix("In the ").split(" picture: ")
            shown = shown_in(sample, ("first", "second", "third", "fourth").index(which))
            assert answer_by_search(question[0].upper() + question[1:], shown) == [answer]


def test_points_are_in_their_cells_and_in_the_scored_format(tmp_path: Path) -> None:
    from train.evaluate.pointing import points_in

    for sample in all_samples(tmp_path, "demo-points"):
        if sample.task == "point":
            name = sample.messages[0].content.removeprefix("Point to the ").removesuffix(".")
            (thing,) = (t for t in shown_in(sample) if t.name == name)
            row, column = divmod(thing.cell, 3)
            ((image, x, y),) = points_in(sample.messages[1].content)
            assert (image, x * 3 // 1000, y * 3 // 1000) == (1, column, row)
            assert math.hypot(x / 1000 - thing.x, y / 1000 - thing.y) < 0.1 < thing.radius


def test_answers_cannot_be_guessed_from_questions(tmp_path: Path) -> None:
    """Without the image, the best answer to a question is its most frequent one."""
    answers: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    large = DemoWorld(images=2000)
    for number in range(large.images):
        shown = shapes_in(large, number)
        for kind, question, answer in [*world.points(shown), *world.questions(shown)]:
            said = next(t.place for t in shown if t.points == answer) if kind == "point" else answer
            answers[kind][question][said] += 1
    for number in range(large.videos):
        for kind, question, answer in videos.questions(large, number):
            answers[kind][question][answer] += 1
    assert set(answers) == set(TYPES)
    blind = {
        kind: sum(max(c.values()) for c in asked.values())
        / sum(sum(c.values()) for c in asked.values())
        for kind, asked in answers.items()
    }
    assert max(blind.values()) < 0.35
    assert sum(blind.values()) / len(blind) < 0.25


def test_the_demo_tokenizer_has_a_token_for_every_word(tmp_path: Path) -> None:
    """A text spelt in bytes would be four times as long, and the demo four times as slow."""
    tokenizer = load_tokenizer("random:qwen3-demo")
    for name in world.NAMES:
        for sample in all_samples(tmp_path, name):
            for message in sample.messages:
                ids = tokenizer(message.content)["input_ids"]
                spelt = {tokenizer.decode([i]) for i in ids if i < 256}
                assert spelt <= set("<>;:.?105"), message.content


def test_the_group_demo_has_all_demo_data_sets(tmp_path: Path) -> None:
    assert tuple(d.name for d in open_datasets(["demo"], tmp_path)) == world.NAMES
    with pytest.raises(UserError, match="nearest: demo-points"):
        DemoDataset.open("demo-point", tmp_path)
