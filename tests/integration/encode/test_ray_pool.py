"""Jobs with Ray workers: the same rows as inline, and workers that crash or hang.

with ray_pool.session(cpus=3, gpus=0):
    encode(folder / "cache", "folder:photos", workers=2)
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image

from configs import UserError
from encode.driver import ray_pool
from encode.sources.demo_drawings import DemoWorld
from encode.sources.demo_videos import draw_video
from encode.worker.config import WorkerConfig
from encode.worker.media_item import Pixels
from encode.worker.worker import Worker
from model.media.images import DecodedImage
from tests.support.encode_jobs import CONFIG, Result, SlowWorker, draw, encode, shoot

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    """Start one Ray for all tests of this file, since a start takes seconds."""
    with ray_pool.session(cpus=3, gpus=0):
        yield


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    draw(tmp_path / "photos", 60)
    return tmp_path / "photos"


def assert_whole(result: Result, like: Result) -> None:
    """Check that every row exists once and equals that of an uninterrupted job."""
    assert all(index.duplicates() == [] for index in result.reader.index.values())
    assert result.reader.rows("image") == like.reader.rows("image")
    assert result.reader.logical_hash() == like.reader.logical_hash()
    assert {n: (r.key, r.width, r.status) for n, r in result.ledger.items()} == {
        n: (r.key, r.width, r.status) for n, r in like.ledger.items()
    }


@pytest.mark.parametrize("workers", [1, 2])
def test_ray_workers_store_the_same_rows_as_inline(
    photos: Path, tmp_path: Path, workers: int
) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    (photos / "twin.png").write_bytes((photos / "0007.png").read_bytes())
    shoot(photos, (2, 5, 16, 3))
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    config = replace(CONFIG, commit_every_s=1000.0)
    result = encode(tmp_path / "ray", f"folder:{photos}", workers=workers, config=config)
    assert_whole(result, inline)
    assert result.job._tracker.encoded == 64
    assert result.job._tracker.reused == 1
    assert set(result.failures()) == {"broken.png"}
    assert len(result.paths.committed("image")) <= workers + 1, "a shard has the rows of many tasks"


class Marked(SlowWorker):
    """Writes its process id to a file."""

    def __init__(self, config: WorkerConfig, *more: Any, number: int):
        super().__init__(config, *more, number=number)
        folder = config.space.parent.parent / "pids"
        folder.mkdir(exist_ok=True)
        (folder / f".{number}").write_text(str(os.getpid()))
        (folder / f".{number}").rename(folder / str(number))


class Killer(threading.Thread):
    """Kills a worker of a job, `wait_s` seconds after the first one has started."""

    def __init__(self, pids: Path, wait_s: float):
        super().__init__()
        self.pids, self.wait_s = pids, wait_s
        self.hit = False

    def run(self) -> None:
        while not list(self.pids.glob("[0-9]*")):
            time.sleep(0.01)
        time.sleep(self.wait_s)
        victim = random.Random(self.wait_s).choice(sorted(self.pids.glob("[0-9]*")))
        with contextlib.suppress(ProcessLookupError):  # the job was over
            os.kill(int(victim.read_text()), signal.SIGKILL)
            self.hit = True


@pytest.mark.soak_counted
def test_a_killed_worker_loses_no_row(
    photos: Path, tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    hits = 0
    for i in range(soak(2, 20)):
        root = tmp_path / f"cache-{i}"
        killer = Killer(root / "pids", random.Random(i).uniform(0.0, 1.2))
        killer.start()
        result = encode(root, f"folder:{photos}", workers=2, worker_class=Marked)
        killer.join()
        hits += killer.hit
        assert result.code == 0
        assert_whole(result, inline)
        assert result.failures() == {}, "no image is rejected for it"
    assert hits, "no kill hit a working worker, so nothing was tested"


class Deadly(Worker):
    """Images of one size crash the process that decodes them."""

    def decode(self, data: bytes) -> DecodedImage:
        decoded = super().decode(data)
        if decoded.image.size == (31, 31):
            os.kill(os.getpid(), signal.SIGKILL)
        return decoded


def test_an_image_that_crashes_its_worker_is_recorded(photos: Path, tmp_path: Path) -> None:
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    (deadly,) = draw(tmp_path / "deadly", 1, first=500, side=31)
    deadly.rename(photos / "0030-deadly.png")
    (photos / "9999-twin.png").write_bytes((photos / "0030-deadly.png").read_bytes())
    result = encode(tmp_path / "ray", f"folder:{photos}", workers=2, worker_class=Deadly)
    assert result.code == 0
    assert {n: stage for n, (stage, _) in result.failures().items()} == {
        "0030-deadly.png": "decode",
        "9999-twin.png": "decode",
    }
    assert result.failures()["0030-deadly.png"][1] == "crashed its worker, also when decoded alone"
    assert result.reader.logical_hash() == inline.reader.logical_hash()
    again = encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Deadly)
    assert again.plan.todo == (), "the failure is final"


class Hanging(Worker):
    """Preparing a frame of 31 pixels never ends; one of 25 pixels takes 0.4 s."""

    def prepare(self, image: Image.Image) -> Pixels:
        while image.size == (31, 31):
            time.sleep(1.0)
        if image.size == (25, 25):
            time.sleep(0.4)
        return super().prepare(image)


def test_a_video_that_hangs_its_worker_is_recorded(photos: Path, tmp_path: Path) -> None:
    # It takes 6.4 s, longer than the time-out, but makes progress, so it does not count as hanging.
    (photos / "0029-long.y4m").write_bytes(
        draw_video(DemoWorld(images=9, side=25, video_frames=16), 1)
    )
    inline = encode(tmp_path / "inline", f"folder:{photos}")
    (photos / "0030-endless.y4m").write_bytes(draw_video(DemoWorld(images=9, side=31), 1))
    result = encode(
        tmp_path / "ray", f"folder:{photos}", workers=2, worker_class=Hanging, timeout_s=4.0
    )
    assert {n: error for n, (_, error) in result.failures().items()} == {
        "0030-endless.y4m": "hung its worker, also when decoded alone"
    }
    assert result.reader.logical_hash() == inline.reader.logical_hash()


class Doomed(Worker):
    """Crashes whatever it is given."""

    def run(self, tasks: object) -> list[object]:  # type: ignore[override]
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_workers_that_always_crash_stop_the_job(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stopped: \d workers in a row ended"):
        encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Doomed)
    result = encode(tmp_path / "ray", f"folder:{photos}")
    assert result.failures() == {}
    assert result.reader.rows("image") == 60


class Refusing(Worker):
    """Raises a UserError when it starts."""

    def __init__(self, *args: object, **kwargs: object):
        raise UserError("the weights are not on this machine; give them: --weights PATH")


def test_a_user_error_of_a_worker_is_raised_by_the_job(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        encode(tmp_path / "ray", f"folder:{photos}", workers=1, worker_class=Refusing)
    assert str(refused.value) == "the weights are not on this machine; give them: --weights PATH"
