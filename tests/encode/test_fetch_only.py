"""The progress of `encode.run --fetch-only`; tests/integration/encode/test_pixmo_web.py has real downloads.

fetch_only(root, media, config, retry_failed=False, on_progress=show)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from cache.store.ledger import MediaRecord
from cache.store.paths import CacheRoot
from encode.driver.progress import ProgressState
from encode.fetch_only import fetch_only
from encode.plan.media import Media, Mention
from encode.worker.config import WorkerConfig
from encode.worker.media_item import MediaItem
from encode.worker.messages import SourceTask
from model.media.images import Failure
from tests.support.encode_jobs import TINY

MEDIA = Media.of({f"https://a.test/{number}.jpg": Mention("image") for number in range(40)})


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerConfig:
    """Return a configuration with which two downloads arrive in a second, and each fourth one fails."""
    now = [100.0]
    monkeypatch.setattr("encode.fetch_only.time.monotonic", lambda: now[0])

    def download(
        _downloads: object, tasks: Iterable[SourceTask], *_: object
    ) -> Iterator[MediaItem]:
        for number, task in enumerate(tasks):
            now[0] += 0.5
            item = MediaItem(
                task=task, record=MediaRecord(source=task.source, key=f"{number:064d}")
            )
            item.failure = Failure("fetch", "HTTP 404") if number % 4 == 3 else None
            yield item

    monkeypatch.setattr("encode.fetch_only._download", download)
    return WorkerConfig(encoder=TINY, media_store=tmp_path / "media")


def test_a_callback_gets_the_progress(
    tmp_path: Path, config: WorkerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    states: list[ProgressState] = []
    root = CacheRoot(tmp_path / "cache")
    assert fetch_only(root, MEDIA, config, retry_failed=False, on_progress=states.append) == 0
    assert states[0] == ProgressState(done=0, total=40, rate=0.0, eta_s=None, bound="", failed=0)
    half = next(state for state in states if state.done == 20)
    assert (half.failed, half.bound, half.rate) == (5, "download", pytest.approx(2))
    assert half.eta_s == pytest.approx(10)
    assert (states[-1].done, states[-1].failed, states[-1].eta_s) == (40, 10, 0.0)
    said = capsys.readouterr()
    assert said.out.endswith("fetched=30 reused=0 failed=10 seconds=20.0\n") and not said.err


def test_lines_are_printed_without_one(
    tmp_path: Path, config: WorkerConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch_only(CacheRoot(tmp_path / "cache"), MEDIA, config, retry_failed=False) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"[-\d]{10} [:\d]{8}  fetch 25%  10/40  2/s  15 s left  bound by download  2 failed",
        lines[0],
    )
    assert len(lines) == 2
