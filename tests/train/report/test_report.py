"""The report of a training run.

    python -m train.report --run default     # runs/default/stage1/report.html

The page is one file that loads nothing, shows each question with its answers, and never takes text as markup.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot
from tests.support import trained_runs
from tests.support.html_page import Page, loads_nothing
from train import run
from train.evaluate.evaluation import evaluate
from train.evaluate.options import Options as EvaluateOptions
from train.evaluate.result import Evaluation
from train.evaluate.scoring import Answer, summarize
from train.report import __main__ as report
from train.report import media
from train.report.page import marks, pick_media, readable, render

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Return the report of a short run and its folder; one image is deleted and one is changed."""
    folder = tmp_path_factory.mktemp("reported")
    root = trained_runs.make(folder, 24)
    options = (
        "--llm random:qwen3-tiny --hardware cpu --device cpu --batch-size 8 --learning-rate 3e-3 "
        "--held-out 0.4 --max-steps 10 --eval-every 5 --log-every 1000"
    )
    where = ["--run", str(folder / "run"), "--features", str(root.path)]
    assert run.main([*options.split(), *where]) == 0
    asked = EvaluateOptions(run=str(folder / "run"), features=root.path, max_new_tokens=4)
    shown = [a.media[0] for a in evaluate(asked).answers]
    gone, changed = list(dict.fromkeys(shown))[:2]
    Path(gone).unlink()
    Path(changed).write_bytes(trained_runs.png((1, 2, 3), 99))
    report.main(where)
    return (folder / "run" / "stage1" / "report.html").read_text(), folder


def test_the_page_is_one_file_that_loads_nothing(reported: tuple[str, Path]) -> None:
    page = loads_nothing(reported[0])
    assert not page.scripts
    assert "run, stage 1" in page.text and "blind" in page.text


def test_small_images_are_in_the_page_unchanged(reported: tuple[str, Path]) -> None:
    text, folder = reported
    files = {p.read_bytes() for p in (folder / "images").iterdir()}
    sources = [str(a["src"]) for tag, a in Page(text).tags if tag == "img"]
    shown = [base64.b64decode(source.split(",", 1)[1]) for source in sources]
    assert len(shown) >= 4 and len(set(shown)) == len(shown)
    assert set(shown) <= files  # small ones to the byte
    assert all(source.startswith("data:image/png;base64,") for source in sources)


def test_the_page_says_why_an_image_is_missing(reported: tuple[str, Path]) -> None:
    text = reported[0]
    assert text.count("image not on this machine") == 1
    assert text.count("image has changed since it was encoded") == 1


def test_charts_show_every_step_and_evaluation(reported: tuple[str, Path]) -> None:
    page = Page(reported[0])
    labels = [a["aria-label"] for tag, a in page.tags if tag == "svg"]
    assert labels == ["Loss", "Learning rate", "Gradient norm"]
    dots = [a for tag, a in page.tags if tag == "circle"]
    assert len(dots) == 2  # held-out losses after steps 5 and 10
    lines = [a["d"] for a in page.all("path") if a["class"] == "line a thin faint"]
    assert str(lines[0]).count("L") == 9  # ten points, one a step


def opened(folder: Path) -> tuple[CacheRoot, LocalMedia]:
    """An empty cache, and what opens files below it."""
    return CacheRoot(folder), LocalMedia(CacheRoot(folder))


META = {"llm": "<llm>", "connector": "linear"}


def answer(**changes: Any) -> Answer:
    values: dict[str, Any] = {
        "sample": "d/1",
        "task": "colour",
        "media": ("/nowhere.png",),
        "item": "a",
        "question": "<image>Which <b>colour</b>?",
        "expected": "red & blue",
        "given": "<script>alert(1)</script>",
        "metric": "exact",
        "scores": (0.0,),
        "correct": False,
        "blind": "gr<een",
        "blind_scores": (0.0,),
        "blind_correct": False,
    }
    return Answer(**{**values, **changes})


