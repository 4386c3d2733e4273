"""The prefetcher: sources in, encoder inputs out.

prefetcher.put(SourceTask(source="cat.png"))
prefetcher.get(timeout_s=1.0)       # EncoderInput: pixels of the view `full`
prefetcher.get(timeout_s=1.0)       # MediaItem: nothing more comes of cat.png
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker.decode_log import DecodeLog
from encode.worker.media_item import EncoderInput, MediaItem, Pixels
from encode.worker.messages import Registrar, SourceTask
from encode.worker.prefetch import Prefetcher
from model.media.images import DecodedImage, Failure, decode_noted
from tests.support.encode_jobs import CONFIG, draw
from tests.support.videos import make_video


class FakeWorker:
    """Counts what is decoded."""

    def __init__(self) -> None:
        self.registrar = Registrar((), {})
        self.decoded = 0

    def reserve(self, ids: Sequence[str]) -> list[bool]:
        return self.registrar.reserve(1, ids)

    def missing(self, key: str, views: Sequence[str], *, reread: bool) -> list[str]:
        return list(views)

    def decode(self, data: bytes) -> DecodedImage:
        self.decoded += 1
        return decode_noted(data)

    def prepare(self, image: Image.Image | DecodedImage) -> Pixels:
        return np.asarray(image.image if isinstance(image, DecodedImage) else image)

    def our_error(self, error: Exception) -> str:
        return f"ours: {error}"


@pytest.fixture
def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
def prefetcher(worker: FakeWorker, tmp_path: Path) -> Iterator[Prefetcher]:
    log = DecodeLog(tmp_path / "worker.decoding", threads=2)
    made = Prefetcher(worker, CONFIG, log, ahead=8, batch_size=2)
    yield made
    made.close()
    log.close()


def next_of(prefetcher: Prefetcher) -> EncoderInput | MediaItem:
    got = prefetcher.get(timeout_s=20.0)
    assert got is not None, "nothing within 20 s"
    return got


def test_an_image_is_one_input_and_then_its_item(prefetcher: Prefetcher, tmp_path: Path) -> None:
    paths = draw(tmp_path / "photos", 3)
    for path in paths:
        prefetcher.put(SourceTask(source=str(path)))
    for path in paths:
        only, item = next_of(prefetcher), next_of(prefetcher)
        assert isinstance(only, EncoderInput) and isinstance(item, MediaItem)
        assert only.item is item and item.task.source == str(path)
        assert (only.view, only.time_s, only.pixels.shape) == ("full", None, (24, 24, 3))
        assert (item.failure, item.record.width, item.data) == (None, 24, b"")
    assert prefetcher.get(timeout_s=0.01) is None


def test_a_long_video_waits_for_the_encoder_frame_by_frame(
    prefetcher: Prefetcher, tmp_path: Path
) -> None:
    """16 frames, of which 3 batches of 2 may wait; the time spent waiting is not decoding time."""
    path = tmp_path / "video.y4m"
    path.write_bytes(draw_video(DemoWorld(images=9, side=24, video_frames=16), 0))
    prefetcher.put(SourceTask(source=str(path), kind="video"))
    first = next_of(prefetcher)
    time.sleep(1.0)
    views = [first, *(next_of(prefetcher) for _ in range(15))]
    assert all(isinstance(one, EncoderInput) for one in views)
    assert [one.time_s for one in views if isinstance(one, EncoderInput)] == [
        i / 2 for i in range(16)
    ]
    item = next_of(prefetcher)
    assert isinstance(item, MediaItem) and item.failure is None
    assert 0 < item.decode_s < 0.9


def test_equal_bytes_are_decoded_once(
    prefetcher: Prefetcher, worker: FakeWorker, tmp_path: Path
) -> None:
    (path,) = draw(tmp_path / "photos", 1)
    copy = path.with_name("copy.png")
    copy.write_bytes(path.read_bytes())
    for source in (path, copy):
        prefetcher.put(SourceTask(source=str(source)))
    _, item, repeat = (next_of(prefetcher) for _ in range(3))
    assert isinstance(item, MediaItem) and item.result == "ok"
    assert isinstance(repeat, MediaItem) and repeat.result == "duplicate"
    assert (repeat.record.width, worker.decoded) == (24, 1)


def test_a_duplicate_of_a_decoded_image_needs_no_decoder(
    prefetcher: Prefetcher, worker: FakeWorker, tmp_path: Path
) -> None:
    (path,) = draw(tmp_path / "photos", 1)
    prefetcher.put(SourceTask(source=str(path)))
    _, first = (next_of(prefetcher) for _ in range(2))
    prefetcher._decoders.shutdown()
    for number in range(40):
        copy = path.with_name(f"copy{number}.png")
        copy.write_bytes(path.read_bytes())
        prefetcher.put(SourceTask(source=str(copy)))
    for number in range(40):
        repeat = next_of(prefetcher)
        assert isinstance(first, MediaItem) and isinstance(repeat, MediaItem)
        assert repeat.task.source.endswith(f"/copy{number}.png")
        assert (repeat.result, repeat.key, repeat.data) == ("duplicate", first.key, b"")
        assert (repeat.record.width, repeat.record.height) == (24, 24)


def test_a_source_that_failed_needs_no_decoder(prefetcher: Prefetcher, tmp_path: Path) -> None:
    prefetcher._decoders.shutdown()
    sources = (str(tmp_path / "gone.png"), "http://127.0.0.1:9/private.png")
    for source in sources:
        prefetcher.put(SourceTask(source=source))
    items = [next_of(prefetcher) for _ in sources]
    failures = {item.task.source: item.failure for item in items if isinstance(item, MediaItem)}
    assert failures[sources[0]] == Failure("fetch", "no such file")
    refused = failures[sources[1]]
    assert refused is not None and refused.stage == "fetch"


def test_the_other_kind_than_the_data_set_says_fails_with_what_to_do(
    prefetcher: Prefetcher, tmp_path: Path
) -> None:
    (path,) = draw(tmp_path / "photos", 1)
    clip = make_video(tmp_path / "clip.jpg.mp4")
    for task in (
        SourceTask(source=str(path), kind="video"),
        SourceTask(source=str(clip), kind="image"),
    ):
        prefetcher.put(task)
    items = [next_of(prefetcher) for _ in range(2)]
    reasons = [
        item.failure and item.failure.reason for item in items if isinstance(item, MediaItem)
    ]
    assert reasons == [
        "a PNG image, not a video; list it as an image in the data set",
        "an MP4 video, not an image; list it as a video in the data set",
    ]


def test_the_note_of_a_jpeg_without_its_end_is_in_its_record(
    prefetcher: Prefetcher, tmp_path: Path
) -> None:
    path = tmp_path / "cut.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2])
    prefetcher.put(SourceTask(source=str(path)))
    only, item = next_of(prefetcher), next_of(prefetcher)
    assert isinstance(only, EncoderInput) and isinstance(item, MediaItem)
    assert item.outcome().record.note == "the JPEG ends early: no pixel is missing"
