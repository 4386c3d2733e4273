"""Evaluate a model trained on images and videos: it names the colour of a video only if it sees the video."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.store.paths import CacheRoot
from cache.store.reader import FeatureReader
from configs import UserError
from model.inference import Video
from model.io.runs import read_meta
from tests.support import trained_runs
from train import run
from train.data.features import feature_bytes, read_features
from train.data.join import join
from train.evaluate import evaluation as evaluate
from train.evaluate.options import Options
from train.evaluate.result import Evaluation

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CacheRoot]:
    """Train a model to name colours of images and videos; return its run folder and its cache."""
    folder = tmp_path_factory.mktemp("films")
    trained_runs.make(folder)
    root = trained_runs.film(folder)
    words = [*trained_runs.BASE, "--batch-size", "12", "--held-out", "0.25", "--max-steps", "120"]
    words += ["--features", str(root.path), "--run", str(folder / "run"), "--max-frames"]
    with pytest.raises(UserError, match=r"videos have some of their frames.*--max-frames 5"):
        run.main([*words, "5"])
    # The same frames as with 128, because every video is shorter than 32 seconds.
    assert run.main([*words, "64"]) == 0
    return folder / "run", root


@pytest.fixture(scope="module")
def result(trained: tuple[Path, CacheRoot]) -> Evaluation:
    """Evaluate that model on the held-out samples."""
    return evaluate.evaluate(
        Options(run=str(trained[0]), features=trained[1].path, max_new_tokens=8)
    )


def test_right_answers_need_the_video(result: Evaluation) -> None:
    tasks = {task.name: task for task in result.tasks}
    assert tasks["film"].questions >= 5
    (film,), (colour,) = tasks["film"].scores, tasks["colour"].scores
    assert film.value == 1.0
    assert film.blind is not None and film.blind < 0.7
    assert colour.value == 1.0
    assert result.blind_loss is not None and result.blind_loss > result.loss + 0.5


def test_blind_answers_describe_the_exchanged_video(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    _, root = trained
    reader = FeatureReader(root.space(result.space))
    mix = {"colors": None, "films": None}
    seen = join(root, reader, mix, split="val", held_out=0.25, min_coverage=1.0)
    blind = seen.blind(0)
    names = list(trained_runs.COLORS)
    colors = {
        seen.key(m): names[int(seen.name_of(i).split("/")[1]) % len(names)]
        for i in range(seen.size)
        for m in seen.media_of(i)
        if seen.is_video(m)
    }
    said = {a.sample: a.blind for a in result.answers if a.task == "film"}
    checked = 0
    for i in range(seen.size):
        if (name := seen.name_of(i)) in said:
            assert said[name] == colors[blind.key(int(seen.media_of(i)[0]))]
            checked += 1
    assert checked == len(said) >= 5


def test_read_features_returns_the_stored_features(
    result: Evaluation, trained: tuple[Path, CacheRoot]
) -> None:
    _, root = trained
    reader = FeatureReader(root.space(result.space))
    seen = join(
        root, reader, {"films": None, "colors": None}, split="val", held_out=0.25, min_coverage=1.0
    )
    media = [0, len(seen.kinds) - 1, 0]
    assert [seen.is_video(m) for m in media] == [True, False, True]
    first, image, again = read_features(seen, media, reader)
    assert not isinstance(image, Video) and isinstance(first, Video)
    assert tuple(first.times_s) == tuple(seen.times_of(0).tolist())
    assert isinstance(again, Video)
    assert np.array_equal(first.features.numpy(), again.features.numpy())
    assert np.array_equal(image.numpy(), reader.read("image", seen.key(media[1])))
    stored = np.stack(
        [reader.read("frame", seen.key(0), f"t:{round(t * 1e6)}") for t in first.times_s]
    )
    assert np.array_equal(first.features.numpy(), stored)
    sizes = [x.features.nbytes if isinstance(x, Video) else x.nbytes for x in (first, image)]
    assert feature_bytes(seen, media[:2], reader.spec) == sum(sizes)


def test_batches_of_questions_are_limited_by_their_features(
    trained: tuple[Path, CacheRoot], result: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, root = trained
    calls: list[int] = []
    answer = evaluate.answer

    def spy(vlm: object, tokenizer: object, prompts: list[object], **more: object) -> list[str]:
        calls.append(len(prompts))
        return answer(vlm, tokenizer, prompts, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluate, "answer", spy)
    monkeypatch.setattr(evaluate, "ANSWER_BYTES", 2000)
    again = evaluate.evaluate(
        Options(run=str(folder), features=root.path, max_new_tokens=8, blind=False)
    )
    assert [a.given for a in again.answers] == [a.given for a in result.answers]
    assert len(calls) > 5 and sum(calls) == len(again.answers)


def test_the_model_records_the_limit_of_frames(
    trained: tuple[Path, CacheRoot],
) -> None:
    assert read_meta(trained[0] / "stage1" / "final")["max_frames"] == 64
