"""Reading local files: key, identity, when time stamps can be trusted, and what cannot be read.

data, record = read_local(SourceTask(source="/photos/a.png"))
identify("/photos/a.png").matches(record)       # True until the file changes
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cache.format.embedded.names import member_source, row_source
from cache.store.ledger import MediaRecord
from encode.worker import local_files
from encode.worker.local_files import (
    Identifier,
    Identity,
    check_readable,
    identify,
    read_local,
    size_in_header,
    unreadable,
)
from encode.worker.messages import SourceTask
from model.media.images import BadMediaError, decode_image


def task(path: Path) -> SourceTask:
    return SourceTask(source=str(path))


def is_unchanged(path: Path, record: MediaRecord) -> bool:
    identity = identify(str(path))
    assert identity is not None
    return identity.matches(record)


def test_bytes_key_and_identity(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    data, record = read_local(task(path))
    assert data == b"abc"
    assert record.key == hashlib.sha256(b"abc").hexdigest()
    assert record.bytes == record.size == 3
    assert is_unchanged(path, record)
    video = read_local(SourceTask(source=str(path), kind="video"))
    assert video == (path, replace(record, kind="video")), (
        "a video is hashed, and not held in memory"
    )


def test_a_media_item_inside_a_file_has_its_own_key_and_the_identity_of_the_file(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [b"abc", None]}), path)
    first, second = (row_source("parquet", str(path), "image", row) for row in (0, 1))
    for kind in ("image", "video"):  # a video is held in memory, as a download is
        data, record = read_local(SourceTask(source=first, kind=kind))
        assert (data, record.key) == (b"abc", hashlib.sha256(b"abc").hexdigest())
        assert (record.kind, record.bytes, record.size) == (kind, 3, path.stat().st_size)
        assert is_unchanged(path, record)
    with pytest.raises(BadMediaError, match="no bytes here") as found:
        read_local(SourceTask(source=second))
    assert found.value.stage == "fetch"
    assert is_unchanged(path, unreadable(SourceTask(source=second)))
    path.unlink()
    for source in (first, member_source(str(tmp_path / "none.tar"), 512, 3, "a")):
        assert identify(source) is None
        with pytest.raises(BadMediaError, match="no such file"):
            read_local(SourceTask(source=source))


def test_a_container_is_looked_at_once_for_all_its_media(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"image": [b"abc"] * 9}), path := tmp_path / "a.parquet")
    looked: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path: looked.append(path) or stat(path))  # type: ignore[func-returns-value]
    identifier = Identifier()
    found = {identifier(row_source("parquet", str(path), "image", row)) for row in range(9)}
    assert len(found) == 1 and None not in found
    assert looked == [str(path)]


def test_a_write_within_one_clock_tick_of_reading_changes_the_identity(tmp_path: Path) -> None:
    """Read immediately after a write, and write again immediately: the record must not match."""
    path = tmp_path / "a.bin"
    for i in range(40):
        path.write_bytes(b"first %02d" % i)
        _, record = read_local(task(path))
        with path.open("r+b") as file:
            file.write(b"other %02d" % i)
        assert not is_unchanged(path, record)


def test_stamps_of_whole_seconds_and_of_the_future_are_not_trusted() -> None:
    now = time.time_ns()
    fine = Identity(1, now - 10**9 + 1, now - 10**9 + 1, 5)
    assert fine.settle_s() == 0.0
    whole = (now // 10**9) * 10**9
    coarse = Identity(1, whole, whole, 5)
    assert 0 < coarse.settle_s() <= local_files.COARSE_TICK_S
    future = Identity(1, now + 10**12, now, 5)
    assert future.settle_s() < 0


def test_a_file_stamped_in_the_future_is_read_by_every_job(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"abc")
    later = time.time_ns() + 10**12
    os.utime(path, ns=(later, later))
    data, record = read_local(task(path))
    assert data == b"abc"
    assert not is_unchanged(path, record)


@pytest.mark.parametrize(("changes", "readable"), [(2, True), (100, False)])
def test_a_file_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: int, readable: bool
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"x")
    original, left = local_files._regular, [changes]

    def look(status: os.stat_result, most: int) -> Identity:
        """Append a byte after each check of the file."""
        identity = original(status, most)
        if left[0]:
            left[0] -= 1
            with path.open("ab") as file:
                file.write(b"y")
        return identity

    monkeypatch.setattr(local_files, "_regular", look)
    if readable:
        data, record = read_local(task(path))
        assert data == b"xyy"
        assert record.size == 3
    else:
        with pytest.raises(BadMediaError, match="changes while it is read") as bad:
            read_local(task(path))
        assert bad.value.stage == "fetch"


def test_other_things_than_files_fail_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    listening = socket.socket(socket.AF_UNIX)
    listening.bind("socket.png")
    listening.close()
    (tmp_path / "big.png").write_bytes(b"12345")
    (tmp_path / "film.png").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41")
    monkeypatch.setattr(local_files, "MAX_BYTES", 4)
    expected = {
        "pipe.png": "a FIFO, not a file",
        "socket.png": "a socket, not a file",
        "device.png": "a device, not a file",
        "dangling.png": "link to no file",
        "folder.png": "a folder, not a file",
        "gone.png": "no such file",
        "big.png": "5 bytes, more than 4",
        "film.png": "an MP4 video, not an image; list it as a video in the data set",
        "gone.png/below": "no such file",
        "big.png/below": "Not a directory",
    }
    for name, reason in expected.items():
        with pytest.raises(BadMediaError) as bad:
            read_local(task(tmp_path / name))
        stage = "decode" if "video" in reason else "fetch"
        assert (bad.value.stage, bad.value.reason) == (stage, reason)
    assert identify(str(tmp_path / "pipe.png")) is None
    record = unreadable(task(tmp_path / "big.png"))
    assert is_unchanged(tmp_path / "big.png", record), (
        "so that it is tried again only after it has changed"
    )


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_size_in_the_header_is_that_of_the_decoded_image(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, kind, exif=exif)
    assert size_in_header(buffer.getvalue()) == decode_image(buffer.getvalue()).size


def test_a_file_without_an_image_header_has_no_size() -> None:
    assert size_in_header(b"no image") == (0, 0)


def test_a_file_is_readable_where_it_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    for wrong in (path, tmp_path):
        with pytest.raises(BadMediaError) as reading:
            read_local(task(wrong))
        with pytest.raises(BadMediaError) as looking:
            check_readable(task(wrong))
        assert looking.value.failure == reading.value.failure
        assert looking.value.failure.stage == "fetch"
    path.write_bytes(b"")
    check_readable(task(path))
    pq.write_table(pa.table({"image": [b"abc"]}), tmp_path / "t.parquet")
    inside = row_source("parquet", str(tmp_path / "t.parquet"), "image", 0)
    check_readable(SourceTask(source=inside))
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(BadMediaError):
        check_readable(SourceTask(source=inside))
