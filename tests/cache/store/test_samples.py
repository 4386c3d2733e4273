"""Samples and media: what goes in comes out, unchanged content is not rewritten, later parts win."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError, NotFoundError
from cache.store import samples
from cache.store.ledger import MediaRecord, append_media, media_table, read_media
from cache.store.paths import CacheRoot
from cache.store.samples import (
    MediaRef,
    Message,
    Sample,
    dataset_names,
    read_samples,
    samples_digest,
    samples_table,
    write_samples,
)
from tests.support.spaces import key

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
weight = st.floats(0, 10)
sample = st.builds(
    Sample,
    id=text,
    dataset=st.just("toy"),
    messages=st.lists(
        st.builds(Message, role=st.sampled_from(samples.ROLES), content=text, weight=weight),
        max_size=3,
    ).map(tuple),
    media=st.lists(
        st.builds(MediaRef, source=text, kind=st.sampled_from(["image", "frame"])), max_size=3
    ).map(tuple),
    weight=weight,
    task=text,
)


def question(number: int) -> Sample:
    return Sample(
        id=str(number),
        dataset="toy",
        messages=(
            Message(role="user", content="<image>What?"),
            Message(role="assistant", content=f"{number}: sha256:{'0' * 64}", weight=0.2),
        ),
        media=(MediaRef(source=f"/images/{number}.png"),),
        task="what",
    )


@settings(max_examples=25, deadline=None)
@given(st.lists(sample, max_size=5))
def test_samples_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, samples: list[Sample]
) -> None:
    root = CacheRoot(tmp_path_factory.mktemp("root"))
    assert write_samples(root, "toy", samples)
    assert list(read_samples(root, "toy")) == samples
    assert samples_table(root, "toy").num_rows == len(samples)


def test_many_samples_are_streamed_in_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "ROW_GROUP", 4)
    root = CacheRoot(tmp_path)
    assert write_samples(root, "toy", map(question, range(11)))
    with pq.ParquetFile(root.samples("toy")) as file:
        assert file.num_row_groups == 3
    assert list(read_samples(root, "toy")) == [question(number) for number in range(11)]
    assert next(read_samples(root, "toy")) == question(0)


def test_unchanged_samples_are_not_rewritten(tmp_path: Path) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    assert write_samples(root, "toy", [question(1)])
    before = path.stat()
    digest = samples_digest(root, "toy")
    assert not write_samples(root, "toy", [question(1)])
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert write_samples(root, "toy", [question(2)])
    assert samples_digest(root, "toy") != digest
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_samples_that_cannot_be_drawn_leave_the_old_ones(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "toy", [question(1)])

    def failing() -> object:
        yield question(2)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_samples(root, "toy", failing())
    assert list(read_samples(root, "toy")) == [question(1)]


def test_damaged_samples_are_refused_then_replaced(tmp_path: Path) -> None:
    root, path = CacheRoot(tmp_path), CacheRoot(tmp_path).samples("toy")
    write_samples(root, "toy", [question(1)])
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for read in (samples_digest, samples_table, lambda *args: next(read_samples(*args))):
        with pytest.raises(CorruptError, match=r"part-00000\.parquet"):
            read(root, "toy")
    assert write_samples(root, "toy", [question(1)])
    assert next(read_samples(root, "toy")) == question(1)


def test_a_data_set_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    root = CacheRoot(tmp_path)
    write_samples(root, "colors", [])
    write_samples(root, "shapes", [])
    assert dataset_names(root) == ["colors", "shapes"]
    with pytest.raises(
        NotFoundError, match=r"no data set 'shape' .*colors, shapes.*nearest: shapes.*encode.run"
    ):
        samples_digest(root, "shape")


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
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
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


def test_what_is_gone_is_still_known_by_the_key_it_had(tmp_path: Path) -> None:
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
