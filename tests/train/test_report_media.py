"""Videos in a report: a strip of frames with their times, or a box that says why not."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from tests.support.videos import make_video, number_of
from train.evaluate.scoring import Answer
from train.report import __main__ as report
from train.report import media
from train.report.media import Found, find_media, medium


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return make_video(tmp_path / "video.mp4", frames=11, fps=2, size=(320, 240))


def found(path: Path, **changes: object) -> Found:
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    return Found(**{"key": key, "kind": "video", "duration_s": 5.0, **changes})  # type: ignore[arg-type]


def test_a_video_is_a_strip_of_frames_with_their_times(video: Path) -> None:
    html = medium(str(video), found(video))
    assert re.findall(r"<small>(.*?)</small>", html) == [f"{i}.0 s" for i in range(6)]
    shown = []
    for text in re.findall(r"base64,([^\"]*)", html):
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert image.size == (200, 150)
            shown.append(number_of(image))
    assert shown == [0, 2, 4, 6, 8, 10]  # two frames a second


def test_what_cannot_be_shown_is_said_with_its_length(video: Path, tmp_path: Path) -> None:
    right = found(video)
    assert "video of 5.0 s not on this machine" in medium(str(tmp_path / "gone.mp4"), right)
    assert "video of 5.0 s not on this machine" in medium("https://a.example/b.mp4", right)
    video.write_bytes(video.read_bytes() + b"x")
    assert "video of 5.0 s has changed since it was encoded" in medium(str(video), right)
    video.write_bytes(b"<b>no video</b>")
    html = medium(str(video), found(video, duration_s=None))
    assert "video cannot be read: " in html
    assert "<b>" not in html


def test_videos_and_images_stand_in_one_page(video: Path, tmp_path: Path) -> None:
    root = CacheRoot(tmp_path / "cache")
    image = tmp_path / "image.png"
    Image.new("RGB", (8, 8), "red").save(image)
    key = hashlib.sha256(video.read_bytes()).hexdigest()
    append_media(
        root,
        [
            MediaRecord(source=str(video), key=key, kind="video", duration_s=5.0),
            MediaRecord(source=str(image), key=hashlib.sha256(image.read_bytes()).hexdigest()),
        ],
        "test",
    )
    assert find_media([str(video), "unknown"], root).keys() == {str(video)}
    asked = Answer(
        sample="d/1",
        task="what",
        media=(str(video), str(image)),
        question="<image> or <image>?",
        expected="yes",
        given="no",
        correct=False,
    )
    (shown,) = report.images_of([asked], 5, root)
    assert 'class="strip"' in shown.images[0]
    assert "data:image/png" in shown.images[1]
    assert report.card(shown).count("<img") == media.FRAMES + 1
