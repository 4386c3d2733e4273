"""Encode jobs with videos: rows and their times, frame limits, order on disk, and failures.

result = encode(folder / "cache", "folder:videos", config=replace(CONFIG, max_frames=8))
result.reader.rows("frame")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.format.codec import pack
from cache.format.frame_sampling import frame_views, sample_times
from cache.store.ledger import MediaRecord
from cache.store.reader import FeatureReader
from encode.worker import decoders
from encode.worker.media_item import Pixels
from encode.worker.worker import Worker
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_index import probe
from model.vision.encoder import load_encoder
from tests.support.encode_jobs import CONFIG, TINY, Result, draw, encode, shoot

Encode = Callable[..., Result]

LENGTHS = (2, 5, 16, 3, 8, 7)
"""Frames of the videos; two a second."""


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    shoot(tmp_path / "videos", LENGTHS)
    return tmp_path / "videos"


@pytest.fixture
def job(videos: Path, tmp_path: Path) -> Encode:
    """Return a function that encodes the videos into one cache."""
    return partial(encode, tmp_path / "cache", f"folder:{videos}")


def record_of(result: Result, name: str) -> MediaRecord:
    found = result.ledger[name]
    assert found.key is not None
    return found


def rows_of(reader: FeatureReader, record: MediaRecord, max_frames: int = 128) -> list[int]:
    views = frame_views(record.duration_s or 0.0, max_frames)
    assert record.key is not None
    return reader.lookup_pairs("frame", [record.key] * len(views), views).tolist()


def test_a_row_equals_the_features_of_its_frame_encoded_alone(videos: Path, job: Encode) -> None:
    result = job(codec="fp16")
    assert (result.code, result.failures()) == (0, {})
    assert result.reader.rows("frame") == sum(LENGTHS)
    assert result.reader.rows("image") == 0
    encoder = load_encoder(TINY, device="cpu")
    for path, length in zip(sorted(videos.iterdir()), LENGTHS, strict=True):
        record = record_of(result, path.name)
        assert (record.kind, record.width, record.height) == ("video", 24, 24)
        assert record.duration_s == (length - 1) / 2
        times = sample_times(record.duration_s, 128)
        assert len(times) == length
        rows = np.array(rows_of(result.reader, record))
        assert result.reader.times("frame", rows).tolist() == [us / 1e6 for us in times]
        for frame in frames(path, times, probe(path)):
            alone = encoder.encode(encoder.prepare(frame.image)[None], "frame").numpy()
            stored = result.reader.read("frame", record.key or "", f"t:{frame.wanted_us}")
            assert stored.tobytes() == pack(alone, "fp16").tobytes()


def test_the_rows_of_a_video_are_adjacent_and_in_time_order(videos: Path, job: Encode) -> None:
    draw(videos, 9)  # between the videos, in an array of their own
    result = job(config=replace(CONFIG, commit_every_s=60.0))
    assert (result.reader.rows("image"), result.reader.rows("frame")) == (9, sum(LENGTHS))
    for name in (path.name for path in videos.glob("*.y4m")):
        rows = rows_of(result.reader, record_of(result, name))
        assert rows == list(range(rows[0], rows[0] + len(rows)))
    assert len(result.paths.committed("frame")) == len(result.paths.committed("image")) == 1


def test_a_higher_limit_encodes_only_the_new_frames(job: Encode) -> None:
    few = job(config=replace(CONFIG, max_frames=4))
    before = {path: path.stat().st_mtime_ns for path in few.paths.root.rglob("c/*")}
    counts = [len(frame_views((n - 1) / 2, 4)) for n in LENGTHS]
    assert few.reader.rows("frame") == sum(counts)
    more = job(config=replace(CONFIG, max_frames=8))
    wanted = [set(frame_views((n - 1) / 2, 4)) | set(frame_views((n - 1) / 2, 8)) for n in LENGTHS]
    assert more.reader.rows("frame") == sum(map(len, wanted))
    assert more.plan.rows == more.plan.new_rows["frame"] == sum(map(len, wanted)) - sum(counts)
    assert more.plan.reused == sum(n <= 4 for n in LENGTHS), "the short ones have all their frames"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert more.reader.index["frame"].doubled.size == 0
    for name, record in more.ledger.items():
        assert min(rows_of(more.reader, record, 8)) >= 0, name
    again = job(config=replace(CONFIG, max_frames=8))
    assert again.plan.todo == ()


def test_the_same_video_under_two_names_is_encoded_once(videos: Path, job: Encode) -> None:
    (videos / "copy.y4m").write_bytes((videos / "video02.y4m").read_bytes())
    result = job()
    assert result.reader.rows("frame") == sum(LENGTHS)
    assert result.job._tracker.reused == 1
    copy, first = (record_of(result, name) for name in ("copy.y4m", "video02.y4m"))
    assert (copy.key, copy.duration_s) == (first.key, first.duration_s)
    assert copy.duration_s == 7.5


class FailsLate(Worker):
    """Cannot prepare the third frame of all."""

    def prepare(self, image: Image.Image) -> Pixels:
        self.seen = getattr(self, "seen", 0) + 1
        if self.seen == 3:
            raise BadMediaError("no such frame")
        return super().prepare(image)


def test_a_video_that_fails_half_way_leaves_no_row(tmp_path: Path) -> None:
    shoot(tmp_path / "videos", (16,))
    videos = f"folder:{tmp_path / 'videos'}"
    result = encode(tmp_path / "cache", videos, worker_class=FailsLate)
    assert result.failures() == {"video00.y4m": ("decode", "no such frame")}
    assert result.reader.rows("frame") == 0
    again = encode(tmp_path / "cache", videos)
    assert (again.plan.known_failures, again.plan.todo) == (1, ())


def test_a_video_with_fewer_frames_than_announced_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shoot(tmp_path / "videos", (5,))
    some = decoders.frames
    monkeypatch.setattr(decoders, "frames", lambda *a, **k: itertools.islice(some(*a, **k), 3))
    result = encode(tmp_path / "cache", f"folder:{tmp_path / 'videos'}")
    assert result.failures() == {"video00.y4m": ("decode", "3 of 5 frames could be decoded")}
    assert result.reader.rows("frame") == 0


def test_damaged_videos_are_recorded_or_encoded_as_far_as_they_are_intact(
    videos: Path, job: Encode
) -> None:
    (videos / "nonsense.mp4").write_bytes(b"no video at all" * 100)
    (videos / "empty.mkv").touch()
    whole = (videos / "video02.y4m").read_bytes()
    (videos / "cut.y4m").write_bytes(whole[: len(whole) // 2])
    result = job()
    assert {name: stage for name, (stage, _) in result.failures().items()} == {
        "nonsense.mp4": "decode",
        "empty.mkv": "decode",
    }
    cut = record_of(result, "cut.y4m")
    assert cut.duration_s == 3.0, "the seven intact frames"
    assert min(rows_of(result.reader, cut)) >= 0
    assert result.reader.rows("frame") == sum(LENGTHS) + len(rows_of(result.reader, cut))
