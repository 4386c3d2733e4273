"""Images and videos of a report: data URIs, or the reason why there are none.

picture("video.mp4", record, local).times_s == (0, 1, 2, 3, 4, 5)
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache.format.embedded.names import row_source
from cache.maintenance.local_media import LocalMedia
from cache.store.ledger import MediaRecord, append_media
from cache.store.paths import CacheRoot
from tests.support.videos import make_video, number_of
from train.evaluate.scoring import Answer
from train.report import media
from train.report import page as report
from train.report.media import find_media, picture


@pytest.fixture
def video(tmp_path: Path) -> Path:
    return make_video(tmp_path / "video.mp4", frames=11, fps=2, size=(320, 240))


def found(path: Path, **changes: object) -> MediaRecord:
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    return MediaRecord(
        **{"source": str(path), "key": key, "kind": "video", "duration_s": 5.0, **changes}
    )  # type: ignore[arg-type]


@pytest.fixture
def local(tmp_path: Path) -> LocalMedia:
    return LocalMedia(CacheRoot(tmp_path / "cache"), media=tmp_path)


def test_a_video_is_shown_by_frames_with_their_times(local: LocalMedia, video: Path) -> None:
    shown = picture(str(video), found(video), local)
    assert shown.times_s == (0, 1, 2, 3, 4, 5)
    numbers = []
    for uri in shown.uris:
        with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
            assert image.size == (200, 150)
            numbers.append(number_of(image))
    assert numbers == [0, 2, 4, 6, 8, 10]  # two frames a second


def test_media_inside_a_file_are_shown(local: LocalMedia, video: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(image := tmp_path / "image.png")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"media": [video.read_bytes(), image.read_bytes()]}), path)
    film, still = (row_source("parquet", str(path), "media", row) for row in (0, 1))
    assert picture(film, found(video, source=film), local).times_s == (0, 1, 2, 3, 4, 5)
    right = found(image, source=still, kind="image", duration_s=None)
    assert picture(still, right, local).uris[0].startswith("data:image/png")
    gone = row_source("parquet", str(path), "media", 2)
    assert picture(gone, found(video), local).absent == "video of 5.0 s not on this machine"
    other = found(video, key="0" * 64)
    assert picture(film, other, local).absent == "video of 5.0 s has changed since it was encoded"


def test_a_missing_video_is_named_with_its_length_and_the_reason(
    local: LocalMedia, video: Path, tmp_path: Path
) -> None:
    right = found(video)
    os.mkfifo(tmp_path / "pipe.mp4")  # opening it would wait for ever
    for name, reason in (
        ("gone.mp4", "not on this machine"),
        ("pipe.mp4", "cannot be read: a FIFO, refused"),
    ):
        shown = picture(str(tmp_path / name), right, local)
        assert shown.absent == f"video of 5.0 s {reason}"
    web = picture("https://a.example/b.mp4", right, local)
    assert web.absent == "video of 5.0 s came from the web and was not kept"
    video.write_bytes(video.read_bytes() + b"x")
    assert (
        picture(str(video), right, local).absent
        == "video of 5.0 s has changed since it was encoded"
    )
    video.write_bytes(b"no video")
    reason = picture(str(video), found(video, duration_s=None), local).absent
    assert reason.startswith("video cannot be read: ")


def test_one_sample_may_have_a_video_and_an_image(video: Path, tmp_path: Path) -> None:
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
        item="a",
        metric="exact",
        scores=(0.0,),
        media=(str(video), str(image)),
        question="<image> or <image>?",
        expected="yes",
        given="no",
        correct=False,
    )
    (((film, still), _),) = report.pick_media([asked], 5, root, LocalMedia(root, media=tmp_path))
    assert len(film.uris) == media.FRAMES
    assert still.uris[0].startswith("data:image/png")
    assert still.times_s == ()
