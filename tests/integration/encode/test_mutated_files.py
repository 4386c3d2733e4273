"""Encode damaged files of every format: each is encoded or recorded as failed.

result = encode(folder / "cache", "folder:damaged", workers=2)
result.failures()       # {"00007.png": ("decode", "...")}
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cache.format.frame_sampling import frame_views
from cache.store.ledger import MediaRecord
from tests.support.encode_jobs import CONFIG, Result, encode
from tests.support.video_mutations import mutated
from tests.support.videos import make_video
from tests.support.web_server import photo

FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif"}
LONGEST_S = 10.0
"""Seconds after which a decode counts as hanging."""


def images() -> dict[str, list[bytes]]:
    """Return small photographs in every format: file ending -> files."""
    made: dict[str, list[bytes]] = {}
    for form, ending in FORMATS.items():
        for number in range(6):
            file = io.BytesIO()
            Image.open(io.BytesIO(photo(number))).save(file, form)
            made.setdefault(ending, []).append(file.getvalue())
    return made


def videos(folder: Path) -> dict[str, list[bytes]]:
    """Return small videos in common containers: file ending -> files."""
    folder.mkdir()
    kinds = [("mp4", "mpeg4"), ("mp4", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9")]
    made: dict[str, list[bytes]] = {}
    for number, (ending, codec) in enumerate(kinds):
        path = folder / f"{number}.{ending}"
        make_video(path, frames=10, codec=codec)
        made.setdefault(ending, []).append(path.read_bytes())
    return made


def is_accounted_for(result: Result, record: MediaRecord) -> bool:
    """Return whether all rows of a media item exist, or the reason why they do not is recorded."""
    if record.status == "failed":
        return record.stage == "decode" and bool(record.error)
    assert record.key is not None
    if record.kind == "image":
        return result.reader.contains("image", record.key)
    views = frame_views(record.duration_s or 0.0, CONFIG.max_frames)
    rows = result.reader.lookup_pairs("frame", [record.key] * len(views), views)
    return bool((rows >= 0).all())


@pytest.mark.soak_counted
def test_every_damaged_file_is_encoded_or_in_the_ledger(
    tmp_path: Path, soak: Callable[[int, int], int]
) -> None:
    count = soak(60, 10_000)
    victims = {**images(), **videos(tmp_path / "whole")}
    folder = tmp_path / "damaged"
    folder.mkdir()
    endings = sorted(victims)
    for number in range(count):
        ending = endings[number % len(endings)]
        data = mutated(number // len(endings), victims[ending])
        (folder / f"{number:05}.{ending}").write_bytes(data)
    start = time.monotonic()
    config = CONFIG if count < 1000 else replace(CONFIG, commit_every_s=60.0)
    result = encode(
        tmp_path / "cache", f"folder:{folder}", config=config, workers=2, timeout_s=LONGEST_S
    )
    seconds = time.monotonic() - start
    assert result.code == 0
    assert len(result.ledger) == count
    lost = [name for name, record in result.ledger.items() if not is_accounted_for(result, record)]
    assert lost == []
    failed = result.failures()
    crashed = {n: why for n, (_, why) in failed.items() if why and "its worker" in why}
    kinds = {e: sum(n.endswith(e) for n in failed) for e in endings}
    print(
        f"{count} damaged files in {seconds:.0f} s: {count - len(failed)} encoded, "
        f"failed: {kinds}, crashed or hung a worker: {len(crashed)}"
    )
    assert crashed == {}, "the job handles this, but a decoder should not do it"
    assert 0 < len(failed) < count
    again = encode(tmp_path / "cache", f"folder:{folder}", config=config)
    assert again.plan.todo == ()
