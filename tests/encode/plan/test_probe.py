"""What some sources of a plan cost, and that none of them can end the job that plans.

found = probe(plan, spec, max_frames=128, download=DownloadConfig())
found.kinds["image"].cpu_s
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from encode.plan import probe as probe_module
from encode.plan.plan import Plan
from encode.plan.probe import PROBED, probe, run, sample
from encode.plan.probe_items import Request, probe_items
from encode.worker.messages import SourceTask
from model.media.fit import InputFit
from tests.support.spaces import SPEC
from tests.support.videos import PHONE, make_video
from tests.support.web_server import TroubleServer, quick_config

WEB = quick_config(connections=4, per_host=4)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.jpg", quality=95)
    return tmp_path / "photo.jpg"


def request(*items: tuple[Path, str], max_frames: int = 128, stop_s: float = 60.0) -> Request:
    return Request(
        items=[(str(path), kind) for path, kind in items],
        fit=InputFit(size=224, fit="squash", mean=(0.5, 0.5, 0.5), shorter_side=224),
        max_frames=max_frames,
        stop_s=stop_s,
    )


def test_items_say_what_they_cost(photo: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "cut.jpg"
    damaged.write_bytes(photo.read_bytes()[:5000])
    video = make_video(tmp_path / "video.mp4", frames=30)
    gone = tmp_path / "gone.jpg"
    asked = request((photo, "image"), (damaged, "image"), (video, "video"), (gone, "image"))
    good, cut, film, missing = probe_items(asked)
    assert good.cpu_s > 0.001 and not good.failed
    assert cut.failed and missing.failed
    assert film.duration_s is not None and film.frame_cpu_s > 0
    assert [item.number for item in (good, cut, film, missing)] == [0, 1, 2, 3]
    assert list(probe_items(request((photo, "image"), stop_s=-1))) == []


def test_the_length_of_a_video_says_how_many_frames_it_has(tmp_path: Path) -> None:
    tasks = [SourceTask(source=str(PHONE), kind="video")]
    kinds, share = probe_module._decode(tasks, InputFit.of(SPEC), 128)
    assert 0 < share <= 1
    assert kinds["video"].durations == pytest.approx((119 / 29.97,), rel=0.01)
    assert kinds["video"].rows(128) == 9  # two a second, and the last one
    assert kinds["video"].rows(4) == 4


def test_many_sources_are_resized_as_the_job_will(
    photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def recorded(request: Request) -> list[object]:
        asked.append(request.fit.compiled)
        return []

    monkeypatch.setattr(probe_module, "run", recorded)
    task = SourceTask(source=str(photo))
    for count in (499, 500):
        probe(Plan(todo=[task] * count), SPEC, max_frames=8, download=WEB)
    assert asked == [False, True]


KILLER = """
import os, time
original = os.open
def open_(path, *rest, **named):
    if str(path).endswith("crash.jpg"):
        os._exit(9)
    if str(path).endswith("hang.jpg"):
        time.sleep(600)
    return original(path, *rest, **named)
os.open = open_
"""


@pytest.mark.slow
def test_a_file_that_crashes_its_decoder_fails_and_the_others_are_probed(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    crash = tmp_path / "crash.jpg"
    items = run(request((photo, "image"), (crash, "image"), (photo, "image"), stop_s=300.0))
    assert [(item.number, item.failed) for item in items] == [(0, False), (1, True), (2, False)]


@pytest.mark.slow
def test_a_file_that_hangs_is_left_behind(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(probe_module, "HANG_S", 0.5)
    start = time.monotonic()
    items = list(run(request((tmp_path / "hang.jpg", "image"), (photo, "image"), stop_s=1.0)))
    assert time.monotonic() - start < 60
    assert [(item.number, item.failed) for item in items] == [(0, True)]


def test_sources_are_spread_over_the_plan_and_always_the_same() -> None:
    tasks = [SourceTask(source=str(i)) for i in range(10_000)]
    chosen = [int(task.source) for task in sample(tasks)]
    assert len(set(chosen)) == PROBED
    assert np.diff(sorted(chosen)).max() <= 50
    for count in (10, 50):  # time may be up after any number of them
        assert np.diff(sorted(chosen[:count])).max() < 3 * 10_000 / count
    assert sample(tasks) == sample(tasks)
    assert sorted(sample(tasks[:7]), key=lambda task: task.source) == tasks[:7]
    assert sample([]) == []


def web_plan(tasks: Sequence[SourceTask]) -> Plan:
    return Plan(todo=tasks, downloads=len(tasks), hosts=1, busiest=len(tasks))


def test_downloads_are_timed_counted_and_decoded(tmp_path: Path) -> None:
    def slow(handler: object, image: bytes, count: int) -> None:
        time.sleep(0.2)
        handler.send(image)  # type: ignore[attr-defined]

    kinds = [f"slow-{i}" for i in range(8)]
    with TroubleServer(photos=0, extra=dict.fromkeys(kinds, slow)) as server:
        tasks = [SourceTask(source=server.url(kind)) for kind in kinds]
        tasks += [SourceTask(source=f"{server.base}/nothing-{i}") for i in range(4)]
        found = probe(web_plan(tasks), SPEC, max_frames=8, download=WEB)
        assert found.downloads is not None
        assert (found.downloads.probed, found.downloads.failed) == (12, 4)
        assert found.downloads.slot_s > 0.05
        assert (found.kinds["image"].probed, found.kinds["image"].failed) == (8, 0)
        assert found.probed == 12
        # None is downloaded twice where the media store has its bytes.
        store = probe_module.MediaStore(tmp_path / "store")
        key = "0" * 63
        kept = []
        for number, task in enumerate(tasks[:4]):
            import hashlib

            data = server.image(kinds[number])
            key = hashlib.sha256(data).hexdigest()
            store.put(key, data)
            kept.append(replace(task, key=key))
        before = server.counts.copy()
        again = probe(
            web_plan(kept), SPEC, max_frames=8, download=WEB, media_store=tmp_path / "store"
        )
        assert server.counts == before
        assert (again.downloads, again.kept, again.kinds["image"].probed) == (None, 1.0, 4)