def evaluation(*answers: Answer) -> Evaluation:
    tasks, mean = summarize(answers)
    return Evaluation(
        run="runs/<x>",
        stage=1,
        step=5,
        split="val",
        space="toy",
        samples=len(answers),
        loss=0.5,
        blind_loss=None,
        mean=mean,
        tasks=tasks,
        answers=answers,
    )


def test_text_never_becomes_markup(tmp_path: Path) -> None:
    result = evaluation(answer())
    shown = pick_media(result.answers, 5, *opened(tmp_path))
    shown.append(([media.Picture(absent="video <b>")], []))
    page = Page(render(result, [], shown, config="a: <b>", meta=META))
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "x", "een", "llm", "image"} & tags
    for text in (
        "Which <b>colour</b>?",
        "expected red & blue",
        "<script>alert(1)</script>",
        "gr<een",
        "video <b>",
    ):
        assert text in page.text
    assert "Loss Nothing recorded." in page.text  # no metrics, no curves, no failure


def test_an_empty_answer_is_shown_as_nothing_and_a_caption_is_neither_right_nor_wrong(
    tmp_path: Path,
) -> None:
    answers = [answer(given=""), answer(correct=True), answer(task="caption")]
    shown = pick_media(answers, 5, *opened(tmp_path))
    html = render(evaluation(*answers), [], shown, config="", meta=META)
    assert "<i>nothing</i>" in html
    assert "caption (not in the mean)" in html
    assert [a["class"] for a in Page(html).all("dd") if "class" in a] == ["wrong", "right", "plain"]


def test_points_are_marked() -> None:
    pointed = answer(
        task="point",
        expected='<points coords="1 1 250 500 2 900 100">x</points>',
        given='<points coords="2 1 700 300">x</points>',
    )
    assert marks([pointed], 1) == [("ring", 25.0, 50.0), ("ring", 90.0, 10.0)]
    assert marks([pointed], 2) == [("wrong", 70.0, 30.0)]


def test_points_are_shown_as_coordinates() -> None:
    pointed = '<points coords="1 1 250 500 2 900 100">red & blue</points>'
    assert readable(pointed) == "(250, 500) (900, 100) red & blue"
    assert readable('<points coords="x">') == '<points coords="x">'


def test_data_sets_take_turns(tmp_path: Path) -> None:
    answers = [answer(sample=f"big/{i}", media=(f"/b{i}",)) for i in range(9)]
    answers += [answer(sample=f"small/{i}", media=(f"/s{i}",)) for i in range(2)]
    answers += [answer(sample="big/again", media=("/b0",)), answer(sample="text/1", media=())]
    shown = pick_media(answers, 4, *opened(tmp_path))
    assert [about[0].sample for _, about in shown] == ["big/0", "small/0", "big/1", "small/1"]
    assert [a.sample for a in shown[0][1]] == [
        "big/0",
        "big/again",
    ]  # all about one image together


def recorded(path: Path) -> MediaRecord:
    """What the media table says of an image."""
    data = path.read_bytes()
    return MediaRecord(source=str(path), key=hashlib.sha256(data).hexdigest(), bytes=len(data))


def test_a_large_image_is_small_and_upright_in_the_page(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 1200, 3), np.uint8)
    path = tmp_path / "large.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.fromarray(noise).save(path, quality=95, exif=exif)
    _, local = opened(tmp_path)
    (uri,) = media.picture(str(path), recorded(path), local).uris
    data = base64.b64decode(uri.split("base64,")[1])
    with Image.open(io.BytesIO(data)) as small:
        assert small.size == (240, 480)
    assert len(data) < media.VERBATIM_BYTES < path.stat().st_size
    path.write_bytes(b"no image")
    assert media.picture(str(path), recorded(path), local).absent == "image cannot be read"


def test_bytes_without_a_recorded_sha256_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "private.png"
    path.write_bytes(trained_runs.png((1, 2, 3), 99))
    _, local = opened(tmp_path)
    for record in (None, dataclasses.replace(recorded(path), key=None)):
        shown = media.picture(str(path), record, local)
        assert shown.absent == "image cannot be checked: the cache has no sha256 of it"
