"""The latest record of a source counts, and a source that is gone keeps its key.

append_media(root, [MediaRecord(source="/a.jpg", key=key)], "job")
record = read_media(root)["/a.jpg"]
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cache.errors import CorruptError
from cache.store.ledger import MediaRecord, append_media, media_table, read_media
from cache.store.paths import CacheRoot
from tests.support.faults import flip
from tests.support.spaces import key


def test_the_latest_record_of_a_source_wins(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    assert read_media(root) == {}
    first = MediaRecord(source="a", status="failed", stage="fetch", error="404", attempts=3)
    second = MediaRecord(source="b", key=key(1), bytes=10, width=3, height=4, size=10, mtime_ns=5)
    third = MediaRecord(source="a", key=key(2), bytes=9, width=1, height=1, duration_s=1.5)
    append_media(root, [first, second], "job")
    assert read_media(root) == {"a": first, "b": second}
    append_media(root, [first, third], "job")
    append_media(root, [], "job")
    assert read_media(root) == {"a": third, "b": second}
    assert media_table(root).num_rows == 2
    assert len(list(root.media_dir.iterdir())) == 2


def test_a_clock_set_back_does_not_make_a_part_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source="a", key=key(1))], "zzz")
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now - 3600 * 10**9)
    append_media(root, [MediaRecord(source="a", key=key(2))], "aaa")
    assert read_media(root)["a"].key == key(2)


def test_a_damaged_part_is_noticed(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    append_media(root, [MediaRecord(source="a", key=key(1))], "job")
    (path,) = root.media_dir.iterdir()
    flip(path, 56)
    with pytest.raises(CorruptError, match="part-"):
        read_media(root)


@pytest.mark.parametrize(
    "nonsense",
    [
        {"status": "lost"},
        {"status": "failed"},
        {"status": "failed", "stage": "fetch"},
        {"status": "failed", "stage": "lunch", "error": "none left"},
        {"stage": "fetch", "error": "404"},
    ],
)
def test_a_record_that_contradicts_itself_is_refused(nonsense: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="failed"):
        MediaRecord(source="a", **nonsense)


def test_a_source_that_is_gone_keeps_its_key(tmp_path: Path) -> None:
    """A link that died for a second encoder must not take the first one's features away."""
    cache = CacheRoot(tmp_path)
    key = "ab" * 32
    came = [
        MediaRecord(source="https://a/1", key=key, width=7, height=5, bytes=9),
        MediaRecord(source="/video", key=key, kind="video", duration_s=1.5, inode=3, size=4),
        MediaRecord(source="/there", key=key, inode=3),
        MediaRecord(source="https://a/2", key=key),
    ]
    gone = {"status": "failed", "stage": "fetch", "error": "HTTP 404"}
    append_media(cache, came, "one")
    append_media(
        cache,
        [
            MediaRecord(source="https://a/1", **gone),
            MediaRecord(source="/video", kind="video", **gone),
            MediaRecord(source="/there", inode=4, **gone),  # a file that cannot be read
            MediaRecord(source="https://a/2", **(gone | {"stage": "verify"})),  # other bytes
            MediaRecord(source="https://a/never", **gone),
        ],
        "two",
    )
    now = read_media(cache)
    assert {record.status for record in now.values()} == {"failed"}
    first, video = now["https://a/1"], now["/video"]
    assert (first.key, first.width, first.height, first.bytes) == (key, 7, 5, 9)
    assert (video.key, video.duration_s) == (key, 1.5)
    assert [now[s].key for s in ("/there", "https://a/2", "https://a/never")] == [None] * 3


@pytest.mark.parametrize("count", [1_700, 2_000, 2_119, 2_400, 20_000])
def test_a_part_of_any_size_is_read(tmp_path: Path, count: int) -> None:
    """Bounds of two columns of different texts once went over the limit together, at about 2,000 rows."""
    root = CacheRoot(tmp_path)
    records = [
        MediaRecord(source=f"/media/{number}.jpg", key=key(number), width=640, height=480)
        for number in range(count)
    ]
    append_media(root, records, "job")
    assert media_table(root).num_rows == count
