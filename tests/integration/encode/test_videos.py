"""Encode jobs with videos: rows and their times, frame limits, order on disk, failures and kills.

result = encode(folder / "cache", "folder:videos", config=replace(CONFIG, max_frames=8))
result.reader.rows("frame")
"""

from __future__ import annotations

import itertools
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cache.format.codec import pack
from cache.format.frame_sampling import frame_views, sample_times
from cache.store.ledger import MediaRecord
from cache.store.reader import FeatureReader
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker import prefetch
from encode.worker.media_item import Pixels
from encode.worker.worker import Worker
from model.media.images import BadMediaError
from model.media.video import frames
from model.media.video_index import probe
from model.vision.encoder import load_encoder
from tests.support.encode_jobs import (
    CONFIG,
    TINY,
    Result,
    committed,
    draw,
    encode,
    space,
    start,
    wait_for_rows,
)

LENGTHS = (2, 5, 16, 3, 8, 7)
"""Frames of the videos; two a second."""


def shoot(folder: Path, lengths: tuple[int, ...] = LENGTHS) -> list[Path]:
    """Write videos with these numbers of frames."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, length in enumerate(lengths):
        paths.append(folder / f"video{number:02}.y4m")
        paths[-1].write_bytes(draw_video(DemoWorld(images=9, side=24, video_frames=length), number))
    return paths


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    shoot(tmp_path / "videos")
    return tmp_path / "videos"


def record_of(result: Result, name: str) -> MediaRecord:
    found = result.ledger[name]
    assert found.key is not None
    return found


def rows_of(reader: FeatureReader, record: MediaRecord, max_frames: int = 128) -> list[int]:
    views = frame_views(record.duration_s or 0.0, max_frames)
    assert record.key is not None
    return reader.lookup_pairs("frame", [record.key] * len(views), views).tolist()


def test_a_row_equals_the_features_of_its_frame_encoded_alone(videos: Path, tmp_path: Path) -> None:
    result = encode(tmp_path / "cache", f"folder:{videos}", codec="fp16")
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


def test_the_rows_of_a_video_are_adjacent_and_in_time_order(videos: Path, tmp_path: Path) -> None:
    draw(videos, 9)  # between the videos, in an array of their own
    result = encode(
        tmp_path / "cache", f"folder:{videos}", config=replace(CONFIG, commit_every_s=60.0)
    )
    assert (result.reader.rows("image"), result.reader.rows("frame")) == (9, sum(LENGTHS))
    for name in (path.name for path in videos.glob("*.y4m")):
        rows = rows_of(result.reader, record_of(result, name))
        assert rows == list(range(rows[0], rows[0] + len(rows)))
    assert len(result.paths.committed("frame")) == len(result.paths.committed("image")) == 1


def test_a_higher_limit_encodes_only_the_new_frames(videos: Path, tmp_path: Path) -> None:
    few = encode(tmp_path / "cache", f"folder:{videos}", config=replace(CONFIG, max_frames=4))
    before = {path: path.stat().st_mtime_ns for path in few.paths.root.rglob("c/*")}
    counts = [len(frame_views((n - 1) / 2, 4)) for n in LENGTHS]
    assert few.reader.rows("frame") == sum(counts)
    more = encode(tmp_path / "cache", f"folder:{videos}", config=replace(CONFIG, max_frames=8))
    wanted = [set(frame_views((n - 1) / 2, 4)) | set(frame_views((n - 1) / 2, 8)) for n in LENGTHS]
    assert more.reader.rows("frame") == sum(map(len, wanted))
    assert more.plan.rows == more.plan.new_rows["frame"] == sum(map(len, wanted)) - sum(counts)
    assert more.plan.reused == sum(n <= 4 for n in LENGTHS), "the short ones have all their frames"
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert more.reader.index["frame"].duplicates() == []
    for name, record in more.ledger.items():
        assert min(rows_of(more.reader, record, 8)) >= 0, name
    again = encode(tmp_path / "cache", f"folder:{videos}", config=replace(CONFIG, max_frames=8))
    assert again.plan.todo == ()


def test_the_same_video_under_two_names_is_encoded_once(videos: Path, tmp_path: Path) -> None:
    (videos / "copy.y4m").write_bytes((videos / "video02.y4m").read_bytes())
    result = encode(tmp_path / "cache", f"folder:{videos}")
    assert result.reader.rows("frame") == sum(LENGTHS)
    assert result.job._tracker.reused == 1
    copy, first = (record_of(result, name) for name in ("copy.y4m", "video02.y4m"))
    assert (copy.key, copy.duration_s) == (first.key, first.duration_s)
    assert copy.duration_s == 7.5


def test_a_changed_video_is_encoded_as_a_new_one(videos: Path, tmp_path: Path) -> None:
    encode(tmp_path / "cache", f"folder:{videos}")
    data = bytearray((videos / "video01.y4m").read_bytes())
    data[-1] ^= 1
    (videos / "video01.y4m").write_bytes(data)
    after = encode(tmp_path / "cache", f"folder:{videos}")
    assert len(after.plan.todo) == 1
    assert after.reader.rows("frame") == sum(LENGTHS) + 5


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
    some = prefetch.frames
    monkeypatch.setattr(prefetch, "frames", lambda *a, **k: itertools.islice(some(*a, **k), 3))
    result = encode(tmp_path / "cache", f"folder:{tmp_path / 'videos'}")
    assert result.failures() == {"video00.y4m": ("decode", "3 of 5 frames could be decoded")}
    assert result.reader.rows("frame") == 0


def test_damaged_videos_are_recorded_or_encoded_as_far_as_they_are_intact(
    videos: Path, tmp_path: Path
) -> None:
    (videos / "nonsense.mp4").write_bytes(b"no video at all" * 100)
    (videos / "empty.mkv").touch()
    whole = (videos / "video02.y4m").read_bytes()
    (videos / "cut.y4m").write_bytes(whole[: len(whole) // 2])
    result = encode(tmp_path / "cache", f"folder:{videos}")
    assert {name: stage for name, (stage, _) in result.failures().items()} == {
        "nonsense.mp4": "decode",
        "empty.mkv": "decode",
    }
    cut = record_of(result, "cut.y4m")
    assert cut.duration_s == 3.0, "the seven intact frames"
    assert min(rows_of(result.reader, cut)) >= 0
    assert result.reader.rows("frame") == sum(LENGTHS) + len(rows_of(result.reader, cut))


def test_two_workers_store_the_same_rows_as_one(videos: Path, tmp_path: Path) -> None:
    draw(videos, 12)
    one = encode(tmp_path / "one", f"folder:{videos}")
    two = encode(tmp_path / "two", f"folder:{videos}", workers=2)
    assert two.code == 0
    assert two.reader.rows("frame") == sum(LENGTHS)
    assert two.reader.logical_hash() == one.reader.logical_hash()


@pytest.mark.soak_counted
@pytest.mark.parametrize("workers", [0, 2])
def test_a_driver_killed_while_encoding_videos(
    tmp_path: Path, workers: int, soak: Callable[[int, int], int]
) -> None:
    images = tmp_path / "images"
    lengths = LENGTHS * 4
    shoot(images, lengths)
    draw(images, 20)
    whole = encode(tmp_path / "whole", f"folder:{images}")
    total = len(whole.paths.committed("frame")) + len(whole.paths.committed("image"))
    dice = random.Random(workers)
    in_the_middle = 0
    for i in range(soak(1, 10)):
        folder = tmp_path / f"job-{i}"
        folder.mkdir()
        (folder / "images").symlink_to(images)
        process = start(folder, workers)
        wait_for_rows(folder, process, rows=dice.randrange(1, total // 2))
        time.sleep(dice.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        in_the_middle += committed(folder) < total
        resumed = encode(folder / "cache", f"folder:{images}")
        assert resumed.code == 0
        reader = FeatureReader(space(folder))
        assert reader.index["frame"].duplicates() == []
        assert reader.logical_hash() == whole.reader.logical_hash()
    assert in_the_middle
