"""Kept media are read back unchanged, or count as absent.

store = MediaStore(Path("kept"))
store.put(key, data)        # kept/ab/abcd...
store.get(key)              # data, or None if it is absent or damaged
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache.errors import CorruptError
from encode.download.media_store import MediaStore


def key_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.binary(max_size=5000))
def test_kept_bytes_are_read_back(tmp_path: Path, data: bytes) -> None:
    store = MediaStore(tmp_path / "kept")
    key = key_of(data)
    store.put(key, data)
    assert store.get(key) == data
    assert f"{key[:2]}/{key}" in files(tmp_path / "kept")
    store.put(key, data)
    assert MediaStore(tmp_path / "kept").get(key) == data


def test_absent_bytes_are_none(tmp_path: Path) -> None:
    assert MediaStore(tmp_path).get(key_of(b"never")) is None


@pytest.mark.parametrize("damaged", [b"", b"photograp", b"photograph.", b"Photograph"])
def test_damage_is_logged_counts_as_absent_and_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: bytes
) -> None:
    store, data = MediaStore(tmp_path), b"photograph"
    key = key_of(data)
    store.put(key, data)
    path = tmp_path / key[:2] / key
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert store.get(key) is None
    assert str(path) in caplog.text and "damaged" in caplog.text
    store.put(key, data)
    assert store.get(key) == data
    assert files(tmp_path) == [f"{key[:2]}/{key}"]


@pytest.mark.parametrize("key", ["", "ab", "../../etc/passwd", "A" * 64, "g" * 64, "0" * 63 + "\n"])
def test_only_keys_are_accepted_as_names(tmp_path: Path, key: str) -> None:
    store = MediaStore(tmp_path / "kept")
    with pytest.raises(ValueError, match="not a key"):
        store.put(key, b"x")
    with pytest.raises(ValueError, match="not a key"):
        store.get(key)
    assert files(tmp_path) == []


def test_only_old_temporary_files_are_removed(tmp_path: Path) -> None:
    store, data = MediaStore(tmp_path), b"photograph"
    store.put(key_of(data), data)
    folder = tmp_path / key_of(data)[:2]
    (folder / "old.partial").write_bytes(b"half")
    (folder / "new.partial").write_bytes(b"half")
    long_ago = time.time() - 7200
    os.utime(folder / "old.partial", (long_ago, long_ago))
    MediaStore(tmp_path)
    assert not (folder / "old.partial").exists()
    assert (folder / "new.partial").exists()


def _write_for_ever(folder: Path) -> None:
    store, number = MediaStore(folder), 0
    while True:
        data = bytes([number % 256]) * 300_000
        store.put(key_of(data), data)
        number += 1


def test_killed_writers_leave_complete_files_or_none(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write_for_ever, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    deadline = time.monotonic() + 30
    while len(files(tmp_path)) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    for writer in writers:
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    store = MediaStore(tmp_path)
    whole = [Path(name).name for name in files(tmp_path) if not name.endswith(".partial")]
    assert len(whole) >= 15
    assert all(store.get(name) is not None for name in whole)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_links_among_kept_media_are_not_followed(tmp_path: Path, place: str) -> None:
    data, kept, outside = b"photograph", tmp_path / "kept", tmp_path / "outside"
    key = key_of(data)
    (kept / key[:2]).mkdir(parents=True)
    outside.mkdir()
    (outside / "old.partial").write_bytes(b"half")
    os.utime(outside / "old.partial", (1, 1))
    if place == "folder":
        (kept / key[:2]).rmdir()
        (kept / key[:2]).symlink_to(outside)
    else:
        (kept / key[:2] / key).symlink_to(outside / "new")
    store = MediaStore(kept)
    assert store.get(key) is None
    with pytest.raises(CorruptError, match="a link, refused"):
        store.put(key, data)
    assert files(outside) == ["old.partial"]
